"""The exact solver: eliminating rows against one inverse for each of them; whole traces against the fast solver's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_trace import PHOTO, load

import spade_fast as sf
from spade_fast import ops, reference

ROWS = 32  # of which the published code keeps inverses at a time
CASES = [(512, 1), (1152, 1), (576, 9), (1152, 9)]  # columns, and how many are pruned at once
#: Network, sparsity and views of traces, and their rounds.
TRACES: dict[str, tuple[str, Any, int, int]] = {
    "EfficientNet-Lite0, all layers at 0.8, 256 views": ("real", 0.8, 256, 3),
    "ResNet-50, all layers at 0.9, 64 views": ("ResNet-50", 0.9, 64, 1),
}


def case(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the inverse of a damped Hessian, in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(columns, 2 * columns, generator=generator, dtype=torch.float64)
    hessian = inputs @ inputs.T / columns
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return torch.randn(1, rows, columns, generator=generator, dtype=torch.float64), hessian.inverse()[None]


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("columns", "size"), CASES, ids=lambda value: str(value))
def test_elimination(benchmark, report, measure, columns, size, backend):
    weight, inverse = case(ROWS, columns)
    (order,), (losses,) = ops.elimination_orders([weight[:, :2]], [inverse], [size])
    expected, expected_losses = reference.elimination_order(weight[:, :2], inverse, size)
    assert torch.equal(order, expected)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-8, atol=1e-10)
    weight, inverse = weight.float(), inverse.float()
    report(
        kind="elimination",
        backend=backend,
        layer=f"{ROWS} rows of {columns}, {f'{size} at once' if size > 1 else 'one by one'}",
        networks={},
        flops=ROWS * columns**3 / 3,
        bytes=4 * (3 * ROWS * columns + columns**2),
    )
    benchmark.group = f"elimination {columns}, {size}"
    if backend == "native":
        measure(ops.elimination_orders, [weight], [inverse], [size])
    else:
        benchmark.pedantic(reference.elimination_order, (weight, inverse, size), rounds=1)


@pytest.mark.parametrize("solver", ["fast", "exact"])
@pytest.mark.parametrize("name", TRACES)
def test_trace(benchmark, report, name, solver):
    network, sparsity, views, rounds = TRACES[name]
    net = load(network)
    report(kind="solvers", backend=solver, layer=name, networks={})
    benchmark.group = f"solvers {name}"
    settings = {"num_augmentations": views, "solver": solver, "backend": "native"}
    sf.trace(net, PHOTO, sparsity, **{**settings, "num_augmentations": 2, "solver": "fast"})  # warms up
    found = benchmark.pedantic(sf.trace, (net, PHOTO, sparsity), settings, rounds=rounds)
    losses = [layer.loss for layer in found.layers.values()]
    benchmark.extra_info["loss"] = sum(losses)
    benchmark.extra_info["layers"] = len(losses)


def status(field: str) -> int:
    """Bytes of memory, by a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def classifier_peak() -> int:
    """Bytes that eliminating a classifier of 1000 x 1280 takes at most, its results among them."""
    weight, inverse = torch.randn(1, 1000, 1280), torch.eye(1280)[None]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = status("VmRSS")
    ops.elimination_orders([weight], [inverse], [1])
    return status("VmHWM") - before


def test_memory(benchmark, report):
    report(kind="memory", backend="native", layer="1000 rows of 1280, one by one", networks={})
    command = [sys.executable, __file__]
    peak = benchmark.pedantic(lambda: int(subprocess.check_output(command, text=True)), rounds=1)
    benchmark.extra_info["peak_bytes"] = peak


if __name__ == "__main__":
    print(classifier_peak())
