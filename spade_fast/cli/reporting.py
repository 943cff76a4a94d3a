"""``spade-fast report``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from spade_fast.cli.shared import AsJson, make_folder, print_json, say_each, shown
from spade_fast.errors import InvalidInputError


def report(
    store: Annotated[Path, typer.Argument(help="Folder that spade-fast run wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The page, whose name ends in .html.")] = Path("report.html"),
    photographs: Annotated[
        str | None,
        typer.Option(help="Folder or manifest that run was given; a store holds no photographs.", show_default=False),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Heading of the page.", show_default="by network and number of images")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about the images of a store, to be sent to people who have a browser and nothing else."""
    from spade_fast.reports import check_page, write_report
    from spade_fast.store import Store

    check_page(out)
    if out.resolve().is_relative_to(store.resolve()):
        raise InvalidInputError(f"--out {str(out)!r} is in the store, which holds images only: choose another folder")
    found = Store(store)
    make_folder(out.parent)
    written = write_report(found, out, photographs=photographs, title=title, progress=sys.stderr.isatty())
    if as_json:
        reasons = {"left_out": dict(written.left_out), "without_photograph": dict(written.without_photograph)}
        print_json({"images": written.images, **reasons, "report": str(out)})
        return
    say_each("left out", written.left_out, str(out))
    say_each("without photograph", written.without_photograph, str(out))
    size = out.stat().st_size / 1e6
    count = f"{written.images} image{'' if written.images == 1 else 's'}"
    Console().print(f"written: {shown(str(out))}, {count}, {size:.1f} MB", soft_wrap=True, highlight=False)
