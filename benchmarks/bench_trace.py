"""A whole trace, native against the published procedure in plain PyTorch, after checking that they agree.

.venv/bin/python -m pytest benchmarks/bench_trace.py --benchmark-json=benchmarks/results/trace.json
"""

from __future__ import annotations

import pytest
import skimage.data
import torch
from PIL import Image

import spade_fast as sf

#: Largest relative difference of a layer's loss between two float32 solutions that count as equal.
LOSS_TOLERANCE = 0.02


@pytest.fixture(scope="module")
def case() -> tuple[sf.LoadedModel, Image.Image, dict[str, sf.Trace]]:
    net = sf.load_model("efficientnet_lite0")
    photo = Image.fromarray(skimage.data.coffee())
    return net, photo, {backend: sf.trace(net, photo, backend=backend) for backend in ("native", "reference")}


@pytest.mark.benchmark(group="trace, EfficientNet-Lite0, 64 augmentations, default plan")
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_trace(benchmark, case, backend):
    net, photo, traces = case
    for name, layer in traces["native"].layers.items():
        assert layer.loss == pytest.approx(traces["reference"].layers[name].loss, rel=LOSS_TOLERANCE), name
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.pedantic(lambda: sf.trace(net, photo, backend=backend), rounds=3, warmup_rounds=1)
