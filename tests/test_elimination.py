"""The exact solver: orders of elimination, what is made of them, and `solve(solver="exact")`."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from subjects import objective
from torch import Tensor, nn

import spade_fast as sf
from spade_fast import elimination, ops, reference, solver
from spade_fast.elimination import Blocks, Elimination
from spade_fast.solver import Problem, Target, solve_layers, solve_within

native_only = pytest.mark.skipif("cpu" not in ops.native_devices(), reason="the extension is not built")


def hessian_of(columns: int, dtype: torch.dtype = torch.float64, groups: int = 1, samples: int | None = None) -> Tensor:
    """Of correlated inputs of unlike sizes, not singular where there are more samples than columns."""
    mixing = torch.randn(columns, columns, dtype=torch.float64) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(groups, samples or 2 * columns + 3, columns, dtype=torch.float64) @ mixing
    inputs *= torch.logspace(-0.5, 0.5, columns)
    return (inputs.mT @ inputs / inputs.shape[1]).to(dtype)


def least_loss(weight: Tensor, inverse: Tensor, pruned: list[int]) -> float:
    """Half of what the best weights without those columns lose: w_P^T (H^-1)_PP^-1 w_P / 2."""
    rows = weight[pruned]
    return (rows @ torch.linalg.solve(inverse[pruned][:, pruned], rows)).item() / 2 if pruned else 0.0


# The reference


@pytest.mark.parametrize("size", [1, 3])
def test_the_reference_takes_what_costs_least_each_time(size):
    torch.manual_seed(0)
    weight, inverse = torch.randn(1, 4, 12, dtype=torch.float64), hessian_of(12).inverse()
    order, losses = reference.elimination_order(weight, inverse, size)
    for row, of_row, loss in zip(weight[0], order[0].tolist(), losses[0], strict=True):
        pruned: list[int] = []
        for step, block in enumerate(of_row):
            cost = {
                each: least_loss(row, inverse[0], [*pruned, *range(each * size, (each + 1) * size)])
                for each in range(12 // size)
                if each not in of_row[:step]
            }
            assert min(cost, key=cost.get) == block
            assert loss[step].item() == pytest.approx(cost[block] - least_loss(row, inverse[0], pruned), rel=1e-9)
            pruned.extend(range(block * size, (block + 1) * size))


# The operator

SHAPES = [  # groups, rows, columns, columns of a block
    (1, 1, 1, 1), (1, 3, 2, 1), (2, 5, 24, 1), (1, 6, 100, 1), (1, 3, 191, 1), (1, 2, 320, 1),
    (4, 5, 9, 9), (2, 4, 27, 9), (1, 3, 288, 9), (3, 3, 60, 4), (1, 2, 450, 25), (1, 3, 98, 49), (1, 2, 260, 65),
]  # fmt: skip


@native_only
@pytest.mark.parametrize(("groups", "rows", "columns", "size"), SHAPES)
@pytest.mark.parametrize("damping", [0.01, 1e-7])
def test_the_operator_equals_the_reference(groups, rows, columns, size, damping):
    torch.manual_seed(1)
    weight = torch.randn(groups, rows, columns, dtype=torch.float64)
    weight[:, ::2, ::5] = 0
    # Rank deficient: at the lesser damping the condition is some 1e8.
    hessian = hessian_of(columns, groups=groups, samples=max(1, columns // 2))
    inverse = (hessian + damping * hessian.diagonal(dim1=1, dim2=2).mean() * torch.eye(columns)).inverse()
    inverse = (inverse + inverse.mT) / 2
    order, losses = reference.elimination_order(weight, inverse, size)
    (found,), (found_losses,) = ops.elimination_orders([weight], [inverse], [size])
    assert torch.equal(found, order)
    torch.testing.assert_close(found_losses, losses, rtol=1e-6 if damping < 1e-3 else 1e-9, atol=1e-12)
    whole = torch.einsum("grd,gde,gre->gr", weight, inverse.inverse(), weight) / 2
    torch.testing.assert_close(found_losses.sum(2), whole, rtol=1e-6, atol=0)


@native_only
@pytest.mark.parametrize("size", [1, 2])
def test_of_equal_losses_the_lowest_block_goes(size):
    weight = torch.ones(1, 2, 70, dtype=torch.float64)
    weight[0, 1, 30:] = 0
    (order,), _ = ops.elimination_orders([weight], [torch.eye(70, dtype=torch.float64)[None]], [size])
    blocks = 70 // size
    assert order[0, 0].tolist() == list(range(blocks))
    assert order[0, 1].tolist() == [*range(30 // size, blocks), *range(30 // size)]


@native_only
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("flaw", ["indefinite", "noise", "weight"])
def test_a_failure_is_told_from_where_it_is_and_leaves_others_alone(size, flaw):
    torch.manual_seed(2)
    weight, inverse = torch.randn(2, 3, 80, dtype=torch.float64), hessian_of(80, groups=2).inverse()
    good = ops.elimination_orders([weight], [inverse], [size])
    if flaw == "indefinite":
        weight[1, :, 40:44] = 1e3  # the last to go
        inverse[1, 41, 41] = -1.0
    elif flaw == "noise":  # two inputs that are as good as one
        twin = inverse[1, 40].clone()
        inverse[1, 41], inverse[1, :, 41] = twin, twin
        inverse[1, 41, 41] = twin[40] * (1 + 1e-15)
    else:
        weight[1, 2, 41] = math.nan
    for order, losses in zip(*ops.elimination_orders([weight], [inverse], [size]), strict=True):
        assert torch.equal(order[0], good[0][0][0])
        assert torch.equal(losses[0], good[1][0][0])
        failed = losses[1].isnan()
        assert torch.equal(failed, order[1] == -1)
        assert failed[2, -1]
        assert (failed[:, 1:] >= failed[:, :-1]).all()
        if flaw == "weight":
            assert torch.equal(order[1, :2], good[0][0][1, :2])
    plain, _ = reference.elimination_order(weight, inverse, size)
    assert torch.equal(plain, order)


@native_only
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_noise_is_what_is_small_beside_the_column_s_own_diagonal(size, unit):
    # Once the first block has gone, and the last has taken its place, there is little left of that.
    noise = 10 * 9**0.5 * torch.finfo(torch.float64).eps
    last = 9 - size
    for pivot, sound in ((0.5 * noise, False), (3 * noise, True)):
        inverse = torch.eye(9, dtype=torch.float64)
        inverse[0, 0] = unit
        inverse[0, last] = inverse[last, 0] = ((1 - pivot) * unit) ** 0.5
        weight = torch.full((1, 1, 9), 10.0, dtype=torch.float64)
        weight[..., :size] = weight[..., last:] = 0
        weight[..., last] = 1e-5
        (order,), _ = ops.elimination_orders([weight], [inverse[None]], [size])
        assert order[0, 0, 0] == 0
        assert (order >= 0).all() == sound
        assert torch.equal(order, reference.elimination_order(weight, inverse[None], size)[0])


@native_only
def test_neither_threads_nor_neighbours_change_a_bit():
    torch.manual_seed(3)
    columns, sizes = [90, 5, 63, 144, 1], [1, 5, 9, 9, 1]
    weights = [torch.randn(2, rows + 2, d) for rows, d in enumerate(columns)]
    inverses = [hessian_of(d, torch.float32, groups=2).inverse() for d in columns]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        together = ops.elimination_orders(weights, inverses, sizes)
        torch.set_num_threads(1)
        for i in range(len(columns)):
            (order,), (losses,) = ops.elimination_orders([weights[i]], [inverses[i]], [sizes[i]])
            assert torch.equal(order, together[0][i])
            assert torch.equal(losses, together[1][i])
    finally:
        torch.set_num_threads(threads)


@native_only
def test_no_rows_and_strided_arguments():
    (order,), (losses,) = ops.elimination_orders([torch.zeros(1, 0, 6)], [torch.eye(6)[None]], [2])
    assert order.shape == losses.shape == (1, 0, 3)
    torch.manual_seed(4)
    weight, inverse = torch.randn(6, 4).T[None], hessian_of(6, torch.float32).inverse()
    strided = torch.stack([inverse, inverse], -1)[..., 0]
    found = ops.elimination_orders([weight], [strided], [2])
    expected = ops.elimination_orders([weight.contiguous()], [inverse], [2])
    assert torch.equal(found[0][0], expected[0][0])
    assert torch.equal(found[1][0], expected[1][0])


# Systems with submatrices


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solutions_on_subsets(dtype):
    torch.manual_seed(5)
    groups, systems, columns = 2, 9, 230
    matrix, right = hessian_of(columns, dtype, groups), torch.randn(groups, systems, columns, dtype=dtype)
    subsets = torch.rand(groups, systems, columns) < torch.linspace(0, 1, systems)[:, None]
    subsets[0, 3] = False
    found = ops.solve_subsets(matrix, subsets, right)
    assert not found[~subsets].any()
    for g in range(groups):
        for i, subset in enumerate(subsets[g]):
            of_subset, x = matrix[g][subset][:, subset].double(), found[g, i, subset].double()
            residual = torch.linalg.vector_norm(of_subset @ x - right[g, i, subset])
            size = torch.linalg.vector_norm(of_subset) * torch.linalg.vector_norm(x)
            assert residual <= torch.finfo(dtype).eps * columns * size


@native_only
def test_a_submatrix_without_a_factor_gives_nan():
    matrix = torch.tensor([[[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 4.0]]])
    subsets = torch.tensor([[[True, True, False], [True, False, True]]])
    found = ops.solve_subsets(matrix, subsets, torch.ones(1, 2, 3))
    assert found[0, 0, :2].isnan().all()
    assert found[0, 0, 2] == 0
    torch.testing.assert_close(found[0, 1], torch.tensor([1.0, 0.0, 0.25]))


# Which columns are pruned together


def test_blocks_of_taps_are_neighbouring_columns():
    blocks = Blocks.of((5, 2, 2, 2), 4, "taps", torch.device("cpu"))
    assert blocks.columns.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert blocks.in_order
    ragged = Blocks.of((5, 7), 4, "taps", torch.device("cpu"))
    assert ragged.columns.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]  # of which the last is no column
    assert ragged.of_column.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert not ragged.in_order


def test_blocks_of_channels_are_at_one_tap():
    blocks = Blocks.of((5, 3, 1, 2), 2, "channels", torch.device("cpu"))
    # Columns are (channel, tap): channels 0 and 1 at tap 0, then channel 2 alone, then the same at tap 1.
    assert blocks.columns.tolist() == [[0, 2], [4, 6], [1, 3], [5, 6]]
    assert blocks.of_column.tolist() == [0, 2, 0, 2, 1, 3]
    assert Blocks.of((5, 6), 3, "channels", torch.device("cpu")).in_order


def test_places_without_a_column_touch_nothing():
    blocks = Blocks.of((1, 3, 1, 2), 2, "channels", torch.device("cpu"))
    weight, inverse = torch.arange(1.0, 7.0).view(1, 1, 6), torch.arange(36.0).view(1, 6, 6)
    row, matrix = blocks.gather(weight, inverse)
    assert row[0, 0].tolist() == [1, 3, 5, 0, 2, 4, 6, 0]
    assert matrix[0, 3].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert matrix[0, 7].tolist() == [0] * 7 + [1]
    assert matrix[0, 5].tolist() == [18, 20, 22, 0, 19, 21, 23, 0]


# How far each row goes


def made_up() -> Elimination:
    order = torch.tensor([[[2, 0, 1], [0, 1, 2]]], dtype=torch.int32)
    losses = torch.tensor([[[1.0, 5.0, 2.0], [2.0, 2.0, 3.0]]], dtype=torch.float64)
    return Elimination(order, losses, Blocks.of((2, 3), 1, "taps", torch.device("cpu")))


@pytest.mark.parametrize(
    ("count", "steps", "loss"),
    # The first row's third step costs less than its second, which goes for it.
    [(0, [0, 0], 0), (1, [1, 0], 1), (2, [2, 0], 6), (3, [2, 1], 8), (4, [2, 2], 10), (5, [2, 3], 13), (6, [3, 3], 15)],
)
def test_rows_go_as_far_as_their_losses_are_among_the_least(count, steps, loss):
    found = made_up().steps(count)
    assert found.tolist() == [steps]
    assert made_up().loss(found).item() == loss


def test_what_is_kept_after_some_steps():
    mask = made_up().mask(torch.tensor([[1, 2]]))
    assert mask.tolist() == [[[True, True, False], [False, False, True]]]


def test_counts_are_of_all_blocks():
    assert [made_up().count(share, "exact_count") for share in (0, 0.4, 0.42, 0.75, 1)] == [0, 2, 3, 5, 6]
    assert [made_up().count(share, "published") for share in (0, 0.4, 0.5, 0.51, 1)] == [0, 3, 3, 4, 6]


# Solving

LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (50, 24)),
    "1x1": (lambda: nn.Conv2d(12, 8, 1), (2, 12, 6, 6)),
    "3x3": (lambda: nn.Conv2d(5, 8, 3, padding=1), (2, 5, 9, 9)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2), (3, 8, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 7, 7)),
}


def layer_and_hessian(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, int]:
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer, inputs = make().to(dtype), torch.randn(shape, dtype=dtype)
    inputs.flatten(1)[:, :2] = 0 if name == "linear" else 0.1
    return layer.weight.detach(), sf.hessian(layer, inputs), layer.weight.shape[2:].numel()


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    return hessian + torch.diag_embed(damping * mean[:, None].expand(hessian.shape[:2]))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", ["taps", "channels"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 1.0])
def test_float64_equals_reference(name, layout, sparsity):
    weight, hessian, block_size = layer_and_hessian(name)
    weight.flatten()[::7] = 0
    settings = {"solver": "exact", "block_size": block_size, "block_layout": layout}
    native, plain = (sf.solve(weight, hessian, sparsity, backend=b, **settings) for b in ("native", "reference"))
    assert torch.equal(native.mask, plain.mask)
    torch.testing.assert_close(native.weight, plain.weight, rtol=0, atol=1e-10)
    assert native.loss == pytest.approx(plain.loss, rel=1e-10)
    assert (native.damping, native.fallback) == (0.01, None)
    assert not native.weight[~native.mask].any()


@pytest.mark.parametrize("name", ["1x1", "3x3", "grouped"])
@pytest.mark.parametrize("layout", ["taps", "channels"])
@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_kept_weights_are_the_best_under_the_mask(name, layout, damping):
    weight, hessian, block_size = layer_and_hessian(name)
    settings = {"block_size": block_size, "block_layout": layout, "damping": damping}
    solution = sf.solve(weight, hessian, 0.6, solver="exact", **settings)
    full = damped(hessian, damping)
    change = (weight - solution.weight).reshape(hessian.shape[0], -1, hessian.shape[1])
    gradient = change @ full
    assert gradient[solution.mask.reshape(gradient.shape)].abs().max() <= 1e-10 * gradient.abs().max()
    assert solution.loss == pytest.approx(objective(weight, solution.weight, full) / 2, rel=1e-10)


def test_blocks_stay_whole_and_are_counted_over_all_rows():
    weight, hessian, _ = layer_and_hessian("3x3")
    taps = sf.solve(weight, hessian, 0.3, solver="exact", block_size=9).mask.flatten(2)
    assert torch.equal(taps.any(2), taps.all(2))
    assert (~taps.all(2)).sum() == reference.count_to_prune(8 * 5, 0.3)
    assert len({int(row.sum()) for row in taps.all(2)}) > 1  # rows go differently far
    channels = sf.solve(weight, hessian, 0.3, solver="exact", block_size=9, block_layout="channels").mask.flatten(2)
    assert torch.equal(channels.any(1), channels.all(1))  # fewer than nine channels: all at a tap
    assert (~channels.all(1)).sum() == reference.count_to_prune(8 * 9, 0.3)


@pytest.mark.parametrize("name", LAYERS)
def test_the_loss_is_lower_than_that_of_the_fast_solver(name):
    weight, hessian, block_size = layer_and_hessian(name)
    if name == "depthwise":
        block_size = 1  # of nine a row has one: nothing would be left to choose
    fast = sf.solve(weight, hessian, 0.5, block_size=block_size, refit=True)
    exact = sf.solve(weight, hessian, fast.mask.logical_not().double().mean().item(), solver="exact")
    assert exact.mask.sum() == pytest.approx(fast.mask.sum(), abs=1)
    assert exact.loss < fast.loss


@pytest.mark.parametrize("name", LAYERS)
def test_float32_reaches_the_objective_of_float64(name):
    weight, hessian, block_size = layer_and_hessian(name, torch.float32)
    single = sf.solve(weight, hessian, 0.5, solver="exact", block_size=block_size)
    double = sf.solve(weight.double(), hessian.double(), 0.5, solver="exact", block_size=block_size)
    assert single.weight.dtype == torch.float32
    # One choice between two that are as good as equal changes those that follow.
    assert objective(weight, single.weight, damped(hessian)) == pytest.approx(2 * double.loss, rel=1e-2)
    assert (single.mask == double.mask).double().mean() > 0.97


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("mask_rule", ["exact_count", "published"])
def test_a_path_costs_one_elimination(monkeypatch, backend, mask_rule):
    weight, hessian, block_size = layer_and_hessian("3x3")
    settings = {"solver": "exact", "block_size": block_size, "backend": backend, "mask_rule": mask_rule}
    shares = [0.9, 0.0, 0.5, 0.9, 1.0]
    alone = [sf.solve(weight, hessian, share, **settings) for share in shares]
    eliminated = []
    plain = solver.eliminate_layers
    monkeypatch.setattr(solver, "eliminate_layers", lambda *each: eliminated.extend(each[0]) or plain(*each))
    together = sf.solve(weight, hessian, shares, **settings)
    assert len(eliminated) == 1
    for one, same in zip(alone, together, strict=True):
        assert torch.equal(one.weight, same.weight)
        assert torch.equal(one.mask, same.mask)
        assert (one.loss, one.damping, one.fallback) == (same.loss, same.damping, same.fallback)
    assert (together[2].mask | ~together[0].mask).all()  # masks of one path lie within each other
    assert together[4].loss > together[0].loss > together[2].loss > 0


def test_dense_targets_and_blocks_that_are_alike_cost_no_elimination(monkeypatch):
    weight, hessian, _ = layer_and_hessian("depthwise")
    eliminated = []
    plain = solver.eliminate_layers
    monkeypatch.setattr(solver, "eliminate_layers", lambda *each: eliminated.extend(each[0]) or plain(*each))
    targets = (Target(0.0, 1), Target(0.2, 100), Target(0.5, 9))
    (solutions,) = solve_layers([Problem(weight, hessian, targets)], solver="exact")
    assert len(eliminated) == 1
    assert [int((~solution.mask).sum()) for solution in solutions] == [0, 18, 36]
    dense = Problem(weight, hessian, targets[:1])
    found = solve_within([dense, Problem(weight, hessian, targets)], lambda *_: True, solver="exact")
    assert [target for target, _ in found] == [0, 2]
    assert torch.equal(found[0][1].weight, weight)
    assert torch.equal(found[1][1].weight, solutions[2].weight)


def test_targets_of_other_blocks_are_eliminated_by_themselves():
    weight, hessian, _ = layer_and_hessian("3x3")
    targets = (Target(0.3, 9), Target(0.5, 1), Target(0.6, 9))
    (solutions,) = solve_layers([Problem(weight, hessian, targets)], solver="exact")
    for (share, size), solution in zip(targets, solutions, strict=True):
        alone = sf.solve(weight, hessian, share, block_size=size, solver="exact")
        assert torch.equal(solution.weight, alone.weight)


@pytest.mark.parametrize("refit", [False, True])
def test_the_furthest_target_within_a_limit_is_found_without_solving_others(monkeypatch, refit):
    weight, hessian, block_size = layer_and_hessian("3x3")
    shares = [0.1, 0.3, 0.5, 0.7, 0.9]
    problem = Problem(weight, hessian, tuple(Target(share, block_size) for share in shares))
    path = sf.solve(weight, hessian, shares, solver="exact", block_size=block_size)
    solved = []
    plain = solver.refit_kept
    monkeypatch.setattr(solver, "refit_kept", lambda *each, **named: solved.append(1) or plain(*each, **named))
    limits = [path[0].loss * 0.99, *(solution.loss * 1.001 for solution in path)]
    for wanted, limit in enumerate(limits):
        (found,) = solve_within([problem], lambda _, loss, at=limit: loss <= at, solver="exact", refit=refit)
        if wanted == 0:
            assert found is None
        else:
            assert found[0] == wanted - 1
            assert torch.equal(found[1].weight, path[wanted - 1].weight)
    assert len(solved) == len(shares)


def test_dead_inputs_get_zero_weights_and_count():
    torch.manual_seed(6)
    inputs, weight = torch.randn(5, 40, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    inputs[2] = 0
    native, plain = (
        sf.solve(weight, inputs @ inputs.T, 0.5, solver="exact", backend=b) for b in ("native", "reference")
    )
    assert not native.mask[:, 2].any()
    assert (~native.mask).sum() == 15  # of which six have no input
    assert torch.equal(native.mask, plain.mask)
    few = sf.solve(weight, inputs @ inputs.T, 0.1, solver="exact")  # three, but six have no input
    assert (~few.mask).sum() == 6
    assert torch.equal(few.weight[few.mask], weight[few.mask])


def test_ill_conditioned_masks_equal_those_of_the_reference():
    torch.manual_seed(7)
    weight = torch.randn(6, 90, dtype=torch.float64)
    inputs = torch.randn(90, 40, dtype=torch.float64) * torch.logspace(-3, 3, 90)[:, None]
    for size in (1, 9):
        settings = {"solver": "exact", "damping": 1e-10, "block_size": size}
        native, plain = (
            sf.solve(weight, inputs @ inputs.T, 0.5, backend=b, **settings) for b in ("native", "reference")
        )
        assert torch.equal(native.mask, plain.mask)
        # Weights are as good as their systems allow: eps times a condition of some 1e10.
        torch.testing.assert_close(native.weight, plain.weight, rtol=1e-6, atol=1e-8)
        assert native.loss == pytest.approx(plain.loss, rel=1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_float32_cannot_eliminate_is_redone_in_float64(backend):
    torch.manual_seed(8)
    inputs = torch.randn(256, 100) * torch.logspace(-1, 1, 256)[:, None]
    weight, hessian = torch.randn(3, 256), inputs @ inputs.T
    settings = {"solver": "exact", "damping": 1e-6, "backend": backend}
    single = sf.solve(weight, hessian, 0.5, **settings)
    double = sf.solve(weight.double(), hessian.double(), 0.5, **settings)
    assert (single.fallback, single.damping) == ("float64", 1e-6)
    assert double.fallback is None
    assert single.weight.dtype == torch.float32
    assert torch.equal(single.mask, double.mask)
    torch.testing.assert_close(single.weight, double.weight.float())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_is_raised_only_as_the_last_resort_and_reported(backend, dtype):
    torch.manual_seed(9)
    inputs = torch.randn(20, 400, dtype=dtype).repeat(2, 1)  # every input twice: singular at any precision
    weight = torch.randn(8, 40, dtype=dtype)
    solution = sf.solve(weight, inputs @ inputs.T, 0.5, damping=0, solver="exact", backend=backend)
    assert solution.fallback == "damping"
    assert 0 < solution.damping <= 1e-3
    assert solution.weight.isfinite().all()
    assert solution.weight.dtype == dtype
    assert (~solution.mask).sum() == 160
    full = damped((inputs @ inputs.T).double()[None], solution.damping)
    assert solution.loss == pytest.approx(objective(weight, solution.weight, full) / 2, rel=1e-3)


def test_damping_is_raised_until_blocks_of_all_sizes_can_go(monkeypatch):
    weight, hessian, _ = layer_and_hessian("3x3")
    calls = []
    plain = solver.eliminate_layers

    def flawed(*arguments):
        found = plain(*arguments)
        calls.append(1)
        if len(calls) <= 2:
            found[-1] = dataclasses.replace(found[-1], losses=found[-1].losses * math.nan)
        return found

    monkeypatch.setattr(solver, "eliminate_layers", flawed)
    ((one, other),) = solve_layers([Problem(weight, hessian, (Target(0.5, 9), Target(0.5, 1)))], solver="exact")
    assert len(calls) == 3
    assert [one.damping, other.damping] == pytest.approx([1.0, 1.0])
    assert one.fallback == other.fallback == "damping"


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_indefinite_hessian_is_refused(backend):
    with pytest.raises(sf.InvalidInputError, match="not positive semidefinite"):
        sf.solve(torch.randn(2, 2), torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.5, solver="exact", backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("size", [1, 3])
def test_no_unit_of_weights_or_inputs_changes_a_mask(backend, size):
    torch.manual_seed(10)
    inputs, weight = torch.randn(12, 50), torch.randn(8, 12)
    settings = {"solver": "exact", "block_size": size, "backend": backend}
    plain = sf.solve(weight, inputs @ inputs.T, 0.5, **settings)
    for of_weight, of_inputs in ((2.0**-90, 1), (2.0**90, 1), (1, 2.0**-50), (1, 2.0**50), (2.0**60, 2.0**50)):
        scaled = of_inputs * inputs
        found = sf.solve(weight * of_weight, scaled @ scaled.T, 0.5, **settings)
        assert torch.equal(found.mask, plain.mask)
        assert torch.equal(found.weight / of_weight, plain.weight)
        assert found.loss == pytest.approx(plain.loss * of_weight**2 * of_inputs**2)
        assert found.fallback is None


def test_rows_are_compared_in_one_unit():
    torch.manual_seed(11)
    inputs, weight = torch.randn(12, 50), torch.randn(4, 12)
    weight[1] *= 1e-24  # whose losses float32 does not know
    solution = sf.solve(weight, inputs @ inputs.T, 15 / 48, solver="exact")
    double = sf.solve(weight.double(), inputs @ inputs.T, 15 / 48, solver="exact")
    assert torch.equal(solution.mask, double.mask)
    assert not solution.mask[1].any()  # all twelve before three of other rows


def test_losses_that_overflow_are_refused():
    torch.manual_seed(12)
    inputs = torch.randn(3, 20, dtype=torch.float64)
    with pytest.raises(sf.InvalidInputError, match="pruning overflows float64: the weights reach 1.0e\\+300"):
        sf.solve(torch.full((2, 3), 1e300, dtype=torch.float64), inputs @ inputs.T, 0.5, solver="exact")


@native_only
@pytest.mark.parametrize("piece", [1.0, 3e3, 2e5])
def test_pieces_change_no_bit(monkeypatch, piece):
    torch.manual_seed(13)
    columns, sizes = [30, 5, 63, 36], [1, 5, 9, 1]
    weights = [torch.randn(2, 7 - rows, d) for rows, d in enumerate(columns)]
    inverses = [hessian_of(d, torch.float32, groups=2).inverse() for d in columns]
    blocks = [Blocks.of((1, d), size, "taps", torch.device("cpu")) for d, size in zip(columns, sizes, strict=True)]
    whole = elimination.eliminate_layers(weights, inverses, blocks, native=True)
    calls = []
    plain = ops.elimination_orders
    monkeypatch.setattr(elimination, "_PIECE", piece)
    monkeypatch.setattr(ops, "elimination_orders", lambda *each: calls.append(1) or plain(*each))
    found = elimination.eliminate_layers(weights, inverses, blocks, native=True)
    assert len(calls) > 1
    for one, same in zip(whole, found, strict=True):
        assert torch.equal(one.order, same.order)
        assert torch.equal(one.losses, same.losses)


def test_layers_are_named_and_those_that_fail_leave_others_alone():
    good = Problem(torch.eye(3)[:2], torch.eye(3), (Target(0.5),), "first")
    bad = Problem(torch.ones(2, 3), -torch.eye(3), (Target(0.5),), "second")
    with pytest.raises(sf.InvalidInputError, match="layer 'second': the Hessian has no Cholesky factor"):
        solve_layers([good, bad], solver="exact")
    inputs = torch.randn(3, 30).repeat(2, 1)
    singular = Problem(torch.ones(2, 6), inputs @ inputs.T, (Target(0.5),), "singular")
    alone, raised = (each[0] for each in solve_layers([good, singular], damping=0, solver="exact"))
    assert (alone.fallback, raised.fallback) == (None, "damping")


def test_sparsity_zero_needs_no_hessian():
    weight = torch.tensor([[1.0, -0.0, 3.0]])
    solution = sf.solve(weight, torch.full((3, 3), math.nan), 0, solver="exact")
    assert torch.equal(solution.weight.view(torch.int32), weight.view(torch.int32))
    assert solution.mask.all()


def test_refusals():
    arguments = torch.ones(2, 3), torch.eye(3), 0.5
    with pytest.raises(sf.InvalidInputError, match="block_layout='rows' is unknown: choose one of taps, channels"):
        sf.solve(*arguments, solver="exact", block_layout="rows")
    with pytest.raises(sf.InvalidInputError, match="block_layout='channels' is for solver='exact'"):
        sf.solve(*arguments, block_layout="channels")
    with pytest.raises(sf.InvalidInputError, match="solver='obc' is unknown: choose one of fast, exact"):
        sf.solve(*arguments, solver="obc")


def test_what_takes_hours_is_told_beforehand(monkeypatch):
    monkeypatch.setattr(solver, "_LONG_ELIMINATION", 1e3)
    problem = Problem(torch.randn(3, 20), torch.eye(20), (Target(0.5),), "classifier")
    with pytest.warns(
        UserWarning, match="layer 'classifier' of 20 columns takes the exact solver 4e\\+03 multiply-adds"
    ):
        solve_layers([problem], solver="exact")


@native_only
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_a_row_at_work_takes_one_triangle_and_64_vectors():
    script = """
import torch
from pathlib import Path
from spade_fast import ops

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

torch.set_num_threads(1)
weight, inverse = torch.randn(1, 2, 1536), torch.eye(1536)[None]
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
ops.elimination_orders([weight], [inverse], [1])
print(status("VmHWM:") - before)
"""
    peak = int(subprocess.check_output([sys.executable, "-c", script], text=True))
    triangle = 4 * 1536**2 // 2
    # What rows share is as large as what one has; some room for the allocator and code that is loaded.
    assert peak <= 2 * triangle + 4 * 64 * 1536 + (4 << 20)


def test_a_large_block_takes_all_columns():
    weight, hessian, _ = layer_and_hessian("1x1")
    solution = sf.solve(weight, hessian, 0.5, solver="exact", block_size=100)
    assert torch.equal(solution.mask.flatten(1).any(1), solution.mask.flatten(1).all(1))
    assert solution.mask.flatten(1).all(1).sum() == 4
    assert elimination.Blocks.of(weight.shape, 100, "taps", weight.device).size == 12
