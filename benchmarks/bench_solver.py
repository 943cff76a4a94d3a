"""Factoring and pruning single layers at 0.8: native against Cholesky, inverse, Cholesky and a loop over columns."""

from __future__ import annotations

import pytest
import torch
from shapes import layers_of

import spade_fast as sf
from spade_fast import ops, reference
from spade_fast.solver import Problem, Target, lower_factors, solve_layers

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


def plain_loss(weight: torch.Tensor, hessian: torch.Tensor, block: int) -> float:
    damped = hessian.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal.add_(0.01 * diagonal.mean())
    upper = reference.factor(damped)
    return reference.prune_columns(weight[None], upper, SPARSITY, block, False)[2].item()


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_columns(benchmark, report, measure, shape, backend):
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
    measure(run[backend], *arguments)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_solve(benchmark, report, measure, shape, backend):
    rows, columns, block = shape
    weight, hessian = case(rows, columns)

    def native() -> float:
        return sf.solve(weight, hessian, SPARSITY, block_size=block, backend="native").loss

    def plain() -> float:
        return plain_loss(weight, hessian, block)

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
    measure(plain if backend == "reference" else native)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_solve_side_by_side(benchmark, report, measure, backend):
    problems = []
    for (rows, columns, block), count in SHAPES.items():
        problems += [Problem(*case(rows, columns), (Target(SPARSITY, block),))] * count

    def native() -> list[float]:
        return [solution.loss for (solution,) in solve_layers(problems, backend="native")]

    def plain() -> list[float]:
        return [plain_loss(problem.weight, problem.hessian, problem.targets[0].block_size) for problem in problems]

    if backend == "native":
        for problem, loss in zip(problems[::10], native()[::10], strict=True):
            expected = plain_loss(problem.weight, problem.hessian, problem.targets[0].block_size)
            assert loss == pytest.approx(expected, rel=0.01)
    report(
        kind="network",
        backend=backend,
        layer="ResNet-50, its 53 layers side by side",
        networks={},
        flops=sum(count * flops(rows, columns) for (rows, columns, _), count in SHAPES.items()),
        bytes=sum(count * 4 * (2 * rows * columns + columns**2) for (rows, columns, _), count in SHAPES.items()),
    )
    benchmark.group = "solve a network"
    measure(plain if backend == "reference" else native)
