"""The command line: ``spade-fast explain | run | report | compare | evaluate | tune | implant | study | demo | info``.

Progress, warnings and refusals go to stderr, results to stdout. Exit codes: 0 done, 2 refused (wrong usage, or an
input that cannot be used), 130 interrupted; an unexpected error shows its traceback and gives 1.
"""

from __future__ import annotations

import typer

from spade_fast.cli.comparing import compare
from spade_fast.cli.explaining import demo, explain
from spade_fast.cli.implanting import implant
from spade_fast.cli.information import info
from spade_fast.cli.measuring import evaluate, tune
from spade_fast.cli.reporting import report
from spade_fast.cli.running import run
from spade_fast.cli.shared import Group
from spade_fast.cli.studying import study

app = typer.Typer(
    cls=Group,
    name="spade-fast",
    help="Explain what a neural network did on one image: SPADE traces and attribution maps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (explain, run, report, compare, evaluate, tune, implant, demo, info):
    app.command()(command)
app.add_typer(study)


def main() -> None:
    """Entry point of ``spade-fast``."""
    app()
