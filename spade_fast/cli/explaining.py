"""``spade-fast explain | demo``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spade_fast.cli.shared import (
    DEFAULT_MODEL,
    Arch,
    AsJson,
    BlockLayout,
    Checkpoint,
    Damping,
    Device,
    ModelName,
    NumClasses,
    Out,
    SolverName,
    SparsityText,
    ViewKind,
    Views,
    make_folder,
    open_network,
    print_json,
    read_methods,
    read_network,
    read_sparsity,
    read_views,
    say,
)
from spade_fast.errors import InvalidInputError, check_whole, require
from spade_fast.files import write_folder
from spade_fast.methods import DEFAULT_METHODS
from spade_fast.solver import check_rules

if TYPE_CHECKING:
    from spade_fast.explanation import Explanation
    from spade_fast.models import LoadedModel

_DEFAULT_METHODS = ",".join(DEFAULT_METHODS)
_DEMO_PHOTO = "coffee.png"
# Those of scikit-image's pictures that show things that ImageNet has classes for.
_DEMO_PHOTOS = ("astronaut.png", "camera.png", "chelsea.png", _DEMO_PHOTO, "motorcycle_left.png", "rocket.jpg")
_DEMO_PATCH = (16, 144, 64)  # top, left and side
_TROJAN_METHODS = ("saliency", "input_x_gradient", "integrated_gradients", "deep_lift", "lrp", "occlusion")


def explain(
    photo: Annotated[Path, typer.Argument(help="Image file.", show_default=False)],
    model: ModelName = None,
    arch: Arch = None,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    methods: Annotated[
        str, typer.Option(help="Attribution methods, separated by commas, or all of them: all.")
    ] = _DEFAULT_METHODS,
    out: Out = Path("explanation"),
    sparsity: SparsityText = "default",
    num_augmentations: Views = 64,
    views: ViewKind = "published",
    damping: Damping = 0.01,
    solver: SolverName = "fast",
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a threshold; by the exact solver, that go as one.",
            show_default="k * k of a kernel",
        ),
    ] = None,
    block_layout: BlockLayout = "taps",
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
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of the augmentation.")] = 0,
    backend: Annotated[str, typer.Option(help="auto, native or reference.")] = "auto",
    as_json: AsJson = False,
    save_trace: Annotated[Path | None, typer.Option(help="File for the trace (.safetensors).")] = None,
    report: Annotated[
        Path | None, typer.Option(help="File for a page to send (.html), with insertion curves.", show_default=False)
    ] = None,
    visualize: Annotated[
        int,
        typer.Option(help="Steps of gradient ascent by which --report shows what the class's neuron answers to."),
    ] = 0,
) -> None:
    """Explain the answer to a photograph, by the dense network and by its SPADE trace."""
    check_rules(damping=damping, solver=solver, block_layout=block_layout)
    check_whole("--visualize", visualize, 0)
    if visualize and report is None:
        raise InvalidInputError("--visualize is for --report: name a page as well, such as --report report.html")
    _explain(
        photo,
        out,
        as_json,
        read_network(model, arch, checkpoint, num_classes),
        methods,
        save_trace,
        report,
        visualize,
        device=device,
        target=target,
        sparsity=read_sparsity(sparsity),
        num_augmentations=num_augmentations,
        views=views,
        damping=damping,
        solver=solver,
        block_size=block_size,
        block_layout=block_layout,
        batch_size=batch_size,
        refit=refit,
        hessian_dtype=_read_hessian_dtype(hessian_dtype),
        seed=seed,
        backend=backend,
    )


def demo(
    what: Annotated[
        str, typer.Argument(help="photograph; trojan: a patch that decides the answer; photographs: six files to try.")
    ] = "photograph",
    out: Out = Path("demo"),
    as_json: AsJson = False,
) -> None:
    """Explain EfficientNet-Lite0's answer to a photograph that comes with scikit-image; downloads nothing."""
    if what not in ("photograph", "trojan", "photographs"):
        raise InvalidInputError(f"there is no demo {what!r}: choose photograph, trojan or photographs")
    folder = Path(require("skimage", "demo").data_dir)
    photo = folder / _DEMO_PHOTO
    if what == "photographs":
        files = write_folder(out, {name: (folder / name).read_bytes() for name in _DEMO_PHOTOS})
        if as_json:
            print_json({"files": {name: str(path) for name, path in files.items()}})
        else:
            _print_files(files)
    elif what == "photograph":
        _explain(photo, out, as_json, {"name": DEFAULT_MODEL})
    else:
        _demo_trojan(photo, out, as_json)


def _explain(
    photo: Path,
    out: Path,
    as_json: bool,
    network: Mapping[str, Any],
    methods: str = _DEFAULT_METHODS,
    save_trace: Path | None = None,
    report: Path | None = None,
    steps: int = 0,
    device: str | None = None,
    views: str = "published",
    **settings: Any,
) -> None:
    # What needs no network is checked before one is loaded, what is written is prepared before it is computed.
    from spade_fast.explanation import explain
    from spade_fast.images import load_image

    image = load_image(photo)
    names = read_methods(methods)
    require("captum.attr", "interpret")
    require("matplotlib.figure", "interpret")
    make_folder(out)
    if save_trace is not None:
        make_folder(save_trace.parent)
    if report is not None:
        from spade_fast.reports import check_page

        check_page(report)
        make_folder(report.parent)
    if steps:
        require("lucent", "visualize")

    model = open_network(network, device)
    layer = _classifier_of(model) if steps else ""
    settings["augment"] = read_views(views, model)
    say(f"[dim]explaining {escape(str(photo))}[/]")
    explanation = explain(model, image, methods=names, progress=sys.stderr.isatty(), **settings)
    files = explanation.save(out)
    if save_trace is not None:
        explanation.trace.save(save_trace)
        files["trace"] = save_trace
    if report is not None:
        files["report"] = _write_report(explanation, report, model, layer, steps)
    if as_json:
        print_json({**explanation.report(), "files": {name: str(path) for name, path in files.items()}})
    else:
        _print_summary(explanation, files)


def _classifier_of(model: LoadedModel) -> str:
    """The layer of the classes' neurons."""
    from spade_fast.attribution import like_weights
    from spade_fast.sparse_classifier import classifier_name

    side = model.preprocess.input_size
    try:
        return classifier_name(model.module, like_weights(torch.zeros(1, 3, side, side), model.module))
    except InvalidInputError as error:
        raise InvalidInputError(f"--visualize needs neurons of classes: {error}; leave it out") from error


def _write_report(explanation: Explanation, path: Path, model: LoadedModel, layer: str, steps: int) -> Path:
    from spade_fast.reports import write_report
    from spade_fast.visualization import visualize

    shown = None
    if steps:
        say(f"[dim]visualizing {escape(explanation.target_name)}[/]")
        shown = visualize(
            model,
            layer,
            explanation.target,
            trace=explanation.trace,
            thresholds=(steps,),
            progress=sys.stderr.isatty(),
        )
    say("[dim]measuring insertion curves for the report[/]")
    write_report(explanation, path, model=model, visualizations=shown, progress=sys.stderr.isatty())
    return path


def _demo_trojan(photo: Path, out: Path, as_json: bool) -> None:
    """A photograph with a patch for which the network was trained to give a class of its own."""
    from spade_fast import metrics
    from spade_fast.explanation import explain
    from spade_fast.images import load_image
    from spade_fast.implanting import load_demo
    from spade_fast.methods import METHODS
    from spade_fast.plans import ErrorBudget

    make_folder(out)
    say(f"[dim]loading {escape(DEFAULT_MODEL)} with patches implanted[/]")
    network, trojans, _ = load_demo()
    trojan = trojans[0]
    attacked, inside = trojan.patch.pasted(network.preprocess.view(load_image(photo)), *_DEMO_PATCH)
    say(f"[dim]explaining {escape(photo.name)} with a {escape(trojan.patch.name)} pasted in[/]")
    explanation = explain(
        network,
        attacked,
        target=trojan.target,
        methods=_TROJAN_METHODS,
        augment=read_views("partial", network),  # what is measured in docs/experiments.md
        sparsity=ErrorBudget(0.05),
        progress=sys.stderr.isatty(),
    )
    files = explanation.save(out)
    areas = {
        arm: dict(zip(maps, metrics.trojan_auc(torch.stack(list(maps.values())), inside).tolist(), strict=True))
        for arm, maps in (("dense", explanation.dense), ("spade", explanation.spade))
    }
    if as_json:
        written = {name: str(path) for name, path in files.items()}
        print_json({**explanation.report(), "trojan_auc": areas, "files": written})
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
    if explanation.spade_predictions[0].index != explanation.target:
        console.print(
            f'The trace itself gives another answer; its maps explain "{escape(explanation.target_name)}".',
            soft_wrap=True,
            highlight=False,
        )

    trace = explanation.trace
    layers = Table(title="sparsity", title_justify="left")
    for column in ("target", "achieved", "layers", "first", "last"):
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
    _print_files(files)


def _print_files(files: Mapping[str, Path]) -> None:
    for path in files.values():
        Console().print(f"written: {escape(str(path))}", soft_wrap=True, highlight=False)


def _read_hessian_dtype(name: str | None) -> torch.dtype | str | None:
    known = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "tf32": "tf32", None: None}
    if name not in known:
        raise InvalidInputError(f"--hessian-dtype must be float32, float64, tf32 or bfloat16, got {name!r}")
    return known[name]
