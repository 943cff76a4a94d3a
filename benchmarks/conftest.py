"""What every benchmark reports beside its time."""

from __future__ import annotations

import time

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


@pytest.fixture
def report(benchmark, peak):
    """Keeps figures for benchmarks/report.py, such as the least floating point operations and bytes of the work."""

    def keep(**figures: object) -> None:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "peak_gflops": peak}
        benchmark.extra_info.update(figures, **machine, cpu_capability=ops._C.cpu_capability)

    return keep
