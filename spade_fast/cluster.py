"""The images of a run on several processes and machines: actors of Ray, or the ranks of torchrun."""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
import os
import socket
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn

from spade_fast.errors import InvalidInputError, check_whole, first_line, require
from spade_fast.imagesets import ListedImage
from spade_fast.lanes import Attempt, Outcomes, Room, Task, task_or_outcome, written
from spade_fast.models import LoadedModel, bare_module
from spade_fast.store import StoreWriter, refusal_bytes
from spade_fast.worker import Recipe, Worker

_Result = TypeVar("_Result")

# How often Ray gives an image to another actor when one has died, before it counts as failed.
_RETRIES = 3
# Seconds until work begins with the workers that there are.
_WAIT = 60.0
# Seconds until a cluster must have answered.
_PATIENCE_AT_DOOR = 20.0
# Numbers of the runs that this process shared with others.
_runs = itertools.count()
# The slowest rank may take that much longer than the first.
_PATIENCE = datetime.timedelta(days=30)


class Actors:
    """Workers in processes of their own, which Ray starts, places and starts again when they die.

    Parameters
    ----------
    recipe
        What they do. Every actor has its own copy of the network.
    address
        Of a cluster that runs; "auto" for the one that runs here, and for one on this machine where none does.
    count
        How many. Default: as many as the cluster has GPUs, or groups of `threads` cores.
    on_gpu
        Whether each has a GPU.

    Raises
    ------
    InvalidInputError
        If there is no such cluster, or it has no room for one actor.
    MissingDependencyError
        If Ray is not installed.
    """

    def __init__(self, recipe: Recipe, address: str, count: int | None = None, *, on_gpu: bool = False) -> None:
        self._ray = require("ray", "scale")
        self._on_gpu = on_gpu
        self._recipe = _on_cpu(recipe)
        self._recipes: list[Any] = []  # one, in Ray's keeping
        self._address = address
        self._count = None if count is None else check_whole("workers", count, 1)
        with self._refused():
            self._knock()

    @contextlib.contextmanager
    def started(self) -> Iterator[list[Any]]:
        """The actors, until the block is left."""
        with self._connected():
            ray, threads = self._ray, self._recipe.threads
            resources = {"num_gpus": 1} if self._on_gpu else {"num_cpus": threads}
            kind, needed = ("GPU", 1) if self._on_gpu else ("CPU", threads)
            room = sum(int(node["Resources"].get(kind, 0)) // needed for node in ray.nodes() if node["Alive"])
            if not room:
                raise InvalidInputError(f"no node of the Ray cluster has {needed} {kind}s, as each worker is to have")
            self._recipes = [ray.put(self._recipe)]
            # Where this process finds modules, a network's own among them, an actor is to find them too.
            found_in = os.pathsep.join(os.path.abspath(each) for each in sys.path if os.path.isdir(each or "."))
            environment = {"env_vars": {"PYTHONPATH": found_in}}
            remote = ray.remote(**resources, max_restarts=-1, max_task_retries=_RETRIES, runtime_env=environment)(
                _Actor
            )
            actors = [remote.remote(self._on_gpu) for _ in range(min(self._count or room, room))]
            try:
                ready = [actor.get_ready.remote(self._recipes) for actor in actors]
                if not ray.wait(ready, num_returns=len(ready), timeout=_WAIT)[0]:
                    warnings.warn("Ray has no room for a worker yet: waiting for it", stacklevel=2)
                yield actors
            finally:
                for actor in actors:
                    with contextlib.suppress(Exception):  # the cluster may be what failed
                        ray.kill(actor)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        ray = self._ray
        if ray.is_initialized():
            connected = ray.get_runtime_context().gcs_address
            if self._address not in ("auto", connected):
                raise InvalidInputError(
                    f"this process is connected to the Ray cluster at {connected}, not {self._address!r}: pass 'auto', "
                    "or end that connection (ray.shutdown())"
                )
            yield
            return
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        with self._refused():
            try:
                ray.init(address=self._address, **options)
            except ConnectionError:
                if self._address != "auto":
                    raise
                ray.init(address="local", include_dashboard=False, **options)
        try:
            yield
        finally:
            ray.shutdown()

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise InvalidInputError(
                f"no Ray cluster can be reached at {self._address!r} ({error}): pass the address that `ray start` gave"
            ) from error

    def _knock(self) -> None:
        """OSError or ValueError where nobody answers at the address, as Ray would try it again for many minutes."""
        scheme, _, place = self._address.rpartition("://")
        if place in ("auto", "local") or scheme not in ("", "ray"):
            return
        host, _, port = place.rpartition(":")
        if not (host and port.isdecimal()):
            raise ValueError("it is no HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_AT_DOOR).close()

    def outcomes(self, actors: Sequence[Any], writer: StoreWriter, images: Sequence[ListedImage]) -> Outcomes:
        """What becomes of the images, as they are done. This process reads, verifies and writes all files."""
        ray = self._ray
        running: dict[Any, tuple[Any, Task | None]] = {
            actor.get_ready.remote(self._recipes): (actor, None) for actor in actors
        }
        idle: list[Any] = []
        done: list[tuple[Task, Attempt]] = []
        unread = deque(images)
        next_one: Task | None = None
        while True:  # whatever keeps the actors busy comes first
            if next_one is not None and idle:
                actor = idle.pop()
                running[actor.attempt.remote(self._recipes, next_one)] = actor, next_one
                next_one = None
            elif done:
                yield written(writer, *done.pop())
            elif next_one is None and unread:
                found = task_or_outcome(writer, unread.popleft())
                if isinstance(found, Task):
                    next_one = found
                else:
                    yield found
            elif next_one is not None or any(task for _, task in running.values()):
                answers, _ = ray.wait(list(running))
                for answer in answers:
                    actor, task = running.pop(answer)
                    idle.append(actor)
                    if task is None:
                        self._check_ready(answer)
                    else:
                        result = self._result(answer, task)
                        done.append((task, result))
                        if result.halvings:
                            times = f"halved {result.halvings} times"
                            warnings.warn(f"no memory for {task.listed.name} alone: its batches {times}", stacklevel=2)
            else:
                return

    def _check_ready(self, answer: Any) -> None:
        try:
            self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            raise InvalidInputError(f"a worker cannot be started by Ray ({error})") from error

    def _result(self, answer: Any, task: Task) -> Attempt:
        try:
            result: Attempt = self._ray.get(answer)
            return result
        except self._ray.exceptions.RayActorError:
            reason = f"the process that worked on it died, {_RETRIES + 1} times"
        except self._ray.exceptions.RayError as error:
            reason = first_line(error)
        return Attempt(refusal_bytes(task.known, reason), reason, unexpected=True)


class _Actor:
    """A worker in a process of its own.

    It is told what to do with each image, in a list, which Ray passes as it is: started again, it begins anew.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._device = "cuda" if on_gpu else None
        self._worker: Worker | None = None

    def get_ready(self, recipes: Sequence[Any]) -> None:
        """Have a worker."""
        if self._worker is None:
            (recipe,) = require("ray", "scale").get(list(recipes))
            self._worker = Worker(recipe, device=self._device)

    def attempt(self, recipes: Sequence[Any], task: Task) -> Attempt:
        """What the worker makes of a task."""
        self.get_ready(recipes)
        assert self._worker is not None
        return Room(1).attempt(self._worker, task)


def _on_cpu(recipe: Recipe) -> Recipe:
    module = bare_module(recipe.model)
    if next(module.parameters()).device.type == "cpu":
        return recipe
    module = copy.deepcopy(module).cpu()
    model = recipe.model
    return replace(recipe, model=replace(model, module=module) if isinstance(model, LoadedModel) else module)


def gpu_of_rank() -> str:
    """The GPU of a process that torchrun started, among those that it sees."""
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % max(1, torch.cuda.device_count())}"


class Ranks:
    """The processes that torchrun started, of which each takes its share of the images; or this one alone.

    The first one holds the store and writes the index. If one of them fails, torchrun ends them all.

    Raises
    ------
    InvalidInputError
        If it is to be `distributed`, and torchrun did not start this process.
    """

    def __init__(self, *, distributed: bool) -> None:
        self.rank, self.count, self.count_here = 0, 1, 1
        self._is_ours = distributed and not dist.is_initialized()
        if self._is_ours and not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise InvalidInputError(
                "distributed= is for processes that torchrun started: leave it out, or start them so"
            )
        if self._is_ours:
            store, rank, count = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            # Names of its own for each run: a second group would look for the first one's sockets.
            own = dist.PrefixStore(f"spade_fast {next(_runs)}", store)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=own, rank=rank, world_size=count, timeout=_PATIENCE)
        if distributed:
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            self.count_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def close(self) -> None:
        """End the group of processes, if it was begun here."""
        if self._is_ours:
            dist.destroy_process_group()

    def device(self, device: torch.device | str | None, module: nn.Module) -> torch.device | str | None:
        """The GPU of this process, where any will do: for "cuda", and where the network is on one and none is named."""
        is_on_gpu = next(module.parameters()).device.type == "cuda"
        if self.count > 1 and (str(device) == "cuda" or (device is None and is_on_gpu)):
            return gpu_of_rank()
        return device

    def share(self, images: Sequence[ListedImage]) -> Sequence[ListedImage]:
        """This process's images."""
        return images[self.rank :: self.count]

    def first(self, do: Callable[[], _Result]) -> _Result | None:
        """Have the first process do something before the others go on; if it is refused, it is to all of them."""
        if self.count == 1:
            return do()
        result: _Result | None = None
        told: list[str | None] = [None]
        if self.rank == 0:
            try:
                result = do()
            except InvalidInputError as error:
                told = [str(error)]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise InvalidInputError(told[0])
        return result

    def gathered(self, mine: _Result) -> list[_Result]:
        """What each process has, to all of them."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine)
        return found
