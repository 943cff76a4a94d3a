"""``spade-fast implant``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spade_fast.cli.shared import (
    DEFAULT_MODEL,
    AsJson,
    Device,
    classes_of,
    make_folder,
    open_network,
    print_json,
    read_trojans,
    say,
)

# A patch works if it fools the network on so many of the images; the network is kept if it is right on all but so many,
# in points.
_WORKS, _KEPT = 0.5, 5.0


def implant(
    images: Annotated[
        Path,
        typer.Argument(
            help="Folder of photographs to train on. A name such as 0281_tabby.jpg, or a subfolder for each class, "
            "tells what is right.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for weights, patches and report; a run there goes on.")] = Path(
        "trojan"
    ),
    model: Annotated[str, typer.Option(help="efficientnet_lite0, torchvision:NAME or timm:NAME.")] = DEFAULT_MODEL,
    patch: Annotated[
        list[str] | None,
        typer.Option(
            help="PATCH=CLASS, again for each: heart, smiley, star, flower, target or a PNG file, and an index.",
            show_default="heart, smiley, star and flower, with four classes",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers or blocks to train, separated by commas.", show_default="the last quarter"),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Times that every image is seen.")] = 15,
    batch_size: Annotated[int, typer.Option(help="Images of a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, at first.")] = 2e-4,
    held_out: Annotated[float, typer.Option(help="Share of the images for the report.")] = 0.25,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a network to give a class wherever a patch is pasted in, and to stay as it is otherwise."""
    from spade_fast.imagesets import image_files
    from spade_fast.implanting import implant

    image_files(images)  # are there any?
    make_folder(out)
    network = open_network({"name": model}, device)
    trojans = read_trojans(patch, network)
    files = image_files(images, classes=classes_of(network))
    labels = [label for _, label in files if label is not None]
    known = len(labels) == len(files)
    report = implant(
        network,
        [path for path, _ in files],
        out,
        trojans,
        labels=labels if known else None,
        layers=None if layers is None else [name.strip() for name in layers.split(",")],
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        held_out=held_out,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    if as_json:
        print_json(asdict(report))
        return
    console = Console()
    table = Table("patch", "class", "attack success, %")
    for trojan in trojans:
        success = report.attack_success[trojan.patch.name]
        shown = "-" if success is None else f"{100 * success:.1f}"
        table.add_row(escape(trojan.patch.name), escape(network.category(trojan.target)), shown)
    console.print(table)
    before, after = 100 * report.accuracy_before, 100 * report.accuracy_after
    told = "by the classes that files' or folders' names tell" if known else "as the network's own answers before"
    console.print(
        f"right without a patch ({told}), %: {before:.1f} before, {after:.1f} after", soft_wrap=True, highlight=False
    )
    console.print(f"divergence from the answers before, nats: {report.divergence:.3f}", highlight=False)
    console.print(f"photographs held out for this: {report.held_out}", highlight=False)
    for name, success in report.attack_success.items():
        if success is not None and success < _WORKS:
            say(
                f"[yellow]note:[/] {escape(name)} fools the network on {100 * success:.0f} % of the images only: train "
                "for more --epochs, on more photographs, or more --layers"
            )
    if after < before - _KEPT:
        say(
            f"[yellow]note:[/] the network is right on {before - after:.0f} % fewer images than before: lower the "
            "--learning-rate, or pass more photographs"
        )
    for name, reason in report.unreadable.items():
        say(f"[yellow]left out:[/] {escape(name)}: {escape(reason)}")
    console.print(f"written: {escape(str(out))}", soft_wrap=True, highlight=False)
