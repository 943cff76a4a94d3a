"""Traces, maps and metrics of many images, into a store that survives whatever happens."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast import presets
from spade_fast.attribution import check_methods, find_method
from spade_fast.cluster import Actors, Ranks
from spade_fast.errors import InvalidInputError, check_names, check_whole, require
from spade_fast.files import held_folder
from spade_fast.imagesets import listed_images
from spade_fast.lanes import Lanes, Outcomes
from spade_fast.layers import prunable_layers
from spade_fast.memory import free_memory
from spade_fast.methods import DEFAULT_METHODS
from spade_fast.metrics import STEPS
from spade_fast.models import LoadedModel, bare_module, usable_device
from spade_fast.readonly import ReadOnlyMappings
from spade_fast.store import StoreWriter, check_folder
from spade_fast.tracer import Sparsity, bytes_in_flight, images_that_fit
from spade_fast.worker import Measure, Recipe, Worker

#: A folder of images, a manifest, paths, or paths by name.
Images: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]

# So many images in a row that fail for no reason we know mean that all will.
_MOST_FAILURES = 8
# Beside the Hessians, an image in flight takes about so many bytes for the maps of its views.
_MAPS_IN_FLIGHT = 2**29
# More keep the interpreter busy, not the GPU.
_MOST_IN_FLIGHT_ON_GPU = 4


@dataclass(frozen=True)
class RunSummary(ReadOnlyMappings):
    """What a run did.

    Attributes
    ----------
    images
        How many were listed.
    made
        How many were traced and written.
    kept
        How many were there already, whole.
    refused
        Those that could not be used, by name: why.
    remade
        Those that were there, but damaged or about another image or question, and so were made anew, by name: why.
    seconds
        How long it took, without the loading of libraries and networks.
    others
        How many images of other lists the store holds, those that were refused too.
    """

    images: int
    made: int
    kept: int
    refused: Mapping[str, str]
    remade: Mapping[str, str]
    seconds: float
    others: int = 0


def run(
    model: nn.Module | LoadedModel,
    images: Images,
    out: str | os.PathLike[str],
    sparsity: Sparsity = presets.default,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    metrics: Sequence[Measure] = (),
    steps: int = STEPS,
    root: str | os.PathLike[str] | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    in_flight: int | None = None,
    threads: int = 1,
    seed: int = 0,
    device: torch.device | str | None = None,
    ray: str | None = None,
    workers: int | None = None,
    distributed: bool = False,
    progress: bool = False,
    **trace_settings: Any,
) -> RunSummary:
    """Trace and explain many images, into a store: see :class:`spade_fast.Store`.

    Each image's file is written whole, once it is made. A run that was cut short, however that came, goes on when it is
    called again, and comes to the same store, bit for bit; what is there already is verified and kept. Images that
    cannot be used are recorded with the reason, and tried again by the next run. One run at a time writes to a store.

    Parameters
    ----------
    model
        The network, or what :func:`spade_fast.load_model` returned.
    images
        A folder, a manifest (.csv, .parquet), paths of files, or paths by name: see
        :func:`spade_fast.imagesets.listed_images`.
    out
        The store's folder: a new one, or one that was written with the same settings.
    sparsity, trace_settings
        As in :func:`spade_fast.trace`.
    methods
        Names in :data:`spade_fast.METHODS`, by both networks each; none for traces alone.
    metrics
        "insertion" and "deletion", of all maps by the dense network: see :mod:`spade_fast.metrics`.
    steps
        Of the metrics.
    root
        The folder that a manifest's images are in. Default: the manifest's own.
    preprocess
        A :class:`spade_fast.Preprocess`. Default: the model's own, where it is known.
    in_flight
        Images that are worked on at a time, each in a thread of its own; 1 for one after the other. Default: as many as
        there are threads to use and memory holds. Where memory runs out all the same, fewer, with a warning; where it
        does not hold a single one, that image goes through the network in smaller batches, which changes its trace by
        rounding.
    threads
        Of each image in flight, on a CPU. What is made depends on it in the last bits, but not on `in_flight`.
    seed
        Of views, and of methods that draw at random.
    device
        Where to work. Default: where the model is.
    ray
        Work in actors of a Ray cluster instead, an image at a time each: its address, or "auto" for the cluster that
        runs here or, where none does, one on this machine. A network on a GPU has a GPU for each actor. Files are read
        and written by this process alone.
    workers
        Actors, at most. Default: as many as the cluster has GPUs, or groups of `threads` cores.
    distributed
        Share the images with the other processes that torchrun started, all of which call this and see the same
        folders.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    RunSummary

    Raises
    ------
    InvalidInputError
        For arguments that cannot be used, a folder that holds something else or another run writes to, where nothing
        can be written any more, and where image after image fails for no reason we know.
    """
    check_names("metrics", metrics)
    if not isinstance(out, (str, os.PathLike)) or not os.fspath(out):
        raise InvalidInputError(f"out is {out!r}: pass the store's folder")
    listed = listed_images(images, root=root)
    recipe = Recipe(
        model=model,
        sparsity=sparsity,
        # In one order, whichever they are named in: that of the files.
        methods={name: find_method(name) for name in sorted(check_methods(methods) if methods else ())},
        metrics=tuple(sorted({*metrics})),
        steps=steps,
        preprocess=preprocess,
        seed=seed,
        threads=threads,
        trace_settings=trace_settings,
    )
    recipe.check()
    check_whole("in_flight", 1 if in_flight is None else in_flight, 1)
    require("pyarrow.parquet", "run")
    if ray is not None and (distributed or in_flight is not None):
        raise InvalidInputError("ray= has processes of its own: leave in_flight and distributed out")
    if workers is not None and ray is None:
        raise InvalidInputError("workers= is for ray=: pass the address of a cluster as well, or in_flight instead")
    module = bare_module(model)
    in_flight = _checked_for_hooks(module, in_flight)
    if ray is None and threads > (cores := os.cpu_count() or 1):
        raise InvalidInputError(f"threads={threads}, but there are {cores} cores: pass at most as many")
    ranks = Ranks(distributed=distributed)
    with ExitStack() as stack:
        stack.callback(ranks.close)
        device = ranks.device(device, module)
        there = next(module.parameters()).device if device is None else usable_device(device)
        actors = None if ray is None else Actors(recipe, ray, workers, on_gpu=there.type == "cuda")
        store = Path(out), recipe.settings(), recipe.environment(there)
        # Which checks that all methods are valid on this network.
        worker = Worker(recipe, device=device if actors is None else None, own_modules=in_flight != 1)
        started = None if actors is None else stack.enter_context(actors.started())

        def held() -> StoreWriter:
            check_folder(Path(out))
            stack.enter_context(held_folder(out))
            writer = StoreWriter(*store)
            writer.clear()
            return writer

        writer = ranks.first(held) or StoreWriter(*store)
        mine = ranks.share(listed)
        if actors is not None and started is not None:
            outcomes = actors.outcomes(started, writer, mine)
        else:
            count = in_flight or _images_in_flight(module, there, threads, ranks.count_here)
            others = (Worker(recipe, device=device, own_modules=True) for _ in range(min(count, len(mine)) - 1))
            outcomes = Lanes(writer, [worker, *others]).outcomes(mine)
        try:
            summary = _collected(outcomes, len(mine), progress=progress and not ranks.rank)
        except BaseException:
            if not ranks.rank:
                with contextlib.suppress(Exception):  # what ends the run is what is to be told
                    writer.write_index()
            raise
        summary = _merged(ranks.gathered(summary))
        index = ranks.first(writer.write_index)
        of_others = 0 if index is None else len(index.records.keys() - {each.name for each in listed})
        return replace(summary, others=sum(ranks.gathered(of_others)))  # of the first process, which alone has an index


def _checked_for_hooks(module: nn.Module, in_flight: int | None) -> int | None:
    hooked = [
        name or "the network"
        for name, each in module.named_modules()
        if each._forward_hooks or each._backward_hooks or each._backward_pre_hooks  # which `twin` leaves out
    ]
    if hooked and in_flight not in (None, 1):
        raise InvalidInputError(
            f"{hooked[0]} has hooks, which the modules of images in flight would lack: remove them, or pass in_flight=1"
        )
    return 1 if hooked else in_flight


def _collected(outcomes: Outcomes, count: int, *, progress: bool) -> RunSummary:
    """What became of so many images, once all are done."""
    made, kept, failures = 0, 0, 0
    refused: dict[str, str] = {}
    remade: dict[str, str] = {}
    start = time.perf_counter()
    with contextlib.closing(outcomes), tqdm(total=count, desc="images", disable=not progress) as bar:
        for each in outcomes:
            made += each.made
            kept += not each.made and each.refused is None
            if each.refused is not None:
                refused[each.name] = each.refused
                bar.set_postfix(refused=len(refused))
            if each.remade is not None:
                remade[each.name] = each.remade
            failures = failures + 1 if each.unexpected else 0
            if failures == _MOST_FAILURES:
                raise InvalidInputError(
                    f"{failures} images in a row failed, as all others would; the last, {each.name}: {each.refused}"
                )
            bar.update()
    seconds = time.perf_counter() - start
    return RunSummary(count, made, kept, dict(sorted(refused.items())), dict(sorted(remade.items())), seconds)


def _merged(summaries: Sequence[RunSummary]) -> RunSummary:
    return RunSummary(
        images=sum(each.images for each in summaries),
        made=sum(each.made for each in summaries),
        kept=sum(each.kept for each in summaries),
        refused=dict(sorted(item for each in summaries for item in each.refused.items())),
        remade=dict(sorted(item for each in summaries for item in each.remade.items())),
        seconds=max(each.seconds for each in summaries),
    )


def _images_in_flight(module: nn.Module, device: torch.device, threads: int, processes: int = 1) -> int:
    """How many images to work on at a time, in each of so many processes on this machine."""
    needed = bytes_in_flight(prunable_layers(module).values(), 4) + _MAPS_IN_FLIGHT
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return min(_MOST_IN_FLIGHT_ON_GPU, images_that_fit(free, needed))
    most = max(1, torch.get_num_threads() // threads)
    room = free_memory()
    return most if room is None else max(1, min(most, room * 4 // 5 // needed // processes))
