"""Runs in several processes: the same store as by one, whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from subjects import photographs, quarters
from test_running import QUICK, contents
from torch import Tensor

import spade_fast as sf
from spade_fast import cluster
from spade_fast.errors import InvalidInputError, MissingDependencyError
from spade_fast.methods import _METHODS, Method, Question

pytest.importorskip("pyarrow")
pytest.importorskip("captum")
pytestmark = pytest.mark.filterwarnings("ignore:.*have no weight left")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten photographs and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    photographs(folder, 10)
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


def run(images: Any, out: Path, **more: Any) -> Any:
    return sf.run(quarters(), images, out, 0.5, **{"methods": ("saliency", "lrp"), **QUICK, **more})


# Ray


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of two cores on this machine."""
    found = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of what it will do one day
        found.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        yield found
        found.shutdown()


def test_two_actors_make_the_same_store_as_one_process(ray: Any, images: Path, tmp_path: Path) -> None:
    summary = run(images, tmp_path / "ray", ray="auto", workers=2, metrics=("insertion",), steps=4)
    assert (summary.images, summary.made, list(summary.refused)) == (11, 10, ["broken.png"])
    run(images, tmp_path / "own", in_flight=1, metrics=("insertion",), steps=4)
    assert contents(tmp_path / "ray") == contents(tmp_path / "own")
    assert run(images, tmp_path / "ray", ray="auto", workers=1, metrics=("insertion",), steps=4).kept == 10
    assert ray.is_initialized()  # as the cluster is the caller's


def dies(question: Question, flag: Path | None) -> Tensor:
    """Kills its process at the image of class 3: once, where there is a flag to put up."""
    if question.target == 3 and (flag is None or not flag.exists()):
        if flag is not None:
            flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.ones(question.inputs.shape[2:])[None, None]


@pytest.fixture
def method(request: pytest.FixtureRequest) -> Iterator[None]:
    """Adds a method that is unknown to processes that start later."""
    flag = request.getfixturevalue("tmp_path") / "flag" if request.param == "once" else None
    _METHODS["dies"] = Method("dies", lambda question: dies(question, flag))
    yield
    del _METHODS["dies"]


@pytest.mark.parametrize("method", ["once"], indirect=True)
@pytest.mark.usefixtures("method")
def test_an_actor_that_is_killed_is_started_again_and_nothing_is_lost(ray: Any, images: Path, tmp_path: Path) -> None:
    assert ray.is_initialized()
    summary = run(images, tmp_path / "ray", ray="auto", methods=("dies",))
    assert (tmp_path / "flag").exists()
    assert (summary.made, list(summary.refused)) == (10, ["broken.png"])
    run(images, tmp_path / "own", in_flight=1, methods=("dies",))  # where the flag is up
    assert contents(tmp_path / "ray") == contents(tmp_path / "own")


@pytest.mark.parametrize("method", ["always"], indirect=True)
@pytest.mark.usefixtures("method")
def test_an_image_that_kills_every_actor_is_recorded_and_the_others_are_made(
    ray: Any, images: Path, tmp_path: Path
) -> None:
    assert ray.is_initialized()
    summary = run([images / f"0{i}.png" for i in range(4)], tmp_path / "ray", ray="auto", methods=("dies",))
    assert summary.made == 3
    (name,) = summary.refused
    assert name.endswith("03.png")
    assert summary.refused[name] == "the process that worked on it died, 4 times"


def test_what_ray_cannot_give(ray: Any, images: Path, tmp_path: Path) -> None:
    assert ray.is_initialized()
    with pytest.raises(InvalidInputError, match="no node of the Ray cluster has 3 CPUs, as each worker is to have"):
        run(images, tmp_path / "out", ray="auto", threads=3)
    assert not (tmp_path / "out").exists()
    with socket.create_server(("127.0.0.1", 0)) as other:  # somebody answers there
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InvalidInputError, match=f"is connected to the Ray cluster at .*, not '{address}'"):
            run(images, tmp_path / "third", ray=address)
    for address, why in (("127.0.0.1:1", "refused"), ("here", "it is no HOST:PORT"), ("ray://host:x", "HOST:PORT")):
        with pytest.raises(
            InvalidInputError, match=f"no Ray cluster can be reached at '{address}' .*{why}.*`ray start`"
        ):
            run(images, tmp_path / "other", ray=address)
    with pytest.raises(InvalidInputError, match="workers must be a whole number of at least 1, got 0"):
        run(images, tmp_path / "other", ray="auto", workers=0)
    assert not (tmp_path / "other").exists()


def test_a_cluster_of_ones_own_is_started_and_ended(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script = (
        "import sys, ray, spade_fast as sf\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from subjects import quarters\n"
        "arguments = dict(methods=('saliency', 'lrp'), num_augmentations=4, ray=sys.argv[4])\n"
        "print(sf.run(quarters(), sys.argv[2], sys.argv[3], 0.5, **arguments).made, ray.is_initialized())\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(images), str(tmp_path / "ray")]
    done = subprocess.run([*command, "auto"], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "10 False\n"
    run(images, tmp_path / "own", in_flight=1)
    assert contents(tmp_path / "ray") == contents(tmp_path / "own")
    failed = subprocess.run([*command, "127.0.0.1:1"], capture_output=True, text=True, check=False, timeout=300)
    assert "no Ray cluster can be reached at '127.0.0.1:1'" in failed.stderr


def test_ray_is_asked_for_where_it_is_missing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'spade-fast\[scale\]'"):
        run(images, tmp_path / "out", ray="auto")


# torchrun


SHARE = r"""
import sys
sys.path.insert(0, sys.argv[1])
from subjects import quarters
import torch, spade_fast as sf
torch.set_num_threads(1)
more = dict(methods=("saliency", "lrp"), num_augmentations=4, distributed=True)
summary = sf.run(quarters(), sys.argv[2], sys.argv[3], 0.5, **more)
again = sf.run(quarters(), sys.argv[2], sys.argv[3], 0.5, **more)
assert (again.made, again.kept) == (0, summary.made)
sys.stdout.write(f"made {summary.made} kept {summary.kept} of {summary.images} {list(summary.refused)}\n")
"""


def torchrun(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    path = Path(arguments[-1]) / "script.py"
    path.write_text(script)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path, Path(__file__).parent]
    return subprocess.run(
        [sys.executable, *map(str, (*command, *arguments[:-1]))],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without distributed")
def test_two_ranks_make_the_same_store_as_one_process(images: Path, tmp_path: Path) -> None:
    done = torchrun(SHARE, images, tmp_path / "ranks", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["made 10 kept 0 of 11 ['broken.png']"] * 2
    run(images, tmp_path / "own", in_flight=1)
    assert contents(tmp_path / "ranks") == contents(tmp_path / "own")
    (tmp_path / "no store").mkdir()
    (tmp_path / "no store" / "thesis.tex").touch()
    refused = torchrun(SHARE, images, tmp_path / "no store", tmp_path)
    assert refused.returncode != 0
    assert refused.stderr.count("InvalidInputError: '") >= 2  # to both
    assert "is no store, but holds 'thesis.tex'" in refused.stderr


def test_a_rank_takes_its_share_and_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = cluster.Ranks(distributed=False)
    module = torch.nn.Linear(1, 1)
    assert [ranks.device(each, module) for each in ("cuda", "cpu", None)] == ["cuda", "cpu", None]
    assert ranks.share([1, 2]) == [1, 2]  # type: ignore[list-item]
    ranks.rank, ranks.count = 1, 3
    assert ranks.share(list(range(8))) == [1, 4, 7]  # type: ignore[arg-type]
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [ranks.device(each, module) for each in ("cuda", "cuda:0", "cpu", None)] == ["cuda:2", "cuda:0", "cpu", None]
    on_gpu = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda", 0))]))
    assert [ranks.device(each, on_gpu) for each in (None, "cpu")] == ["cuda:2", "cpu"]  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each process is shown its own
    assert ranks.device("cuda", module) == "cuda:0"
