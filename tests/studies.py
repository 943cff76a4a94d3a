"""Small studies for tests: pictures of noise, a server in a process of its own, a client without a browser."""

from __future__ import annotations

import http.client
import io
import json
import multiprocessing
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from spade_fast.models import LoadedModel
from spade_fast.preprocessing import Preprocess

for needed in ("pydantic", "starlette", "uvicorn", "jinja2"):
    pytest.importorskip(needed)

from spade_fast import study  # noqa: E402
from spade_fast.study.bundle import (  # noqa: E402
    STUDY,
    Bundle,
    OpenBundle,
    Patch,
    Task,
    medium_of,
    open_bundle,
    picture_file,
)
from spade_fast.study.journal import ANSWERS  # noqa: E402

# Where processes are forked from one that has imported what they need.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["spade_fast.study"])


def small_network() -> LoadedModel:
    """Two convolutions, and a classifier that says which quarter is brightest, for images of 16 pixels."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    with torch.no_grad():
        for layer in (module[0], module[2]):
            layer.weight.abs_()
        module[6].weight.copy_(torch.eye(4).tile(8) + module[6].weight)
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, input_size=16, resize_size=16)
    return LoadedModel("small", module.eval(), preprocess, ("a", "b", "c", "d"), "random")


def picture(folder: Path, seed: int, side: int = 24) -> str:
    """A picture of noise, unlike that of any other seed."""
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(png, "png")
    medium = medium_of(png.getvalue())
    file = picture_file(folder, medium)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png.getvalue())
    return medium


def task_of(folder: Path, number: int, target: int) -> Task:
    """A task whose trace shows the high patch, and whose dense network shows the low one."""
    high, low = picture(folder, 10 * number), picture(folder, 10 * number + 1)
    place = {"top": 0.1, "width": 0.3, "height": 0.3}
    return Task(
        name=f"{number}.png",
        photo=picture(folder, 10 * number + 2),
        target=target,
        target_name=f"<b>class & {target}</b>",
        probability=0.5,
        high=Patch(medium=high, left=0.05, relevance=0.9, **place),
        low=Patch(medium=low, left=0.6, relevance=0.1, **place),
        dense=low,
        spade=high,
        sparsity=0.7,
        trace_agrees=True,
    )


def study_in(folder: Path, tasks: int = 4, checks: int = 2, seed: int = 0, classes: int = 1000) -> OpenBundle:
    """A bundle in a folder, as `build` would write it, of images of so many classes at most."""
    bundle = Bundle(
        format=1,
        tasks=tuple(task_of(folder, number, number % classes) for number in range(tasks)),
        checks=checks,
        seed=seed,
        settings={"model": "by hand", "weights": "none"},
        versions={},
        refused={},
    )
    (folder / STUDY).write_bytes(bundle.content())
    return open_bundle(folder)


def _serve(folder: Path, pipe: Any, options: dict[str, Any]) -> None:
    study.serve(folder, started=pipe.send, **{"port": 0, **options})


def _serve_in_a_hurry(folder: Path, pipe: Any, options: dict[str, Any]) -> None:
    """A server that waits little more than half a second for requests."""
    study.serving._MOST_SECONDS = 0.6
    _serve(folder, pipe, options)


class Server:
    """A server in a process of its own, that can be killed."""

    def __init__(self, folder: Path, serve: Any = _serve, **options: Any) -> None:
        mine, its = context.Pipe()
        self.process = context.Process(target=serve, args=(folder, its, options))
        self.process.start()
        its.close()
        try:
            if not mine.poll(60):
                raise TimeoutError("the server does not start")
            self.url: str = mine.recv()
        except BaseException:
            self.kill()
            raise
        self.address = re.fullmatch(r"http://(.+)/", self.url).group(1)  # type: ignore[union-attr]

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def served_in_a_hurry(folder: Path) -> Any:
    return served(folder, serve=_serve_in_a_hurry)


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[Server]:
    server = Server(folder, **options)
    try:
        yield server
    finally:
        server.kill()


def ask(
    address: str, method: str, path: str, body: bytes | str = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of what the server answers."""
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        form = {"content-type": "application/x-www-form-urlencoded"} if method == "POST" else {}
        connection.request(method, path, body, {**form, **(headers or {})})
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, answer.read().decode(errors="replace")
    finally:
        connection.close()


def join(address: str) -> str:
    """The address of a new participant's questions."""
    status, headers, _ = ask(address, "POST", "/join")
    assert status == 303
    return headers["location"]


def send(address: str, place: str, question: int, choice: str) -> int:
    """The status that an answer comes back with."""
    return ask(address, "POST", place, urlencode({"question": question, "choice": choice, "milliseconds": 5}))[0]


def asked(address: str, place: str) -> int | None:
    """The number of the question that is shown; None at the end."""
    status, _, text = ask(address, "GET", place)
    assert status == 200
    found = re.search(r'name="question" value="(\d+)"', text)
    assert found or "<h1>Thank you</h1>" in text
    return int(found.group(1)) if found else None


def answers_of(folder: Path) -> list[dict[str, Any]]:
    """The answers in the file, in whole lines."""
    text = (folder / ANSWERS).read_text() if (folder / ANSWERS).exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in lines if line["kind"] == "answer"]
