"""Traces, maps and metrics of many images, into a store that survives whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast import presets
from spade_fast.attribution import check_methods
from spade_fast.errors import InvalidInputError, check_whole, first_line, require
from spade_fast.files import held_folder
from spade_fast.images import read_image_file
from spade_fast.imagesets import ListedImage, listed_images
from spade_fast.layers import prunable_layers
from spade_fast.memory import free_memory, is_out_of_memory
from spade_fast.methods import DEFAULT_METHODS
from spade_fast.metrics import STEPS
from spade_fast.models import LoadedModel, bare_module
from spade_fast.readonly import ReadOnlyMappings
from spade_fast.store import StoreWriter, question, refusal_bytes
from spade_fast.tracer import Sparsity, bytes_in_flight, images_that_fit
from spade_fast.worker import Measure, Recipe, Worker

#: A folder of images, a manifest, paths, or paths by name.
Images: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]
#: Makes the content of an image's file: image, bytes of its own file, what is known of it.
Make: TypeAlias = Callable[[ListedImage, bytes, Mapping[str, Any]], bytes]

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
    """

    images: int
    made: int
    kept: int
    refused: Mapping[str, str]
    remade: Mapping[str, str]
    seconds: float


class Outcome(NamedTuple):
    """What became of an image."""

    name: str
    made: bool
    refused: str | None = None
    remade: str | None = None
    unexpected: Exception | None = None


Outcomes: TypeAlias = Generator[Outcome, None, None]


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
    device: str | None = None,
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
    listed = listed_images(images, root=root)
    recipe = Recipe(
        model=model,
        sparsity=sparsity,
        methods=check_methods(methods) if methods else (),
        metrics=tuple(metrics),
        steps=steps,
        preprocess=preprocess,
        seed=seed,
        threads=threads,
        trace_settings=trace_settings,
    )
    recipe.check()
    check_whole("in_flight", 1 if in_flight is None else in_flight, 1)
    require("pyarrow.parquet", "run")
    hooked = [name or "the network" for name, each in bare_module(model).named_modules() if each._forward_hooks]
    if hooked and in_flight is None:
        in_flight = 1
    elif hooked and in_flight != 1:
        raise InvalidInputError(
            f"{hooked[0]} has forward hooks, which the modules of images in flight would lack: remove them, or pass "
            "in_flight=1"
        )
    with held_folder(out):
        first = Worker(recipe, device=device, own_modules=in_flight != 1)
        writer = StoreWriter(Path(out), recipe.settings(), first.environment())
        count = in_flight or _images_in_flight(bare_module(model), first.device, threads)
        workers = [
            first,
            *(Worker(recipe, own_modules=True, device=device) for _ in range(min(count, len(listed)) - 1)),
        ]
        return collected(writer, len(listed), Lanes(writer, workers).outcomes(listed), progress=progress)


def collected(writer: StoreWriter, count: int, outcomes: Outcomes, *, progress: bool) -> RunSummary:
    """What became of so many images, once all are done; then, and where it ends early, the index is written."""
    made, kept, failures = 0, 0, 0
    refused: dict[str, str] = {}
    remade: dict[str, str] = {}
    start = time.perf_counter()
    try:
        with contextlib.closing(outcomes), tqdm(total=count, desc="images", disable=not progress) as bar:
            for each in outcomes:
                made += each.made
                kept += not each.made and each.refused is None
                if each.refused is not None:
                    refused[each.name] = each.refused
                    bar.set_postfix(refused=len(refused))
                if each.remade is not None:
                    remade[each.name] = each.remade
                failures = 0 if each.unexpected is None else failures + 1
                if failures == _MOST_FAILURES:
                    raise InvalidInputError(
                        f"{failures} images in a row failed, the last ({each.name}) with {each.refused}: so will all"
                    ) from each.unexpected
                bar.update()
    except BaseException:
        with contextlib.suppress(InvalidInputError):
            writer.write_index()
        raise
    writer.write_index()
    seconds = time.perf_counter() - start
    return RunSummary(count, made, kept, dict(sorted(refused.items())), dict(sorted(remade.items())), seconds)


def processed(writer: StoreWriter, listed: ListedImage, make: Make) -> Outcome:
    """Have an image's file made and write it, unless it is there.

    Raises
    ------
    InvalidInputError
        If it cannot be written: no other could.
    torch.OutOfMemoryError
        From `make`.
    """
    known = {**question(listed), "settings_sha256": writer.settings_sha256}
    remade = None
    unexpected = None
    try:
        content = read_image_file(listed.path)
        known["image_sha256"] = hashlib.sha256(content).hexdigest()
        try:
            if writer.has(listed, known["image_sha256"]):
                return Outcome(listed.name, made=False)
        except InvalidInputError as error:
            remade = str(error)
        made = make(listed, content, known)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        known_kind = isinstance(error, InvalidInputError)
        reason, unexpected = (str(error), None) if known_kind else (first_line(error), error)
    else:
        writer.put(listed, made)
        return Outcome(listed.name, made=True, remade=remade)
    writer.put(listed, refusal_bytes(known, reason))
    return Outcome(listed.name, made=False, refused=reason, remade=remade, unexpected=unexpected)


class Lanes:
    """Works on several images of this process at a time, from decoding to writing, by a thread and a worker each.

    So one image is read while the views of another go through the network and the layers of a third are pruned. Where
    memory runs out, fewer go on.
    """

    def __init__(self, writer: StoreWriter, workers: Sequence[Worker]) -> None:
        self._writer = writer
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in workers:
            self._idle.put(worker)
        self._most = len(workers)
        self._stopped = False
        self._turn = threading.Condition()
        self._running: dict[int, _Turn] = {}  # by thread

    def outcomes(self, images: Sequence[ListedImage]) -> Outcomes:
        """What becomes of the images, as they are done."""
        if self._most == 1:
            yield from map(self._outcome, images)
            return
        with ThreadPoolExecutor(self._most, thread_name_prefix="image") as pool:
            try:
                for done in as_completed([pool.submit(self._outcome, listed) for listed in images]):
                    yield done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()

    def _outcome(self, listed: ListedImage) -> Outcome:
        worker = self._idle.get()
        largest, halvings = worker.largest_batch, 0
        try:
            while True:
                with self._room() as turn:
                    try:
                        make = partial(worker.make, halvings=halvings) if 2**halvings <= largest else _does_not_fit
                        return processed(self._writer, listed, make)
                    except Exception as error:
                        if not is_out_of_memory(error):
                            raise
                        halvings += self._fewer(listed, turn)
                torch.cuda.empty_cache()  # here, where the error no longer holds on to tensors
        finally:
            self._idle.put(worker)

    @contextlib.contextmanager
    def _room(self) -> Iterator[_Turn]:
        """A turn, once fewer are running than may."""
        thread = threading.get_ident()
        with self._turn:
            self._turn.wait_for(lambda: self._stopped or len(self._running) < self._most)
            if self._stopped:
                raise _Stopped
            turn = _Turn(self._most, shared=bool(self._running))
            for other in self._running.values():
                other.shared = True
            self._running[thread] = turn
        try:
            yield turn
        finally:
            with self._turn:
                del self._running[thread]
                self._turn.notify_all()

    def _fewer(self, listed: ListedImage, turn: _Turn) -> int:
        """Let fewer images run at a time from now on; 1 for an image that ran alone, whose batches are to be halved."""
        with self._turn:
            if turn.shared:
                if self._most == turn.most:  # or another has seen to it
                    self._most = max(1, self._most // 2)
                    warnings.warn(
                        f"no memory for {turn.most} images in flight: going on with {self._most}", stacklevel=2
                    )
                return 0
        warnings.warn(f"no memory for {listed.name} alone: halving its batches", stacklevel=2)
        return 1

    def _stop(self) -> None:
        """End what is running, at its next line of Python."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
            for thread in self._running:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stopped))


@dataclass
class _Turn:
    """An image's turn to run."""

    most: int  # how many might run when it began
    shared: bool  # whether another ran meanwhile


def _does_not_fit(*_: object) -> bytes:
    raise InvalidInputError(
        "there is no memory for this image alone, even in batches of 1: prune fewer layers at a time"
    )


class _Stopped(BaseException):
    """Ends the work on an image when a run ends early."""


def _images_in_flight(module: nn.Module, device: torch.device, threads: int) -> int:
    """How many images to work on at a time."""
    needed = bytes_in_flight(prunable_layers(module).values(), 4) + _MAPS_IN_FLIGHT
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return min(_MOST_IN_FLIGHT_ON_GPU, images_that_fit(free, needed))
    most = max(1, torch.get_num_threads() // threads)
    room = free_memory()
    return most if room is None else max(1, min(most, room * 4 // 5 // needed))
