"""Factoring and pruning single layers at 0.8: native against Cholesky, inverse, Cholesky and a loop over columns."""

from __future__ import annotations

import pytest
import torch
from shapes import layers_of

import spade_fast as sf
from spade_fast import ops, reference
from spade_fast.solver import lower_factors

SPARSITY = 0.8
LAYERS = layers_of("ResNet-50")
SHAPES: dict[tuple[int, int, int], int] = {}  # rows, columns, columns that share a threshold: how often
for layer, count in LAYERS.items():
    shape = (layer.outputs, layer.columns, layer.kernel**2)
    SHAPES[shape] = SHAPES.get(shape, 0) + count


def case(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(columns, 2 * columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), (inputs @ inputs.T / columns)[None]


def flops(rows: int, columns: int) -> float:
    return columns**3 / 3 + rows * columns**2


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_columns(benchmark, report, shape, backend):
    rows, columns, block = shape
    weight, hessian = case(rows, columns)
    damped = hessian + 0.01 * hessian.diagonal(dim1=1, dim2=2).mean() * torch.eye(columns)
    factors = {"native": lower_factors([hessian], 0.01)[0], "reference": reference.factor(damped)}
    run = {"native": ops.prune_columns, "reference": reference.prune_columns}
    losses = {name: run[name](weight[None], factors[name], SPARSITY, block, False)[2].item() for name in run}
    assert losses["native"] == pytest.approx(losses["reference"], rel=0.01)
    report(
        kind="columns",
        backend=backend,
        layer=f"{rows} x {columns}, {block} a threshold",
        networks={"ResNet-50": SHAPES[shape]},
        flops=rows * columns**2,
        bytes=4 * (2 * rows * columns + columns**2 / 2),
    )
    benchmark.group = f"columns {shape}"
    arguments = (weight[None], factors[backend], SPARSITY, block, False)
    benchmark.pedantic(run[backend], arguments, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_solve(benchmark, report, shape, backend):
    rows, columns, block = shape
    weight, hessian = case(rows, columns)

    def plain() -> float:
        damped = hessian.clone()
        diagonal = damped.diagonal(dim1=1, dim2=2)
        diagonal.add_(0.01 * diagonal.mean())
        upper = reference.factor(damped)
        return reference.prune_columns(weight[None], upper, SPARSITY, block, False)[2].item()

    def native() -> float:
        return sf.solve(weight, hessian, SPARSITY, block_size=block, backend="native").loss

    assert native() == pytest.approx(plain(), rel=0.01)
    report(
        kind="solve",
        backend=backend,
        layer=f"{rows} x {columns}, {block} a threshold",
        networks={"ResNet-50": SHAPES[shape]},
        flops=flops(rows, columns),
        bytes=4 * (2 * rows * columns + columns**2),
    )
    benchmark.group = f"solve {shape}"
    benchmark.pedantic(plain if backend == "reference" else native, rounds=3, warmup_rounds=1)
