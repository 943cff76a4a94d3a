"""Which of two patches made the network decide? The study of the SPADE paper's Table 3, with people.

A participant is shown an image, what the neuron of the network's answer wants to see (by the dense network or by the
image's SPADE trace), and two patches of the image: the one that Score-CAM ranks highest for that answer, and one that
it ranks low. How often people take the former tells how much the visualization says about the network's reasons.

>>> from spade_fast import study
>>> study.build(net, "photographs", "bundle")
>>> study.serve("bundle")  # on this machine, until Ctrl-C
>>> study.score("bundle")
"""

from spade_fast.errors import require

for _needed in ("pydantic", "jinja2", "starlette", "uvicorn"):
    require(_needed, "study")

from spade_fast.study.building import build  # noqa: E402
from spade_fast.study.bundle import Bundle, open_bundle  # noqa: E402
from spade_fast.study.journal import Journal, forget  # noqa: E402
from spade_fast.study.scoring import Score, score  # noqa: E402
from spade_fast.study.serving import serve  # noqa: E402
from spade_fast.study.simulation import simulate  # noqa: E402

__all__ = ["Bundle", "Journal", "Score", "build", "forget", "open_bundle", "score", "serve", "simulate"]
