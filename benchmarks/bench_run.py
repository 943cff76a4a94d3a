"""Many photographs into a store: one by one, several in flight, and by Ray's actors; traces alone, and with maps."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import spade_fast as sf
from spade_fast.heap import share_heap
from spade_fast.methods import DEFAULT_METHODS

#: Photographs of a run, and methods.
CASES = {"traces alone": (24, ()), "traces and maps by three methods": (8, DEFAULT_METHODS)}
THREADS = torch.get_num_threads()
share_heap()  # as `spade-fast run` does


@pytest.fixture(scope="module")
def network() -> sf.LoadedModel:
    return sf.load_model("efficientnet_lite0")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Different parts of photographs that come with scikit-image."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    sources = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    found = []
    for i, source in zip(range(24), itertools.cycle(sources), strict=False):
        top, left = (int(random.integers(0, side - 280)) for side in source.shape[:2])
        found.append(folder / f"{i:02}.png")
        Image.fromarray(source[top : top + 280, left : left + 280]).save(found[-1])
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray, with as many cores as there are threads."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of what it will do one day
        ray.init(num_cpus=THREADS, include_dashboard=False, log_to_driver=False, logging_level="error")
        yield ray
        ray.shutdown()


def by_hand(network: sf.LoadedModel, photographs: list[Path], out: Path, methods: tuple[str, ...]) -> None:
    """What one would write without `run`: image after image by all threads, saved."""
    out.mkdir()
    for path in photographs:
        photo = sf.load_image(path)
        trace = sf.trace(network, photo)
        trace.save(out / f"{path.stem}.safetensors")
        if methods:
            explanation = sf.explain(network, photo, methods=methods, trace=trace)
            for method in methods:
                np.save(out / f"{path.stem}.{method}.npy", explanation.spade[method].numpy())


def variants(network: sf.LoadedModel, methods: tuple[str, ...]) -> dict[str, Callable[[list[Path], Path], Any]]:
    def run(**more: Any) -> Callable[[list[Path], Path], Any]:
        return lambda photographs, out: sf.run(network, photographs, out, methods=methods, **more)

    return {
        "a loop by hand, all threads": lambda photographs, out: by_hand(network, photographs, out, methods),
        "one by one, all threads": run(in_flight=1, threads=THREADS),
        "one by one, one thread": run(in_flight=1),
        "one in flight for each thread": run(in_flight=THREADS),
        "Ray, one worker of one thread": run(ray="auto", workers=1),
        "Ray, a worker for each thread": run(ray="auto", workers=THREADS),
    }


def contents(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("case", CASES)
def test_the_variants_agree(network: sf.LoadedModel, photographs: list[Path], tmp_path: Path, case: str) -> None:
    """Before they are timed: all of one thread an image make the same bits."""
    _, methods = CASES[case]
    stores = {}
    for name, run in variants(network, methods).items():
        if "all threads" not in name:
            run(photographs[:3], tmp_path / name)
            stores[name] = contents(tmp_path / name)
    expected = stores.pop("one by one, one thread")
    assert len(expected) == 5
    assert all(store == expected for store in stores.values())


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("variant", variants(None, ()))  # type: ignore[arg-type]
@pytest.mark.parametrize("case", CASES)
def test_run(benchmark, report, network, photographs, tmp_path, case, variant) -> None:
    count, methods = CASES[case]
    run = variants(network, methods)[variant]
    run(photographs[:1], tmp_path / "warm")
    benchmark.group = f"run {case}"
    summary = benchmark.pedantic(run, (photographs[:count], tmp_path / "out"), rounds=1)
    # Without the start of workers, which takes as long for ten thousand photographs.
    working = None if summary is None else summary.seconds
    report(kind="run", backend=variant, layer=case, images=count, working=working)
