"""What every benchmark reports beside its time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from spade_fast import ops


@pytest.fixture(scope="session")
def peak() -> float:
    """The machine's own float32 matrix product, GFLOP/s: the best of ten of [2048, 2048] squared."""
    matrix = torch.randn(2048, 2048)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times) / 1e9


@pytest.fixture(scope="session")
def bandwidth() -> float:
    """Bytes per second, in GB, of a copy of 256 MB, read and written: the best of ten."""
    source, target = torch.ones(2**26), torch.ones(2**26)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * 4 * 2**26 / min(times) / 1e9


@pytest.fixture
def report(benchmark, peak, bandwidth):
    """Keeps figures for benchmarks/report.py, such as the least floating point operations and bytes of the work."""

    def keep(**figures: object) -> None:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "peak_gflops": peak}
        machine |= {"bandwidth": bandwidth, "cpu_capability": ops._C.cpu_capability}
        benchmark.extra_info.update(figures, **machine)

    return keep


@pytest.fixture
def measure(benchmark):
    """Times a function: at least three rounds, and as many as fill a second, since short ones vary the most."""

    def run(function: Callable[..., object], *arguments: object) -> None:
        function(*arguments)
        start = time.perf_counter()
        function(*arguments)
        rounds = max(3, min(100, round(1 / (time.perf_counter() - start))))
        benchmark.pedantic(function, arguments, rounds=rounds)

    return run
