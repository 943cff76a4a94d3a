"""``spade-fast evaluate | tune``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spade_fast.cli.shared import (
    Arch,
    AsJson,
    BlockLayout,
    Checkpoint,
    Damping,
    Device,
    ModelName,
    NumClasses,
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
    read_trojans,
    read_views,
    say,
    say_each,
)
from spade_fast.comparison import Metric
from spade_fast.errors import InvalidInputError, check_whole, require
from spade_fast.solver import check_rules

if TYPE_CHECKING:
    from spade_fast.arms import Arm
    from spade_fast.cases import Case
    from spade_fast.comparison import Evaluation
    from spade_fast.implanting import Trojan
    from spade_fast.models import LoadedModel
    from spade_fast.plans import SparsityPlan

_ARMS = ("dense", "fast", "fast-tuned", "exact", "exact-tuned", "generic", "class", "sparse-fc")
_TUNED = ("fast-tuned", "exact-tuned")
_OF_A_SET = ("generic", "class", "sparse-fc")

TrojanFolder = Annotated[
    str | None,
    typer.Option("--trojan", help="Folder that implant wrote, or demo: the network that comes with this package."),
]
PatchClass = Annotated[
    list[str] | None, typer.Option("--patch", help="PATCH=CLASS of a network of your own; again for each patch.")
]
Methods = Annotated[
    str, typer.Option("--methods", help="Attribution methods, separated by commas; ten: those of the paper; or all.")
]
Limit = Annotated[int | None, typer.Option(help="Images, drawn at random.", show_default="all")]
Steps = Annotated[int, typer.Option(help="Of insertion and deletion. RISE: 224.")]


def evaluate(
    metric: Annotated[str, typer.Argument(help="trojan, insertion or deletion; the latter two are measured together.")],
    images: Annotated[Path, typer.Argument(help="Folder of photographs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for figures and tables; a run there goes on.")] = Path("evaluation"),
    arms: Annotated[
        str, typer.Option(help=f"What to compare, separated by commas: {', '.join(_ARMS)}. The first is the baseline.")
    ] = "dense,fast",
    methods: Methods = "ten",
    limit: Limit = None,
    model: ModelName = None,
    arch: Arch = None,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    trojan: TrojanFolder = None,
    patch: PatchClass = None,
    sparsity: SparsityText = "default",
    plans: Annotated[
        Path | None,
        typer.Option(help="For fast-tuned and exact-tuned: folder of tune, or one plan (FILE.json) for all methods."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="For generic, class and sparse-fc: folder of other photographs."),
    ] = None,
    reference_limit: Annotated[int, typer.Option(help="How many of those, drawn at random.")] = 64,
    num_augmentations: Views = 64,
    views: ViewKind = "published",
    damping: Damping = 0.01,
    block_layout: BlockLayout = "taps",
    steps: Steps = 32,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure maps on many images: Trojan AUC (table 1 of the paper), insertion and deletion (table 2)."""
    from spade_fast.evaluation import attacked_cases, clean_cases, unseen_cases
    from spade_fast.evaluation import evaluate as measure
    from spade_fast.imagesets import named_files
    from spade_fast.tuning import tuning_record

    measured = _read_metric(metric)
    check_whole("--reference-limit", reference_limit, 1)
    chosen = [name.strip() for name in arms.split(",")]
    if unknown := [name for name in chosen if name not in _ARMS]:
        raise InvalidInputError(f"there is no arm {unknown[0]!r}: choose from {', '.join(_ARMS)}")
    if twice := [name for name in chosen if chosen.count(name) > 1]:
        raise InvalidInputError(f"arm {twice[0]!r} is given twice: leave one out")
    if missing := [name for name in chosen if name in _OF_A_SET and reference is None]:
        raise InvalidInputError(f"arm {missing[0]!r} is made from other images: pass --reference FOLDER")
    if reference is not None and not any(name in _OF_A_SET for name in chosen):
        raise InvalidInputError(f"--reference is for arms {', '.join(_OF_A_SET)}: add one to --arms, or leave it out")
    tuned_arms = [name for name in chosen if name in _TUNED]
    if tuned_arms and plans is None:
        raise InvalidInputError(f"arm {tuned_arms[0]!r} needs --plans, a folder that spade-fast tune wrote, or a plan")
    if plans is not None and not tuned_arms:
        raise InvalidInputError(f"--plans is for arms {', '.join(_TUNED)}: add one to --arms, or leave --plans out")
    if block_layout != "taps" and "exact" not in map(_solver_of, chosen):
        raise InvalidInputError("--block-layout is for arms exact and exact-tuned: add one to --arms, or leave it out")
    check_rules(damping=damping, solver="exact", block_layout=block_layout)
    names = read_methods(methods)
    require("captum.attr", "interpret")
    require("matplotlib.figure", "interpret")
    tuned, tunings = ({}, {}) if plans is None else read_plans(plans, names)
    if sparsity.endswith(".json"):
        tunings[sparsity] = tuning_record(sparsity)
    files = named_files(images)
    others = {} if reference is None else named_files(reference)
    make_folder(out)
    network, trojans, implanting = open_subject(metric, trojan, patch, model, arch, checkpoint, num_classes, device)
    settings = {
        "num_augmentations": num_augmentations,
        "augment": read_views(views, network),
        "damping": damping,
        "seed": seed,
    }
    _tell_other_origins(tunings, network, measured, names, settings, [_solver_of(name) for name in tuned_arms])

    def cases(of: Mapping[str, Path]) -> dict[str, Callable[[], Case]]:
        return attacked_cases(network, of, trojans, seed=seed) if metric == "trojan" else clean_cases(network, of, seed)

    seen = {
        each: f"{name} was tuned on it" for name, tuning in tunings.items() for each in tuning.get("photographs", ())
    }
    seen |= dict.fromkeys(implanting.get("photographs", ()), "patches were implanted with it")
    compared = {
        name: _arm(
            name,
            network,
            read_sparsity(sparsity),
            tuned,
            others,
            cases,
            reference_limit,
            {**settings, **(_solver_settings("exact", block_layout) if _solver_of(name) == "exact" else {})},
        )
        for name in chosen
    }
    result = measure(
        network,
        unseen_cases(cases(files), seen),
        compared,
        out,
        metric=measured,
        methods=names,
        limit=limit,
        steps=steps,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    written = result.save(out)
    if as_json:
        print_json({**result.report(), "files": {name: str(path) for name, path in written.items()}})
        return
    _print_result(result, measured)
    for path in written.values():
        Console().print(f"written: {escape(str(path))}", soft_wrap=True, highlight=False)


def tune(
    metric: Annotated[str, typer.Argument(help="What the plans are to be good for: trojan, insertion or deletion.")],
    images: Annotated[Path, typer.Argument(help="Folder of photographs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for a plan and its history a method; a run there goes on.")] = Path(
        "plans"
    ),
    methods: Methods = "ten",
    limit: Annotated[int, typer.Option(help="Images to tune on, drawn at random.")] = 20,
    held_out: Annotated[float, typer.Option(help="Share of them that the search does not see.")] = 0.25,
    model: ModelName = None,
    arch: Arch = None,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    trojan: TrojanFolder = None,
    patch: PatchClass = None,
    grid: Annotated[str, typer.Option(help="Sparsities to choose from.")] = "0,0.2,0.5,0.8,0.9,0.95,0.99",
    blocks: Annotated[
        str | None, typer.Option(help="Blocks or layers with a sparsity each, separated by commas.", show_default="all")
    ] = None,
    search: Annotated[
        bool, typer.Option(help="Search block by block, too, beside plans that need no tuning: much slower.")
    ] = True,
    num_augmentations: Views = 64,
    views: ViewKind = "published",
    damping: Damping = 0.01,
    solver: SolverName = "fast",
    block_layout: BlockLayout = "taps",
    steps: Steps = 8,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Tune the sparsity of each block for attribution methods, one plan a method (FastSPADE*)."""
    from spade_fast.evaluation import attacked_cases, clean_cases, first_cases
    from spade_fast.imagesets import named_files
    from spade_fast.tuning import Tuner

    measured = _read_metric(metric)
    check_whole("--limit", limit, 1)
    names = read_methods(methods)
    shares = _read_grid(grid)
    check_rules(damping=damping, solver=solver, block_layout=block_layout)
    require("captum.attr", "interpret")
    require("matplotlib.figure", "interpret")
    files = named_files(images)
    make_folder(out)
    network, trojans, implanting = open_subject(metric, trojan, patch, model, arch, checkpoint, num_classes, device)
    cases = (
        attacked_cases(network, files, trojans, seed=seed) if metric == "trojan" else clean_cases(network, files, seed)
    )
    # What implanting saw, which is lost to measuring anyway, comes first.
    spent = {name for name, path in files.items() if path.name in implanting.get("images", ())}
    cases = {name: cases[name] for name in sorted(cases, key=lambda name: name not in spent)}
    tuner = Tuner(
        network,
        list(first_cases(cases, limit).values()),
        measured,
        grid=shares,
        blocks=None if blocks is None else [name.strip() for name in blocks.split(",")],
        held_out=held_out,
        steps=steps,
        seed=seed,
        progress=sys.stderr.isatty(),
        num_augmentations=num_augmentations,
        augment=read_views(views, network),
        damping=damping,
        **_solver_settings(solver, block_layout),
    )
    title = "Points above dense, on images that had a say in the choice"
    table = Table("method", "plan", "images", "points", "95 % interval", "maps made", title=title, title_justify="left")
    reports = {}
    for name in names:
        tuning = tuner.tune(name, search=search, log=out / f"{name}.log.jsonl")
        tuning.save(out / f"{name}.json")
        low, high = tuning.interval
        interval = "-" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"
        chosen_on = next(step.images for step in tuning.history if step.stage == "choice" and step.chosen)
        table.add_row(name, tuning.name, str(chosen_on), f"{tuning.gain:+.2f}", interval, str(tuning.evaluations))
        reports[name] = tuning.report()
    if as_json:
        print_json(reports)
        return
    console = Console()
    console.print(table)
    console.print(f"written: {escape(str(out))}", soft_wrap=True, highlight=False)


def _read_metric(text: str) -> Metric:
    known: tuple[Metric, ...] = get_args(Metric)
    for metric in known:
        if text == metric:
            return metric
    raise InvalidInputError(f"there is no metric {text!r}: choose {', '.join(get_args(Metric))}")


def _solver_of(arm: str) -> str:
    return "exact" if arm.startswith("exact") else "fast"


def _solver_settings(solver: str, block_layout: str) -> dict[str, str]:
    """What differs from the defaults: records of before there was a choice stay valid."""
    defaults = {"solver": "fast", "block_layout": "taps"}
    given = {"solver": solver, "block_layout": block_layout}
    return {name: value for name, value in given.items() if value != defaults[name]}


def _read_grid(text: str) -> list[float]:
    try:
        return [float(share) for share in text.split(",")]
    except ValueError as error:
        raise InvalidInputError(f"--grid {text!r} is no list of numbers, such as 0,0.5,0.9") from error


def read_plans(plans: Path, methods: tuple[str, ...]) -> tuple[dict[str, SparsityPlan], dict[str, dict[str, Any]]]:
    """A plan for each method; and how they were tuned, by their files."""
    from spade_fast.plans import SparsityPlan
    from spade_fast.tuning import tuning_record

    files = {name: plans / f"{name}.json" if plans.is_dir() else plans for name in methods}
    if absent := [name for name, file in files.items() if plans.is_dir() and not file.exists()]:
        raise InvalidInputError(f"{str(plans)!r} has no plan for {absent[0]}: tune one, or leave the method out")
    found = {name: SparsityPlan.from_json(file) for name, file in files.items()}
    tunings = {str(file): tuning_record(file) for file in files.values()}
    for name, file in files.items() if plans.is_dir() else ():
        if (other := tunings[str(file)].get("method", name)) != name:
            raise InvalidInputError(f"{str(file)!r} was tuned for {other}: tune one for {name}, or rename it")
    return found, tunings


def _tell_other_origins(
    tunings: Mapping[str, Mapping[str, Any]],
    network: LoadedModel,
    metric: Metric,
    methods: tuple[str, ...],
    settings: Mapping[str, Any],
    solvers: Sequence[str],
) -> None:
    """Say which plans were tuned for another metric or method, on another network, with other settings or solvers."""
    from spade_fast.arms import plain
    from spade_fast.files import digest

    weights = digest(network.module.state_dict())
    traced = {name: plain(settings[name]) for name in ("num_augmentations", "augment", "damping")}
    origins: dict[str, list[str]] = {}
    for name, tuning in tunings.items():
        if tuning.get("metric", metric) != metric:
            origins.setdefault(f"for {tuning['metric']}, not for {metric}", []).append(name)
        if tuning.get("method", methods[0]) not in methods:
            origins.setdefault(f"for {tuning['method']}, not for {', '.join(methods)}", []).append(name)
        if tuning.get("weights_sha256", weights) != weights:
            origins.setdefault(f"on other weights ({tuning['model']}: {tuning['weights']})", []).append(name)
        if any(tuning.get("trace", {}).get(key, value) != value for key, value in traced.items()):
            origins.setdefault("with other --views, --num-augmentations or --damping", []).append(name)
        for solver in solvers:
            if "trace" in tuning and (by := tuning["trace"].get("solver", "fast")) != solver:
                origins.setdefault(f"by the {by} solver, not by the {solver} one", []).append(name)
    for origin, names in origins.items():
        say(f"[yellow]note:[/] tuned {escape(origin)}: {escape(', '.join(names))}")


def open_subject(
    metric: str,
    trojan: str | None,
    patch: list[str] | None,
    model: str | None,
    arch: str | None,
    checkpoint: Path | None,
    num_classes: int | None,
    device: str | None,
) -> tuple[LoadedModel, list[Trojan], dict[str, Any]]:
    """The network, its patches, and the settings that they were implanted with, where those are known."""
    from spade_fast.implanting import load_demo, load_trojan

    if trojan is None:
        network = open_network(read_network(model, arch, checkpoint, num_classes), device)
        if metric != "trojan":
            if patch is not None:
                raise InvalidInputError(f"--patch is of the metric trojan, not of {metric}: leave it out")
            return network, [], {}
        if patch is None:
            raise InvalidInputError(
                "which patches has the network? pass --trojan FOLDER (of spade-fast implant), --trojan demo, or "
                "--patch PATCH=CLASS for each"
            )
        return network, read_trojans(patch, network), {}
    if any(option is not None for option in (model, arch, checkpoint, num_classes, patch)):
        raise InvalidInputError(
            "--trojan names network and patches: leave --model, --arch, --checkpoint, --num-classes and --patch out"
        )
    say(f"[dim]loading the network with patches: {escape(trojan)}[/]")
    network, trojans, report = load_demo(device=device) if trojan == "demo" else load_trojan(trojan, device=device)
    return network, trojans, report["settings"]


def _arm(
    name: str,
    network: LoadedModel,
    sparsity: Any,
    plans: Mapping[str, SparsityPlan],
    others: Mapping[str, Path],
    cases: Callable[[Mapping[str, Path]], dict[str, Callable[[], Case]]],
    most: int,
    settings: Mapping[str, Any],
) -> Arm:
    from spade_fast import arms
    from spade_fast.evaluation import clean_cases, first_cases

    if name == "dense":
        return arms.dense_arm(network)
    if name in ("fast", "exact"):
        return arms.trace_arm(network, sparsity, **settings)
    if name in _TUNED:
        return arms.tuned_arm(network, plans, **settings)
    clean = clean_cases(network, others, settings["seed"])
    if name == "generic":
        return arms.set_arm(network, list(first_cases(clean, most).values()), sparsity, **settings)
    measured = cases(others)  # with patches, where those are measured
    if name == "class":
        return arms.set_arm(network, list(first_cases(measured, most).values()), sparsity, by_class=True, **settings)
    # Every second photograph with its patch, where there are any: none twice, or what is held out would be trained on.
    mixed = {each: (measured if i % 2 else clean)[each] for i, each in enumerate(clean)}
    return arms.sparse_fc_arm(network, list(first_cases(mixed, most).values()), seed=settings["seed"])


def _print_result(result: Evaluation, metric: Metric) -> None:
    from spade_fast.comparison import MEAN, TITLES

    console = Console()
    for each in (metric, *(other for other in result.values if other != metric)):
        rows = {(row.method, row.arm): row for row in result.compare() if row.metric == each}
        images = f"{len(result.images)} image{'s' if len(result.images) > 1 else ''}"
        table = Table(title=f"{TITLES[each]}, %, {images}", title_justify="left", box=SIMPLE_HEAD)
        for column in ("method", "arm", "mean"):
            table.add_column(column, no_wrap=True, justify="right" if column == "mean" else "left")
        if len(result.arms) > 1:
            table.add_column(f"minus {result.arms[0]}", justify="right")
            table.add_column("better on", no_wrap=True, justify="right")
        for method in dict.fromkeys(method for method, _ in rows):
            for arm in result.arms:
                row = rows[method, arm]
                cells = ["" if arm != result.arms[0] else method, arm, f"{row.mean:.2f}" if row.images else "-"]
                if arm != result.arms[0]:
                    cells += [row.shown, f"{100 * row.wins:.0f} %"] if row.images else ["-", "-"]
                table.add_row(*cells, style="bold" if method == MEAN else None, end_section=arm == result.arms[-1])
        console.print(table)
    if len(result.methods) > 1 and len(result.in_mean) < 2:
        say("[yellow]no mean:[/] fewer than two methods have figures for half of the images in every arm")
    if result.flat:
        say(f"[yellow]maps that are the same everywhere:[/] {escape(result.told_flat())}")
    say_each("left out", result.left_out, "summary.json")
    say_each("no figure", {", ".join(names): reason for names, reason in result.failures.items()}, "summary.json")
