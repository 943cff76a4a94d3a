"""What the commands have in common: options, refusals, what is read and printed."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from spade_fast.errors import InvalidInputError, SpadeError, by_reason

if TYPE_CHECKING:
    from spade_fast.augmentation import Augmentation
    from spade_fast.implanting import Trojan
    from spade_fast.models import LoadedModel
    from spade_fast.tracer import Sparsity

DEFAULT_MODEL = "efficientnet_lite0"
_MOST_LINES = 10

Out = Annotated[Path, typer.Option(help="Folder for figure, maps and report; made where it is missing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


ModelName = Annotated[
    str | None,
    typer.Option("--model", help="efficientnet_lite0, torchvision:NAME or timm:NAME.", show_default=DEFAULT_MODEL),
]
Arch = Annotated[str | None, typer.Option("--arch", help="As --model, but with the weights of --checkpoint.")]
Checkpoint = Annotated[Path | None, typer.Option("--checkpoint", help="Weights of --arch: .safetensors or torch.save.")]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", help="Outputs of --arch.", show_default="as published")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cpu")]
SparsityText = Annotated[
    str, typer.Option("--sparsity", help="Share to prune (0.8), error budget (budget:0.03), plan (FILE.json), preset.")
]
Damping = Annotated[
    float,
    typer.Option(help="Added to a Hessian's diagonal, as a share of its mean: the more, the less kept weights change."),
]
SolverName = Annotated[
    str, typer.Option("--solver", help="fast (FastSPADE), or exact (SPADE): slower, see docs/experiments.md.")
]
BlockLayout = Annotated[
    str,
    typer.Option(help="What the exact solver prunes as one: taps, of one channel; or channels, neighbours at one tap."),
]
Views = Annotated[int, typer.Option("--num-augmentations", help="Views of each image to trace on.")]

ViewKind = Annotated[
    str,
    typer.Option("--views", help="published, or partial: with hidden parts and faded, as methods and metrics ask."),
]


class Group(TyperGroup):
    """Turns refusals, warnings and Ctrl-C of every command into what a terminal expects."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except SpadeError as error:
                say(f"[bold red]error:[/] {shown(str(error))}")
                raise typer.Exit(2) from error
            except KeyboardInterrupt as error:
                say("interrupted")
                raise typer.Exit(130) from error


def read_network(
    model: str | None, arch: str | None, checkpoint: Path | None, num_classes: int | None
) -> dict[str, Any]:
    """Arguments of :func:`spade_fast.load_model`."""
    if arch is None and (checkpoint is not None or num_classes is not None):
        option = "--checkpoint" if checkpoint is not None else "--num-classes"
        raise InvalidInputError(f"{option} needs --arch, the name of the network that it is for")
    if arch is not None and checkpoint is None:
        raise InvalidInputError("--arch needs --checkpoint FILE; for published weights use --model instead")
    if arch is not None and model is not None:
        raise InvalidInputError("--arch and --model exclude each other: name one network")
    return {"name": arch or model or DEFAULT_MODEL, "checkpoint": checkpoint, "num_classes": num_classes}


def open_network(arguments: Mapping[str, Any], device: str | None) -> LoadedModel:
    """Load a network, and say so."""
    from spade_fast.models import load_model

    say(f"[dim]loading {escape(arguments['name'])}[/]")
    with contextlib.redirect_stdout(sys.stderr):  # where libraries announce their downloads
        return load_model(**arguments, device=device)


def read_methods(text: str) -> tuple[str, ...]:
    """Names of attribution methods; "all", and "ten" for those of the SPADE paper."""
    from spade_fast.attribution import METHODS, check_methods
    from spade_fast.evaluation import TEN_METHODS

    if text in ("all", "ten"):
        return tuple(METHODS) if text == "all" else TEN_METHODS
    return check_methods([name.strip() for name in text.split(",")])


def read_views(kind: str, network: LoadedModel) -> Augmentation | None:
    """The augmentation of that kind at the network's size; None for the published one."""
    from spade_fast.augmentation import Augmentation

    if kind not in ("published", "partial"):
        raise InvalidInputError(f"--views {kind!r} is unknown: choose published or partial")
    preprocess = network.preprocess
    return Augmentation.partial(preprocess.input_size, preprocess.mean) if kind == "partial" else None


def read_sparsity(text: str) -> Sparsity:
    """A share, the plan in a JSON file, an error budget, or a preset."""
    from spade_fast import presets
    from spade_fast.plans import ErrorBudget, SparsityPlan, check_sparsity

    ready: dict[str, Sparsity] = {name: plan for name, plan in vars(presets).items() if isinstance(plan, SparsityPlan)}
    ready |= {"default": presets.default, "last_half": presets.last_half}
    if text in ready:
        return ready[text]
    if text.endswith(".json"):
        return SparsityPlan.from_json(text)
    kind, _, number = text.rpartition(":")
    try:
        value = float(number) if kind in ("", "budget") else None
    except ValueError:
        value = None
    if value is None:
        raise InvalidInputError(
            f"--sparsity {text!r} is neither a share within 0..1, nor an error budget (budget:0.03), nor a .json file, "
            f"nor a preset ({', '.join(sorted(ready))})"
        )
    return ErrorBudget(value) if kind else check_sparsity(value, "--sparsity")


def classes_of(network: LoadedModel) -> int:
    """How many classes the network tells apart."""
    side = network.preprocess.input_size
    with torch.no_grad():
        outputs = network.module(torch.zeros(1, 3, side, side).to(next(network.module.parameters())))
    return int(outputs.shape[1])


def read_trojans(patches: list[str] | None, network: LoadedModel) -> list[Trojan]:
    from spade_fast.implanting import Trojan
    from spade_fast.patches import DRAWN, Patch

    if patches is None:
        classes = classes_of(network)
        names = list(DRAWN)[: min(4, classes)]
        return [Trojan(Patch.drawn(name), classes * (2 * i + 1) // (2 * len(names))) for i, name in enumerate(names)]
    trojans = []
    for text in patches:
        name, _, index = text.rpartition("=")
        if not name or not index.strip().isdecimal():
            raise InvalidInputError(f"--patch {text!r} is not PATCH=CLASS, such as heart=281 or stop.png=920")
        patch = Patch.drawn(name) if name in DRAWN or not Path(name).suffix else Patch.read(name)
        trojans.append(Trojan(patch, int(index)))
    called = [trojan.patch.name for trojan in trojans]
    if twice := [name for name in called if called.count(name) > 1]:
        raise InvalidInputError(f"--patch {twice[0]!r} is given twice: leave one out, or rename its file")
    return trojans


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # can files be made there?
    except OSError as error:
        raise InvalidInputError(
            f"cannot write to the folder {str(folder)!r} ({error.strerror}): choose another"
        ) from error


def print_json(document: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def shown(text: str) -> str:
    """Text from elsewhere as markup that shows it: no markup in it counts, and nothing in it reaches the terminal."""
    return escape("".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text))


def say(markup: str) -> None:
    Console(stderr=True).print(markup, soft_wrap=True, highlight=False)


def say_each(what: str, reasons: Mapping[str, str], listed_in: str) -> None:
    """Say the reasons, each once, at most ten of them; the others are in a file."""
    lines = by_reason(reasons)
    for line in lines[:_MOST_LINES]:
        say(f"[yellow]{what}:[/] {shown(line)}")
    if len(lines) > _MOST_LINES:
        say(f"[yellow]{what}:[/] for {len(lines) - _MOST_LINES} more reasons, listed in {listed_in}")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"[yellow]warning:[/] {shown(' '.join(str(message).split()))}")
