"""`solve` on Hessians that are hard to factor: what comes back satisfies the equations it claims to, up to rounding.

Each ratio is a residual in units of d * eps times the size of what it is made of, d being the number of columns and eps
that of the weight's dtype. LAPACK's own tests want such ratios below 30 (LAPACK Working Note 41).

- The factor, as in xPOT01: ||H + damping * mean(diag H) * I - M^T M||_1 / (d eps ||H||_1).
- The fast solver keeps q_i = w_i + sum_{j < i} M_ij (w_j - q_j) / M_ii (SparseGPT, eq. 4 and 5): of each row
  D = W - Q, (D M^T)_i = 0 for every kept i. The ratio is the componentwise backward error of that system, as in
  xPOT05: |(D M^T)_i| / (d eps ((|W| + |Q|) |M|^T)_i), which no unit of an input changes.
- The reference goes by U with H^-1 = U^T U. As in LAPACK's tests of inverses, xPOT03, the condition counts: with
  E = D U^-1, which is zero for every kept i, |E_i| / (d eps ((|W| + |Q| + |E| |U|) |U^-1|)_i).
- Refitted weights, and those of the exact solver, are the optimum under the mask, q_K = w_K + H_KK^-1 H_KP w_P: with
  the damping of the solution, (D H)_i = 0 for every kept i. A stable solution leaves what follows from
  |H_ij| <= s_i s_j, s_i = sqrt(H_ii): |(D H)_i| / (d eps s_i sum_j (|w_j| + |q_j|) s_j), the same in any unit.

Losses are held against the weights that come back in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import spade_fast as sf
from spade_fast import ops, reference
from spade_fast.reference import count_to_prune
from spade_fast.solver import lower_factors

pytestmark = pytest.mark.skipif("cpu" not in ops.native_devices(), reason="the extension is not built")

LIMIT = 30.0
SHARES = [0.2, 0.8]
ROWS = 5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """With several, torch's own inverses (not the native operators) round differently in another unit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scaled(inputs: Tensor, least: float, largest: float) -> Tensor:
    """Each input in a unit of its own, in no order."""
    units = torch.logspace(math.log10(least), math.log10(largest), len(inputs), dtype=inputs.dtype)
    return inputs * units[torch.arange(len(inputs)) * 7 % len(inputs), None]


def with_likes(inputs: Tensor, difference: float) -> Tensor:
    """Every second input as the one before it, but for a difference."""
    inputs[1::2] = inputs[::2] + difference * inputs[1::2]
    return inputs


# Inputs [d, samples] in float64, made of independent ones.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "well conditioned": lambda inputs: inputs,
    "rank deficient": lambda inputs: inputs[:, : len(inputs) // 4],
    "one sample": lambda inputs: inputs[:, :1],
    "badly scaled": lambda inputs: scaled(inputs, 1e-9, 1e9),
    "beyond float32": lambda inputs: scaled(inputs, 1e-20, 1e20),
    "squares that underflow": lambda inputs: scaled(inputs, 1e-20, 1),
    "duplicated": lambda inputs: with_likes(inputs, 0),
    "dead": lambda inputs: inputs * (torch.arange(len(inputs)) % 5 > 0)[:, None],
    "constant": lambda inputs: inputs.where((torch.arange(len(inputs)) % 3 > 0)[:, None], 3.0),
    "nearly singular": lambda inputs: with_likes(inputs, 1e-6),
    "singular to float32": lambda inputs: with_likes(inputs, 1e-3),
    "far from zero": lambda inputs: inputs.abs() + 100,
}
HELD_BY_FLOAT32 = [kind for kind in KINDS if kind != "beyond float32"]


def hessian_of(kind: str, columns: int, dtype: torch.dtype, unit: float = 1.0) -> Tensor:
    """[d, d], exactly symmetric."""
    generator = torch.Generator().manual_seed(0)
    inputs = KINDS[kind](torch.randn(columns, 3 * columns, dtype=torch.float64, generator=generator))
    hessian = (unit * (inputs @ inputs.T)).to(dtype)
    return hessian.tril() + hessian.tril(-1).T


def weight_of(columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(ROWS, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def factor_ratio(factor: Tensor, hessian: Tensor, damping: float) -> float:
    error = damped(hessian.double(), damping) - factor.double().mT @ factor.double()
    error, size = (torch.linalg.matrix_norm(each, 1) for each in (error, hessian.double()))
    return (error / (len(hessian) * torch.finfo(hessian.dtype).eps * size)).item()


class Equations(NamedTuple):
    """What a solution claims."""

    residual: Tensor  # [rows, d], zero where a weight is kept
    size: Tensor  # [rows, d], of what it is made of
    loss: Tensor
    loss_size: Tensor


def native_fast(change: Tensor, sizes: Tensor, hessian: Tensor, damping: float) -> Equations:
    (lower,) = lower_factors([hessian[None]], damping)
    lower = lower[0].double()
    residual, size = change @ lower.T, sizes @ lower.abs().T
    return Equations(residual, size, residual.square().sum() / 2, size.square().sum())


def reference_fast(change: Tensor, sizes: Tensor, hessian: Tensor, damping: float) -> Equations:
    upper = reference.factor(damped(hessian, damping)[None])[0].double()
    inverse = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=torch.float64), upper=True)
    residual = change @ inverse
    size = (sizes + residual.abs() @ upper.abs()) @ inverse.abs()
    return Equations(residual, size, residual.square().sum() / 2, size.square().sum())


def refitted(change: Tensor, sizes: Tensor, hessian: Tensor, damping: float) -> Equations:
    full = damped(hessian.double(), damping)
    lengths = full.diagonal().sqrt()
    residual, of_row = change @ full, sizes @ lengths
    return Equations(residual, of_row[:, None] * lengths, (residual * change).sum() / 2, of_row.square().sum())


METHODS = {"fast": {}, "fast, refitted": {"refit": True}, "exact": {"solver": "exact"}}


def decoupled(hessian: Tensor) -> Tensor:
    """What is solved: dead inputs touch no other, and leave the mean diagonal as it is."""
    dead = hessian.diagonal() == 0
    found = hessian.masked_fill(dead[:, None] | dead, 0)
    found.diagonal().masked_fill_(dead, hessian.diagonal()[~dead].mean().item())
    return found


def check(
    weight: Tensor, hessian: Tensor, solution: sf.Solution, method: str, backend: str, whole: bool = True
) -> None:
    """All that holds for a solution, whatever the Hessian; the loss where it is that of the `whole` layer."""
    assert solution.weight.dtype == weight.dtype
    assert solution.weight.isfinite().all()
    assert not solution.weight[~solution.mask].any()
    dead = hessian.diagonal() == 0
    assert not solution.mask[:, dead].any()
    equations = refitted if method != "fast" else native_fast if backend == "native" else reference_fast
    weight, sparse = weight.masked_fill(dead, 0), solution.weight.double()
    solved = decoupled(hessian.double() if solution.fallback else hessian)
    found = equations(weight.double() - sparse, weight.double().abs() + sparse.abs(), solved, solution.damping)
    unit = len(hessian) * torch.finfo(weight.dtype).eps
    assert (found.residual.abs() <= LIMIT * unit * found.size)[solution.mask].all()
    if whole:
        assert abs(solution.loss - found.loss) <= LIMIT * unit * found.loss_size
        assert (solution.loss > 0) == bool(weight[~solution.mask].any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.01, 1e-6, 0.0])
@pytest.mark.parametrize("columns", [40, 200])
def test_the_factor_is_that_of_the_damped_hessian(kind, unit, dtype, damping, columns):
    hessian = hessian_of(kind, columns, dtype, unit)
    factor, error = ops.factor_hessian(hessian[None], damping)
    if error.isinf():
        assert damping < 0.01 or hessian.isinf().any()
    else:
        assert error.item() < LIMIT
        assert factor_ratio(factor[0], hessian, damping) < LIMIT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.01, 1e-6, 0.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_kept_weights_satisfy_their_equations(kind, unit, dtype, damping, method, backend):
    columns = 100 if backend == "native" and method != "exact" else 40  # more than the native panels of 96
    weight = weight_of(columns, dtype)
    hessian = hessian_of(kind, columns, dtype, unit)
    if hessian.isinf().any():
        assert dtype == torch.float32
        with pytest.raises(sf.InvalidInputError, match="the Hessian holds NaN or infinite values: some layer input"):
            sf.solve(weight, hessian, SHARES, damping=damping, backend=backend, **METHODS[method])
        return
    solutions = sf.solve(weight, hessian, SHARES, damping=damping, backend=backend, **METHODS[method])
    for share, solution in zip(SHARES, solutions, strict=True):
        check(weight, hessian, solution, method, backend)
        assert solution.damping > damping if solution.fallback == "damping" else solution.damping == damping
        live = hessian.diagonal() > 0
        pruned = (~solution.mask[:, live]).sum(0)
        if method == "exact":
            dead = ROWS * (~live).sum()
            assert pruned.sum() + dead == max(count_to_prune(weight.numel(), share), dead)
        else:
            assert (pruned == count_to_prune(ROWS, share)).all()


@pytest.mark.parametrize("kind", HELD_BY_FLOAT32)
@pytest.mark.parametrize("damping", [0.01, 0.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_group_that_is_hard_beside_one_that_is_not_in_blocks(kind, damping, method, backend):
    weight = torch.cat([weight_of(36, torch.float32), weight_of(36, torch.float32).flip(0)])
    hessians = [hessian_of(kind, 36, torch.float32), hessian_of("well conditioned", 36, torch.float32)]
    settings = {"block_size": 9, "damping": damping, "backend": backend, **METHODS[method]}
    solution = sf.solve(weight, torch.stack(hessians), 0.5, **settings)
    for rows, hessian in zip((slice(0, ROWS), slice(ROWS, None)), hessians, strict=True):
        check(weight[rows], hessian, replace(solution, weight=solution.weight[rows], mask=solution.mask[rows]),
              method, backend, whole=False)  # fmt: skip
    of_blocks = solution.mask.view(2 * ROWS, 4, 9)[ROWS if kind == "dead" else 0 :]
    if method == "exact":
        assert torch.equal(of_blocks.any(2), of_blocks.all(2))
    elif kind != "dead":
        assert (of_blocks.sum((0, 2)) == 2 * ROWS * 9 / 2).all()


FALLBACKS = {  # at damping 0, of float32 and of float64, and at 1e-6, of float32
    "rank deficient": ("damping", "damping", "float64"),
    "one sample": ("damping", "damping", "float64"),
    "duplicated": ("damping", "damping", "float64"),
    "constant": ("damping", "damping", "float64"),
    "nearly singular": ("damping", None, "float64"),
    "singular to float32": ("float64", None, "float64"),
}


@pytest.mark.parametrize("kind", HELD_BY_FLOAT32)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_cannot_be_factored_is_redone_and_told(kind, method, backend):
    expected = FALLBACKS.get(kind, (None, None, None))
    if (kind, method) == ("squares that underflow", "exact"):
        expected = ("float64", None, None)  # inverses are larger than any float32
    weight, hessian = weight_of(40, torch.float64), hessian_of(kind, 40, torch.float64)
    settings = {"backend": backend, **METHODS[method]}
    assert sf.solve(weight, hessian, 0.5, damping=0, **settings).fallback == expected[1]
    weight, hessian = weight.float(), hessian.float()
    for damping, fallback in ((0.0, expected[0]), (1e-6, expected[2]), (0.01, None)):
        found = sf.solve(weight, hessian, 0.5, damping=damping, **settings)
        assert found.fallback == fallback
        if fallback is not None:
            redone = sf.solve(weight.double(), hessian.double(), 0.5, damping=damping, **settings)
            assert torch.equal(found.mask, redone.mask)
            assert torch.equal(found.weight, redone.weight.float())
            assert found.damping == redone.damping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["well conditioned", "far from zero", "dead"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_unit_changes_a_bit(dtype, kind, method, backend):
    # Powers of two, which round nothing: of each input by itself, in float64 1e-20 to 1e20, and of all together.
    most = 66 if dtype == torch.float64 else 15
    units = torch.ldexp(torch.ones(100, dtype=dtype), torch.arange(100) * 37 % (2 * most + 1) - most)
    weight, hessian = weight_of(100, dtype), hessian_of(kind, 100, dtype)
    settings = {"backend": backend, **METHODS[method]}
    plain = sf.solve(weight, hessian, 0.5, damping=0, **settings)
    scaled = sf.solve(weight / units, hessian * units * units[:, None], 0.5, damping=0, **settings)
    assert torch.equal(scaled.mask, plain.mask)
    assert torch.equal(scaled.weight * units, plain.weight)
    plain = sf.solve(weight, hessian, 0.5, **settings)
    for unit in (2.0**-66, 2.0**66):
        scaled = sf.solve(weight, hessian * unit, 0.5, **settings)
        assert torch.equal(scaled.mask, plain.mask)
        assert torch.equal(scaled.weight, plain.weight)
        assert scaled.loss == plain.loss * unit
