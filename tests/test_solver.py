"""`solve`: damping, fallbacks, counts, and its agreement with the reference layer by layer."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subjects import objective
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spade_fast as sf
from spade_fast import reference, refit, solver
from spade_fast.layers import mask_block_size
from spade_fast.reference import count_to_prune
from spade_fast.refit import refit_kept
from spade_fast.solver import Problem, Target, lower_factors, solve_layers

LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (50, 24)),
    "linear on tokens": (lambda: nn.Linear(24, 10), (4, 17, 24)),
    "1x1": (lambda: nn.Conv2d(12, 8, 1), (2, 12, 6, 6)),
    "3x3": (lambda: nn.Conv2d(5, 8, 3, padding=1), (2, 5, 9, 9)),
    "strided": (lambda: nn.Conv2d(5, 8, 3, stride=2, padding=1), (3, 5, 11, 10)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), (2, 4, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (3, 6, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 7, 7)),
}


def layer_and_hessian(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer = make().to(dtype)
    return layer.weight.detach(), sf.hessian(layer, torch.randn(shape, dtype=dtype)), mask_block_size(layer.weight)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mask_rule", ["exact_count", "published"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 1.0])
def test_float64_equals_reference(name, mask_rule, sparsity):
    weight, hessian, block_size = layer_and_hessian(name, torch.float64)
    settings = {"block_size": block_size, "mask_rule": mask_rule}
    native = sf.solve(weight, hessian, sparsity, backend="native", **settings)
    plain = sf.solve(weight, hessian, sparsity, backend="reference", **settings)
    assert torch.equal(native.mask, plain.mask)
    torch.testing.assert_close(native.weight, plain.weight, rtol=0, atol=1e-10)
    assert native.loss == pytest.approx(plain.loss, rel=1e-10)
    assert native.damping == 0.01
    assert native.fallback is None
    assert not native.weight[~native.mask].any()


@pytest.mark.parametrize("name", ["linear", "1x1", "3x3", "strided", "dilated"])
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_hessian_and_solve_equal_the_published_procedure_on_the_inputs(name, sparsity):
    torch.manual_seed(2)
    make, shape = LAYERS[name]
    layer, inputs = make().double(), torch.randn(shape, dtype=torch.float64)
    batches = [
        batch.T if batch.dim() == 2
        else F.unfold(batch, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(0, 1).flatten(1)
        for batch in inputs.split(1 if inputs.dim() == 4 else 20)
    ]  # fmt: skip
    block_size = mask_block_size(layer.weight)
    weight = layer.weight.detach()
    sparse, mask, loss = reference.prune_layer(weight.flatten(1), batches, sparsity, block_size=block_size)
    solution = sf.solve(weight, sf.hessian(layer, inputs), sparsity, block_size=block_size, mask_rule="published")
    assert torch.equal(solution.mask.flatten(1), mask)
    torch.testing.assert_close(solution.weight.flatten(1), sparse, rtol=0, atol=1e-10)
    assert solution.loss == pytest.approx(loss.item(), rel=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_float32_reaches_the_objective_of_the_reference(name, record_property):
    weight, hessian, block_size = layer_and_hessian(name, torch.float32)
    exact = sf.solve(weight.double(), hessian.double(), 0.5, block_size=block_size, backend="reference")
    native = sf.solve(weight, hessian, 0.5, block_size=block_size)
    damped = hessian + 0.01 * torch.diag_embed(
        hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None].expand(hessian.shape[:2])
    )
    reached, wanted = (objective(weight, s.weight, damped) for s in (native, exact))
    assert reached == pytest.approx(wanted, rel=1e-3)
    assert native.loss == pytest.approx(reached / 2, rel=1e-3)
    agreement = (native.mask == exact.mask).double().mean().item()
    record_property("mask agreement", agreement)
    assert agreement > 0.97


@pytest.mark.parametrize("rows", [1, 3, 10, 33])
@pytest.mark.parametrize("block_size", [1, 4, 7])
@pytest.mark.parametrize("sparsity", [0.01, 0.25, 0.5, 0.7, 0.99])
def test_every_block_loses_exactly_the_count_asked_for(rows, block_size, sparsity):
    weight = torch.randn(rows, 20)
    inputs = torch.randn(20, 90)
    solution = sf.solve(weight, inputs @ inputs.T, sparsity, block_size=block_size)
    for block in solution.mask.split(block_size, dim=1):
        assert (~block).count_nonzero().item() == count_to_prune(block.numel(), sparsity)


def test_count_rounds_half_up():
    assert [count_to_prune(n, 0.5) for n in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert count_to_prune(10, 0.0) == 0
    assert count_to_prune(10, 1.0) == 10


def test_sparsity_zero_returns_the_weight_bit_for_bit():
    weight = torch.tensor([[1.0, -0.0, 3.0], [4.0, 5.0, -6.0]])
    solution = sf.solve(weight, torch.full((3, 3), math.nan), 0)  # the Hessian is not even looked at
    assert torch.equal(solution.weight.view(torch.int32), weight.view(torch.int32))
    assert solution.weight.data_ptr() != weight.data_ptr()
    assert solution.mask.all()
    assert solution.loss == 0


def test_sparsity_one_returns_zeros_and_the_whole_loss():
    weight, hessian, block_size = layer_and_hessian("3x3", torch.float64)
    solution = sf.solve(weight, hessian, 1, block_size=block_size, damping=0)
    assert not solution.weight.any()
    assert not solution.mask.any()
    assert solution.loss == pytest.approx(objective(weight, torch.zeros_like(weight), hessian) / 2)


def test_loss_is_the_mean_squared_error_of_the_outputs():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(12, 5, bias=False).double(), torch.randn(40, 12, dtype=torch.float64)
    solution = sf.solve(layer.weight, sf.hessian(layer, inputs), 0.5, damping=0)
    error = layer(inputs) - inputs @ solution.weight.T
    assert solution.loss == pytest.approx((error**2).sum(dim=1).mean().item())


def test_compensation_beats_magnitude_pruning():
    torch.manual_seed(0)
    inputs = torch.randn(400, 32) @ torch.randn(32, 32)
    layer = nn.Linear(32, 16)
    hessian = sf.hessian(layer, inputs)
    solution = sf.solve(layer.weight, hessian, 0.5)
    weight = layer.weight.detach()
    magnitude = weight * (weight.abs() > weight.abs().flatten().kthvalue(weight.numel() // 2).values)
    assert objective(weight, solution.weight, hessian) < objective(weight, magnitude, hessian)


def test_dead_inputs_get_zero_weights():
    weight = torch.randn(6, 5, dtype=torch.float64)
    inputs = torch.randn(5, 40, dtype=torch.float64)
    inputs[2] = 0
    native, plain = (sf.solve(weight, inputs @ inputs.T, 0.5, backend=b) for b in ("native", "reference"))
    assert not native.weight[:, 2].any()
    assert not native.mask[:, 2].any()
    assert [native.mask[:, i].count_nonzero() for i in (0, 1, 3, 4)] == [3] * 4
    torch.testing.assert_close(native.weight, plain.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e6])
def test_dead_inputs_change_nothing_for_the_others_in_any_unit(scale):
    weight = torch.randn(6, 5, dtype=torch.float64)
    inputs = scale * torch.randn(5, 40, dtype=torch.float64)
    live = sf.solve(weight, inputs @ inputs.T, 0.5)
    padded = torch.cat([inputs, torch.zeros(3, 40, dtype=torch.float64)])
    with_dead = sf.solve(torch.cat([weight, torch.ones(6, 3).double()], 1), padded @ padded.T, 0.5)
    assert torch.equal(with_dead.mask[:, :5], live.mask)
    torch.testing.assert_close(with_dead.weight[:, :5], live.weight, rtol=1e-12, atol=0)
    unscaled = sf.solve(weight, (inputs / scale) @ (inputs / scale).T, 0.5)
    assert torch.equal(unscaled.mask, live.mask)


def test_a_layer_without_any_input_becomes_zero():
    solution = sf.solve(torch.randn(4, 3), torch.zeros(3, 3), 0.5)
    assert not solution.weight.any()
    assert solution.loss == 0


def test_groups_share_one_threshold():
    weight = torch.tensor([[0.1], [0.2], [5.0], [6.0]])
    solution = sf.solve(weight, torch.ones(2, 1, 1), 0.5)
    assert solution.mask[:, 0].tolist() == [False, False, True, True]


def integer_hessian() -> Tensor:
    """H = L L^T for a unit lower triangular L of small integers: exact in float32, and close to singular."""
    generator = torch.Generator().manual_seed(0)
    lower = torch.randint(-9, 10, (8, 8), generator=generator).tril(-1).double() + torch.eye(8).double()
    hessian = lower @ lower.T
    assert torch.equal(hessian, hessian.float().double())
    return hessian


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_float32_cannot_factor_is_redone_in_float64(backend):
    hessian, weight = integer_hessian(), torch.randn(4, 8)
    assert lower_factors([hessian.float()[None]], 0.0) == [None]
    solution = sf.solve(weight, hessian.float(), 0.5, damping=0, backend=backend)
    exact = sf.solve(weight.double(), hessian, 0.5, damping=0, backend=backend)
    assert (solution.fallback, solution.damping) == ("float64", 0)
    assert (exact.fallback, exact.damping) == (None, 0)
    assert torch.equal(solution.mask, exact.mask)
    assert torch.equal(solution.weight, exact.weight.float())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_is_raised_only_as_the_last_resort_and_reported(backend, dtype):
    inputs = torch.randn(20, 400, dtype=dtype).repeat(2, 1)  # every input twice: singular at any precision
    solution = sf.solve(torch.randn(8, 40, dtype=dtype), inputs @ inputs.T, 0.5, damping=0, backend=backend)
    assert solution.fallback == "damping"
    assert 0 < solution.damping <= 1e-3
    assert solution.weight.isfinite().all()
    assert solution.weight.dtype == dtype


def test_damping_is_raised_tenfold_until_it_does():
    # Smallest eigenvalue -0.5 % of the mean diagonal: 0.1 % does not do, 1 % does.
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0])).double()
    hessian[0, 1] = hessian[1, 0] = 1.005
    solution = sf.solve(torch.randn(4, 3).double(), hessian, 0.5, damping=1e-3)
    assert (solution.fallback, solution.damping) == ("damping", pytest.approx(1e-2))


def test_damping_of_one_is_the_last_that_is_tried():
    hessian = torch.tensor([[1.0, 1.5], [1.5, 1.0]]).double()  # smallest eigenvalue -0.5
    solution = sf.solve(torch.randn(4, 2).double(), hessian, 0.5, damping=0.3)
    assert (solution.fallback, solution.damping) == ("damping", 1)
    hessian[0, 1] = hessian[1, 0] = 2.5
    with pytest.raises(sf.InvalidInputError, match="with damping up to 1: it is not positive semidefinite"):
        sf.solve(torch.randn(4, 2).double(), hessian, 0.5, damping=0.3)


def test_an_inaccurate_factor_is_not_used():
    inputs = torch.randn(30, 90)
    hessian = (inputs @ inputs.T)[None]
    assert lower_factors([hessian], 0.01) != [None]
    hessian[0, 3, 20] *= 1.01  # above the diagonal: the factor is that of another matrix
    assert lower_factors([hessian], 0.01) == [None]


def test_autocast_changes_nothing():
    weight, hessian, block_size = layer_and_hessian("3x3", torch.float32)
    plain = sf.solve(weight, hessian, 0.5, block_size=block_size)
    for backend in ("native", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            inside = sf.solve(weight, hessian, 0.5, block_size=block_size, backend=backend)
        assert inside.fallback is None
    assert torch.equal(plain.mask, inside.mask)


def test_overflow_is_refused():
    weight = torch.tensor([[3e38, -3e38, 3e38], [-3e38, 3e38, 3e38]])
    inputs = torch.randn(3, 20)
    inputs[0] = 10 * inputs[1] + 0.1 * inputs[0]
    with pytest.raises(sf.InvalidInputError, match="pruning overflows float32.*3.0e\\+38"):
        sf.solve(weight, inputs @ inputs.T, 0.5)


def test_indefinite_hessian_is_refused():
    with pytest.raises(ValueError, match="not positive semidefinite"):
        sf.solve(torch.randn(2, 2), torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-2, 1e-4])
def test_backward_error_of_kept_columns_is_within_the_lapack_ratio(dtype, damping):
    # Kept weights satisfy ((W - Q) M^T)_i = 0: what is left there is rounding.
    torch.manual_seed(0)
    d = 200
    inputs = torch.randn(d, 1000, dtype=dtype).cumsum(0) / d
    hessian = (inputs @ inputs.T)[None]
    weight = torch.randn(30, d, dtype=dtype)
    solution = sf.solve(weight, hessian, 0.5, damping=damping)
    assert solution.fallback is None
    damped = hessian.double() + damping * hessian.diagonal(dim1=1, dim2=2).double().mean() * torch.eye(d)
    lower = lower_factors([hessian], damping)[0][0]
    assert torch.allclose((lower.mT @ lower).double(), damped[0], rtol=1e-3, atol=1e-3 * damped.abs().max().item())
    change = (weight - solution.weight).double()
    residual = (change @ lower.double().mT)[solution.mask].abs().max()
    unit = d * torch.finfo(dtype).eps * change.abs().sum(1).max() * lower.abs().max()
    assert residual <= 30 * unit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32_and_rounded(dtype):
    weight = torch.randn(6, 8).to(dtype)
    inputs = torch.randn(8, 50)
    half = sf.solve(weight, inputs @ inputs.T, 0.5)
    full = sf.solve(weight.float(), inputs @ inputs.T, 0.5)
    assert half.weight.dtype == dtype
    assert torch.equal(half.mask, full.mask)
    assert torch.equal(half.weight, full.weight.to(dtype))


def test_memory_format_is_kept():
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    inputs = torch.randn(27, 99)
    solution = sf.solve(weight, inputs @ inputs.T, 0.5, block_size=9)
    assert solution.weight.is_contiguous(memory_format=torch.channels_last)
    plain = sf.solve(weight.contiguous(), inputs @ inputs.T, 0.5, block_size=9)
    assert torch.equal(solution.weight, plain.weight)


def test_same_bits_twice_and_inputs_untouched():
    weight, hessian, block_size = layer_and_hessian("3x3", torch.float32)
    before = weight.clone(), hessian.clone()
    first, second = (sf.solve(weight, hessian, 0.7, block_size=block_size) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.loss == second.loss
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


EYE = torch.eye(3)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((torch.ones(2, 3), EYE, -0.1), {}, "sparsity must lie within 0"),
        ((torch.ones(2, 3), EYE, 95), {}, "did you mean 0.95"),
        ((torch.ones(2, 3), EYE, math.nan), {}, "got nan"),
        ((torch.ones(2, 3), EYE, "0.5"), {}, "must be a number"),
        ((torch.ones(2, 3), EYE, True), {}, "must be a number"),
        ((torch.ones(2, 3), EYE, 0.5), {"solver": "magic"}, "solver='magic' is unknown"),
        ((torch.ones(2, 3), EYE, 0.5), {"mask_rule": "half"}, "mask_rule='half' is unknown"),
        ((torch.ones(2, 3), EYE, 0.5), {"block_size": 0}, "block_size"),
        ((torch.ones(2, 3), EYE, 0.5), {"damping": -1}, "damping"),
        ((torch.ones(2, 3), EYE, 0.5), {"damping": math.nan}, "damping"),
        ((torch.ones(2, 3), EYE, 0.5), {"backend": "cuda"}, "backend='cuda' is unknown"),
        ((torch.ones(2, 4), EYE, 0.5), {}, r"\[2, 4\] needs a Hessian \[groups, 4, 4\].*got \[1, 3, 3\]"),
        ((torch.ones(3, 3), EYE.repeat(2, 1, 1), 0.5), {}, "divide its 3 rows"),
        ((torch.ones(2, 3).int(), EYE, 0.5), {}, "floating point, got torch.int32"),
        ((torch.ones(0, 3), EYE, 0.5), {}, r"non-empty .* got shape \[0, 3\]"),
        ((torch.full((2, 3), math.inf), EYE, 0.5), {}, "weight holds NaN or infinite"),
        ((torch.ones(2, 3), EYE * math.nan, 0.5), {}, "Hessian holds NaN or infinite"),
        ((torch.ones(2, 3), EYE.to("meta"), 0.5), {}, "on cpu and hessian on meta"),
    ],
)
def test_refusals(arguments, settings, message):
    with pytest.raises(sf.InvalidInputError, match=message):
        sf.solve(*arguments, **settings)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sparsity", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_refitted_weights_are_the_least_squares_optimum_under_the_mask(name, sparsity, backend):
    weight, hessian, block_size = layer_and_hessian(name, torch.float64)
    settings = {"block_size": block_size, "backend": backend}
    plain = sf.solve(weight, hessian, sparsity, **settings)
    refitted = sf.solve(weight, hessian, sparsity, refit=True, **settings)
    assert torch.equal(refitted.mask, plain.mask)
    assert not refitted.weight[~refitted.mask].any()
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    damped = hessian + torch.diag_embed(0.01 * mean[:, None].expand(hessian.shape[:2]))
    assert refitted.loss == pytest.approx(objective(weight, refitted.weight, damped) / 2, rel=1e-10)
    # At the optimum nothing is gained by changing a kept weight: the gradient there is zero.
    groups = hessian.shape[0]
    gradient = (weight - refitted.weight).reshape(groups, -1, hessian.shape[1]) @ damped
    kept = refitted.mask.reshape(gradient.shape)
    assert gradient[kept].abs().sum() <= 1e-10 * gradient.abs().sum()
    assert refitted.loss <= plain.loss * (1 + 1e-10)


def test_refitting_reads_off_by_hand():
    weight = torch.tensor([[1.0, 4.0], [4.0, 1.0], [3.0, 3.0]])
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    mask = torch.tensor([[False, True], [True, False], [True, True]])
    sparse, loss = refit_kept(weight[None].double(), hessian[None].double(), mask[None], native=False)
    # The lost 1 comes back through H_12 / H_22 = 1 / 2, and costs (2 - 1 * 1 / 2) / 2 in each of two rows.
    assert sparse[0].tolist() == [[0.0, 4.5], [4.5, 0.0], [3.0, 3.0]]
    assert loss.item() == 1.5


def test_refitting_solves_no_row_a_second_time_for_nothing(monkeypatch):
    weight, hessian, _ = layer_and_hessian("linear", torch.float64)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.9
    mask[:, 0] = False  # so that every row loses a weight
    solved, plain = [], refit._solve_subsets

    def noting(matrix, subsets, right_sides):
        solved.append(int(subsets.any(2).sum()))
        return plain(matrix, subsets, right_sides)

    monkeypatch.setattr(refit, "_solve_subsets", noting)
    refit_kept(weight[None], hessian, mask[None], native=False)
    assert solved == [len(weight), 0]  # by the few pruned weights, and none by the many kept ones


def test_refitting_in_small_pieces_changes_nothing(monkeypatch):
    weight, hessian, block_size = layer_and_hessian("3x3", torch.float64)
    settings = {"block_size": block_size, "refit": True, "backend": "reference"}
    whole = sf.solve(weight, hessian, 0.6, **settings)
    monkeypatch.setattr("spade_fast.refit._REFIT_ELEMENTS", 1)
    torch.testing.assert_close(sf.solve(weight, hessian, 0.6, **settings).weight, whole.weight)


@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_refitting_leaves_dead_inputs_out(sparsity):
    torch.manual_seed(3)
    inputs = torch.randn(6, 40, dtype=torch.float64)
    inputs[2] = 0
    weight, hessian = torch.randn(10, 6, dtype=torch.float64), inputs @ inputs.T
    solution = sf.solve(weight, hessian, sparsity, refit=True)
    live = [0, 1, 3, 4, 5]
    alone = sf.solve(weight[:, live], hessian[live][:, live], sparsity, refit=True)
    assert not solution.weight[:, 2].any()
    assert not solution.mask[:, 2].any()
    assert torch.equal(solution.mask[:, live], alone.mask)
    torch.testing.assert_close(solution.weight[:, live], alone.weight)
    assert solution.loss == pytest.approx(alone.loss)


def test_refitting_leaves_rows_that_lose_nothing_as_they_are():
    torch.manual_seed(3)
    inputs = torch.randn(6, 40)
    weight = torch.randn(4, 6)
    weight[0] *= 100
    solution = sf.solve(weight, inputs @ inputs.T, 0.5, block_size=6, refit=True)
    assert solution.mask[0].all()
    assert torch.equal(solution.weight[0], weight[0])


def test_refitting_minimizes_under_the_damping_that_was_needed():
    torch.manual_seed(4)
    inputs = torch.randn(12, 5, dtype=torch.float64)  # rank 5: no factor without damping
    weight, hessian = torch.randn(6, 12, dtype=torch.float64), inputs @ inputs.T
    solution = sf.solve(weight, hessian, 0.5, damping=0, refit=True)
    assert solution.fallback == "damping"
    damped = hessian + solution.damping * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    gradient = (weight - solution.weight) @ damped
    assert gradient[solution.mask].abs().max() < 1e-9 * gradient.abs().max()
    assert solution.loss == pytest.approx(objective(weight, solution.weight, damped[None]) / 2)


def test_refitting_is_done_in_float64_whatever_the_weights():
    torch.manual_seed(5)
    inputs = torch.randn(20, 60) * torch.logspace(0, 3, 20)[:, None]
    weight, hessian = torch.randn(8, 20), inputs @ inputs.T
    solution = sf.solve(weight, hessian, 0.5, damping=1e-6, refit=True)
    exact, _ = refit_kept(
        weight.double()[None],
        (hessian.double() + 1e-6 * hessian.double().diagonal().mean() * torch.eye(20))[None],
        solution.mask[None],
        native=False,
    )
    torch.testing.assert_close(solution.weight, exact[0].float(), rtol=1e-6, atol=0)
    half = sf.solve(weight.half(), hessian, 0.5, refit=True)
    assert half.weight.dtype == torch.float16


@pytest.mark.parametrize("solver_name", ["fast", "exact"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("like", [1, 2])
def test_refitting_is_backward_stable_close_to_a_singular_hessian(solver_name, backend, sparsity, like):
    # Every second input is nearly another one, or every third the sum of two: a condition of 1e13.
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(24, 72, generator=generator, dtype=torch.float64)
    inputs[like :: like + 1] = sum(inputs[i :: like + 1] for i in range(like)) + 1e-6 * inputs[like :: like + 1]
    weight, hessian = torch.randn(6, 24, generator=generator, dtype=torch.float64), inputs @ inputs.T
    settings = {"solver": solver_name, "backend": backend, "refit": True}
    solution = sf.solve(weight, hessian, sparsity, damping=0, **settings)
    assert (solution.damping, solution.fallback) == (0, None)
    residual = ((weight - solution.weight) @ hessian)[solution.mask].abs().max()
    size = hessian.abs().amax() * (weight.abs() + solution.weight.abs()).sum(1).amax()
    assert residual <= 24 * torch.finfo(torch.float64).eps * size


def test_pruned_weights_are_plain_zeros_when_refitted():
    solution = sf.solve(-torch.ones(2, 4), torch.eye(4), 1, refit=True)
    assert torch.equal(solution.weight.view(torch.int32), torch.zeros(2, 4, dtype=torch.int32))


@pytest.mark.parametrize("refit", ["no", 1, None, torch.tensor(True)])
def test_refit_is_true_or_false(refit):
    with pytest.raises(sf.InvalidInputError, match="refit must be True or False"):
        sf.solve(torch.ones(2, 3), torch.eye(3), 0.5, refit=refit)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rounding_of_an_asymmetric_hessian_does_not_matter(backend):
    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 10), torch.randn(10, 50)
    exact = inputs.double() @ inputs.double().T
    hessian = exact.float()
    hessian[3, 7] *= 1 + 1e-5
    solution = sf.solve(weight.double(), hessian, 0.5, backend=backend)
    assert torch.equal(solution.mask, sf.solve(weight.double(), exact, 0.5, backend=backend).mask)


@pytest.mark.parametrize("place", [(0, 1), (3, 300), (300, 3), (398, 399)])
def test_asymmetry_is_found_wherever_it_is(place):
    hessian = torch.eye(400)
    hessian[place] = 0.5
    with pytest.raises(sf.InvalidInputError, match="not symmetric"):
        sf.solve(torch.ones(2, 400), hessian, 0.5)


def test_an_asymmetric_hessian_is_refused():
    hessian = torch.eye(4)
    hessian[2, 0] = 0.5
    with pytest.raises(sf.InvalidInputError, match=r"not symmetric: mirrored entries differ by up to 0\.5"):
        sf.solve(torch.ones(2, 4), hessian, 0.5)


@pytest.mark.parametrize("refit", [False, True])
def test_an_input_whose_square_underflows_is_dead(refit):
    torch.manual_seed(0)
    inputs = torch.randn(5, 40)
    inputs[2] = 1e-25
    hessian = inputs @ inputs.T
    assert hessian[2, 2] == 0
    assert hessian[2].any()
    solution = sf.solve(torch.randn(4, 5), hessian, 0.5, refit=refit)
    assert not solution.weight[:, 2].any()


@pytest.mark.parametrize("settings", [{}, {"refit": True}, {"solver": "exact"}, {"backend": "reference"}])
def test_dead_inputs_beside_the_largest_that_float32_holds(settings):
    torch.manual_seed(0)
    inputs, weight = torch.randn(20, 60), torch.randn(6, 20)
    inputs[3] = 0
    hessian = inputs @ inputs.T
    plain = sf.solve(weight, hessian, 0.5, **settings)
    scaled = sf.solve(weight, hessian * 2.0 ** (127 - hessian.max().log2().ceil().item()), 0.5, **settings)
    assert not scaled.mask[:, 3].any()
    assert torch.equal(scaled.mask, plain.mask)
    torch.testing.assert_close(scaled.weight, plain.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver_name", ["fast", "exact"])
@pytest.mark.parametrize("unit", [1e308, 1e-312])
def test_units_at_the_limits_of_float64_are_refused_as_such(solver_name, unit):
    inputs = torch.randn(20, 60, dtype=torch.float64)
    hessian = inputs @ inputs.T
    with pytest.raises(sf.InvalidInputError, match="largest entry is .* too close to the limits of float64"):
        sf.solve(torch.randn(6, 20).double(), hessian / hessian.max() * unit, 0.5, solver=solver_name)


def test_many_layers_are_solved_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    problems = []
    for name, (rows, columns, sparsity) in enumerate([(6, 40, 0.5), (9, 7, 0.0), (3, 120, 0.9), (5, 5, 1.0)]):
        inputs = torch.randn(columns, 2 * columns, generator=generator, dtype=torch.float64)
        inputs[0] *= name % 2  # a dead input in every second layer
        weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        problems.append(Problem(weight, inputs @ inputs.T, (Target(sparsity, 1 + name),), str(name)))
    for backend in ("native", "reference"):
        solutions = solve_layers(problems, refit=True, backend=backend)
        assert len(solutions) == len(problems)
        for problem, (solution,) in zip(problems, solutions, strict=True):
            sparsity, block_size = problem.targets[0]
            settings = {"block_size": block_size, "refit": True, "backend": backend}
            alone = sf.solve(problem.weight, problem.hessian, sparsity, **settings)
            assert torch.equal(solution.mask, alone.mask)
            torch.testing.assert_close(solution.weight, alone.weight, rtol=1e-12, atol=1e-12)
            assert solution.loss == pytest.approx(alone.loss, rel=1e-10)


@pytest.mark.parametrize(
    ("weight", "hessian", "message"),
    [
        (torch.ones(2, 3), torch.eye(2), "layer 'second': .* needs a Hessian"),
        (torch.full((2, 3), torch.nan), torch.eye(3), "layer 'second': the weight holds NaN"),
        (torch.ones(2, 3), torch.full((3, 3), torch.inf), "layer 'second': the Hessian holds NaN or infinite"),
        (torch.ones(2, 3), -torch.eye(3), "layer 'second': the Hessian has no Cholesky factor"),
        (torch.tensor([[3e38, 3e38]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]), "layer 'second': pruning overflows"),
    ],
)
def test_what_is_wrong_with_one_of_many_layers_names_it(weight, hessian, message):
    good = Problem(torch.ones(2, 3), torch.eye(3), (Target(0.5),), "first")
    with pytest.raises(sf.InvalidInputError, match=message):
        solve_layers([good, Problem(weight, hessian, (Target(0.5),), "second")], damping=0)


def test_the_first_bad_layer_is_named():
    problems = [
        Problem(torch.ones(2, 3), torch.eye(3), (Target(0.5),), "good"),
        Problem(torch.ones(2, 3), torch.full((3, 3), torch.nan), (Target(0.5),), "first"),
        Problem(torch.full((2, 3), torch.nan), torch.eye(3), (Target(0.5),), "second"),
    ]
    with pytest.raises(sf.InvalidInputError, match="layer 'first': the Hessian holds NaN"):
        solve_layers(problems)


class Looks(TorchDispatchMode):
    """Counts how often the host looks at a number: on a GPU it would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_looks_are_counted():
    with Looks() as looks:
        assert bool(torch.ones(3).any())
        assert torch.ones(3).sum().item() == 3
    assert looks.count == 2


@pytest.mark.parametrize("layers", [1, 20])
def test_no_layer_is_looked_at_by_itself(layers):
    torch.manual_seed(0)
    inputs = torch.randn(8, 40)
    inputs[3] = 0  # dead
    hessian = inputs @ inputs.T
    hessian[1, 2] *= 1 + 1e-6  # rounding
    problems = [Problem(torch.randn(4, 8), hessian, (Target(0.5),), str(i)) for i in range(layers)]
    with Looks() as looks:
        solutions = solve_layers(problems, backend="native")
    assert len(solutions) == layers
    assert looks.count == 0  # all is fetched by `tolist`


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("mask_rule", ["exact_count", "published"])
def test_several_sparsities_share_a_factorization(monkeypatch, backend, mask_rule):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 90, generator=generator, dtype=torch.float64)
    inputs[5] = 0  # dead
    weight, hessian = torch.randn(7, 24, generator=generator, dtype=torch.float64), inputs @ inputs.T
    settings = {"block_size": 3, "backend": backend, "mask_rule": mask_rule}
    shares = [0.9, 0.0, 0.5, 0.9]
    alone = [sf.solve(weight, hessian, share, **settings) for share in shares]
    factored = []
    factor = solver._factor_all
    monkeypatch.setattr(solver, "_factor_all", lambda *arguments: factored.append(1) or factor(*arguments))
    together = sf.solve(weight, hessian, shares, **settings)
    assert len(factored) == 1
    for one, same in zip(alone, together, strict=True):
        assert torch.equal(one.weight, same.weight)
        assert torch.equal(one.mask, same.mask)
        assert (one.loss, one.damping, one.fallback) == (same.loss, same.damping, same.fallback)
    assert together[0].loss > together[2].loss > 0
    assert sf.solve(weight, hessian, [], **settings) == []
    with pytest.raises(sf.InvalidInputError, match="sparsity must lie within"):
        sf.solve(weight, hessian, [0.5, 1.5], **settings)
