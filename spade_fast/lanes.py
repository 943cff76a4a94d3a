"""From an image in a list to its file in a store, for several images of one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

import torch

from spade_fast.errors import InvalidInputError, first_line
from spade_fast.images import decoded_image, read_image_file
from spade_fast.imagesets import ListedImage
from spade_fast.interruption import Interrupted, interruptible
from spade_fast.memory import is_out_of_memory
from spade_fast.store import StoreWriter, refusal_bytes
from spade_fast.worker import Worker


class Outcome(NamedTuple):
    """What became of an image.

    Attributes
    ----------
    name
        Of the image.
    made
        Whether its file was made; False where it was there already, and where the image was refused.
    refused
        Why it cannot be used.
    remade
        Why the file that was there could not be kept.
    unexpected
        Whether it was refused for a reason that is no refusal of ours.
    """

    name: str
    made: bool
    refused: str | None = None
    remade: str | None = None
    unexpected: bool = False


Outcomes: TypeAlias = Generator[Outcome, None, None]


@dataclass(frozen=True)
class Task:
    """An image whose file is to be made.

    Attributes
    ----------
    listed
        The image.
    content
        The bytes of its own file.
    known
        What its record begins with.
    remade
        As in :class:`Outcome`.
    """

    listed: ListedImage
    content: bytes = field(repr=False)
    known: Mapping[str, Any]
    remade: str | None = None


class Attempt(NamedTuple):
    """What a worker makes of a task: the content of the image's file, and in how often halved batches.

    If that is a refusal, what it says, and whether for a reason that is none of ours.
    """

    content: bytes
    refused: str | None = None
    unexpected: bool = False
    halvings: int = 0


def task_or_outcome(writer: StoreWriter, listed: ListedImage) -> Task | Outcome:
    """What is to be done about an image: nothing more if its file is there, or if it cannot be read.

    Raises
    ------
    InvalidInputError
        If its refusal cannot be written.
    """
    known, content = writer.known(listed), None
    try:
        content = read_image_file(listed.path)
    except InvalidInputError as error:
        reason = str(error)
    except MemoryError:
        reason = "there is no memory to read it"
    if content is None:
        writer.refuse(listed, refusal_bytes(known, reason))
        return Outcome(listed.name, made=False, refused=reason)
    known["image_sha256"] = hashlib.sha256(content).hexdigest()
    try:
        return (
            Outcome(listed.name, made=False)
            if writer.has(listed, known["image_sha256"])
            else Task(listed, content, known)
        )
    except InvalidInputError as error:
        return Task(listed, content, known, remade=str(error))


def attempt(worker: Worker, task: Task, *, halvings: int = 0) -> Attempt:
    """Have a worker make an image's file, or the refusal that takes its place; torch.OutOfMemoryError goes through."""
    if 2**halvings > worker.largest_batch:
        reason = "there is no memory for this image alone, even in batches of 1: prune fewer layers"
        return Attempt(refusal_bytes(task.known, reason), reason)
    try:
        image = decoded_image(task.content, task.listed.path)
        return Attempt(worker.make(task.listed, image, task.known, halvings=halvings), halvings=halvings)
    except Exception as error:
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        reason = str(error) if isinstance(error, InvalidInputError) else first_line(error)
        # Also a refusal that came of an error which is none, as those of methods that fail do.
        is_ours = isinstance(error, InvalidInputError) and isinstance(error.__cause__, (InvalidInputError, type(None)))
        return Attempt(refusal_bytes(task.known, reason), reason, unexpected=not is_ours)


def written(writer: StoreWriter, task: Task, done: Attempt) -> Outcome:
    """Write what was made of a task; InvalidInputError if that fails, as it then would for any other."""
    if done.refused is not None:
        writer.refuse(task.listed, done.content, task.known["image_sha256"])
        return Outcome(task.listed.name, made=False, refused=done.refused, unexpected=done.unexpected)
    writer.put(task.listed, done.content)
    return Outcome(task.listed.name, made=True, remade=task.remade)


class Room:
    """Says how many images may be worked on at a time in this process: fewer, once memory has run out.

    Parameters
    ----------
    most
        How many, to begin with.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._running: list[_Turn] = []

    def attempt(self, worker: Worker, task: Task) -> Attempt:
        """:func:`attempt` once there is room: with less company where memory runs out, then in smaller batches."""
        halvings = 0
        while True:
            with self.turn() as turn:
                try:
                    with interruptible(self._stop):
                        return attempt(worker, task, halvings=halvings)
                except torch.OutOfMemoryError:
                    alone = not self._let_fewer_run(turn)
            if alone:
                halvings += 1
                warnings.warn(f"no memory for {task.listed.name} alone: halving its batches", stacklevel=2)
            torch.cuda.empty_cache()  # here, where the error no longer holds on to tensors

    @contextlib.contextmanager
    def turn(self) -> Iterator[_Turn]:
        """A turn, once fewer are running than may."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or len(self._running) < self._most)
            if self._stop.is_set():
                raise Interrupted
            turn = _Turn(self._most, shared=bool(self._running))
            for other in self._running:
                other.shared = True
            self._running.append(turn)
        try:
            yield turn
        finally:
            with self._changed:
                self._running.remove(turn)
                self._changed.notify_all()

    def close(self) -> None:
        """Let nothing begin any more, and end what is running at its next checkpoint."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()

    def _let_fewer_run(self, turn: _Turn) -> bool:
        """Let fewer images run at a time from now on, if this one had company."""
        with self._changed:
            if turn.shared and self._most == turn.most:  # or another has seen to it
                self._most = max(1, self._most // 2)
                warnings.warn(f"no memory for {turn.most} images in flight: going on with {self._most}", stacklevel=2)
            return turn.shared


@dataclass(eq=False)
class _Turn:
    """An image's turn to run.

    Attributes
    ----------
    most
        How many might run when it began.
    shared
        Whether another has run meanwhile.
    """

    most: int
    shared: bool


class Lanes:
    """Works on several images of this process at a time, from decoding to writing, by a thread and a worker each.

    So one image is read while the views of another go through the network and the layers of a third are pruned.
    """

    def __init__(self, writer: StoreWriter, workers: Sequence[Worker]) -> None:
        self._writer = writer
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in workers:
            self._idle.put(worker)
        self._count = len(workers)
        self._room = Room(len(workers))

    def outcomes(self, images: Sequence[ListedImage]) -> Outcomes:
        """What becomes of the images, as they are done."""
        if self._count == 1:
            yield from map(self._outcome, images)
            return
        with ThreadPoolExecutor(self._count, thread_name_prefix="image") as pool:
            try:
                for done in as_completed([pool.submit(self._outcome, listed) for listed in images]):
                    yield done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._room.close()

    def _outcome(self, listed: ListedImage) -> Outcome:
        task = task_or_outcome(self._writer, listed)
        if isinstance(task, Outcome):
            return task
        worker = self._idle.get()
        try:
            return written(self._writer, task, self._room.attempt(worker, task))
        finally:
            self._idle.put(worker)
