"""``spade-fast run``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
import typer
from rich.console import Console

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
    open_network,
    print_json,
    read_methods,
    read_network,
    read_sparsity,
    read_views,
    say_each,
    shown,
)
from spade_fast.errors import InvalidInputError, by_reason, check_whole, require
from spade_fast.methods import DEFAULT_METHODS
from spade_fast.solver import check_rules

if TYPE_CHECKING:
    from spade_fast.running import RunSummary
    from spade_fast.worker import Measure


def run(
    images: Annotated[
        str, typer.Argument(help="Folder of images, or a manifest: .csv or .parquet.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The store: a new folder, or one to go on with.", show_default=False)],
    methods: Annotated[
        str, typer.Option(help="Attribution methods, separated by commas; all, ten, or none: traces alone.")
    ] = ",".join(DEFAULT_METHODS),
    metrics: Annotated[
        str | None,
        typer.Option(help="insertion, deletion or both, separated by a comma: of all maps.", show_default="none"),
    ] = None,
    model: ModelName = None,
    arch: Arch = None,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    sparsity: SparsityText = "default",
    num_augmentations: Views = 64,
    views: ViewKind = "published",
    damping: Damping = 0.01,
    solver: SolverName = "fast",
    block_layout: BlockLayout = "taps",
    steps: Annotated[int, typer.Option(help="Of insertion and deletion. RISE: 224.")] = 32,
    root: Annotated[
        Path | None, typer.Option(help="Folder that a manifest's images are in.", show_default="the manifest's")
    ] = None,
    in_flight: Annotated[
        int | None,
        typer.Option(help="Images worked on at a time.", show_default="as many as threads, memory permitting"),
    ] = None,
    threads: Annotated[int, typer.Option(help="Of each image in flight, on a CPU.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(help="Work in actors of a Ray cluster: auto, or its address.", show_default="in this process"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Actors of --ray.", show_default="one per GPU, or group of threads")
    ] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Trace and explain many images into a store; a run that was cut short goes on when it is started again.

    Started by torchrun (torchrun --nproc-per-node 2 -m spade_fast run ...), processes share the images.
    """
    from spade_fast.cluster import gpu_of_rank
    from spade_fast.heap import share_heap
    from spade_fast.imagesets import listed_images
    from spade_fast.running import run

    check_rules(damping=damping, solver=solver, block_layout=block_layout)
    for option, value in (
        ("--threads", threads),
        ("--steps", steps),
        ("--in-flight", 1 if in_flight is None else in_flight),
    ):
        check_whole(option, value, 1)
    if workers is not None and ray is None:
        raise InvalidInputError("--workers is for --ray: name a cluster as well, or pass --in-flight instead")
    if in_flight is not None and ray is not None:
        raise InvalidInputError(
            "--in-flight is not for --ray, whose workers have an image each: pass --workers instead"
        )
    names = () if methods == "none" else read_methods(methods)
    measures = () if metrics is None else tuple(name.strip() for name in metrics.split(","))
    plan = read_sparsity(sparsity)
    require("pyarrow.parquet", "run")
    listed_images(images, root=root)  # is it a list of images?
    share_heap()
    shared = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    if shared and device == "cuda":
        device = gpu_of_rank()
    network = open_network(read_network(model, arch, checkpoint, num_classes), device)
    settings: dict[str, Any] = {
        "num_augmentations": num_augmentations,
        "augment": read_views(views, network),
        "damping": damping,
        "solver": solver,
        "block_layout": block_layout,
    }
    summary = run(
        network,
        images,
        out,
        plan,
        methods=names,
        metrics=cast("tuple[Measure, ...]", measures),
        steps=steps,
        root=root,
        in_flight=in_flight,
        threads=threads,
        ray=ray,
        workers=workers,
        distributed=shared,
        seed=seed,
        progress=sys.stderr.isatty(),
        **settings,
    )
    if shared and int(os.environ["RANK"]):
        return  # as the first process tells it all
    if len(summary.refused) == summary.images:
        reasons = by_reason(summary.refused)
        raise InvalidInputError(f"none of {_images(summary.images)} can be used ({reasons[0]})")
    _print(summary, out, as_json)


def _print(summary: RunSummary, out: Path, as_json: bool) -> None:
    if as_json:
        counts = {name: getattr(summary, name) for name in ("images", "made", "kept", "seconds", "others")}
        reasons = {"refused": dict(summary.refused), "remade": dict(summary.remade)}
        print_json({**counts, **reasons, "store": str(out)})
        return
    say_each("refused", summary.refused, "index.parquet")
    say_each("made anew", summary.remade, "index.parquet")
    told = f"{summary.made} made, {summary.kept} kept, {len(summary.refused)} refused; {summary.seconds:.1f} s"
    told += f", {summary.made / summary.seconds:.2f} images a second" if summary.made else ""
    others = f", with {_images(summary.others)} of other lists in it" if summary.others else ""
    Console().print(
        f"{_images(summary.images)}: {told}\nwritten: {shown(str(out))}{others}", soft_wrap=True, highlight=False
    )


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"
