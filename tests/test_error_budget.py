"""Error budgets: each layer as sparse as the errors of its outputs allow, image by image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spade_fast as sf
from spade_fast import solver
from spade_fast.errors import InvalidInputError
from spade_fast.solver import Problem, Target, solve_layers, solve_within
from spade_fast.sweep import sweep

pytestmark = pytest.mark.filterwarnings("ignore:.*have no weight left", "ignore:no layer can be pruned within")

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
SETTINGS: dict[str, Any] = {"preprocess": nn.Identity(), "num_augmentations": 8}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    ).eval()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("solver", ["fast", "exact"])
def test_each_layer_is_pruned_as_far_as_its_error_allows(
    model: nn.Module, image: Tensor, position: int, solver: str
) -> None:
    settings = {**SETTINGS, "solver": solver}
    errors = sweep(model, image, SHARES, **settings).errors
    # Just enough. What the exact solver knows beforehand differs by rounding from the error of its weights.
    budget = errors["2"][position] * 1.0001
    for allowed, expected in ((budget, SHARES[position]), (0.999 * budget, SHARES[position - 1] if position else None)):
        trace = sf.trace(model, image, sf.ErrorBudget(allowed, SHARES), **settings)
        assert trace.settings["error_budget"] == allowed
        if expected is None:
            assert trace.dense["2"] == "no sparsity is within the error budget"
            continue
        assert trace.layers["2"].requested_sparsity == expected
        alone = sf.trace(model, image, {"2": expected}, **settings).layers["2"]
        assert torch.equal(trace.layers["2"].weight, alone.weight)
        within = [share for share, error in zip(SHARES, errors["8"], strict=True) if error <= allowed]
        assert ("8" in trace.layers) == bool(within)
        if within:
            assert trace.layers["8"].requested_sparsity == max(within)


def test_first_and_depthwise_layers_stay_dense_unless_they_are_named(model: nn.Module, image: Tensor) -> None:
    trace = sf.trace(model, image, sf.ErrorBudget(1.0), **SETTINGS)
    assert set(trace.layers) == {"2", "8"}
    assert trace.dense["0"] == "first layer"
    assert trace.dense["4"] == "depthwise, which an error budget leaves dense unless `layers` names it"
    named = sf.trace(model, image, sf.ErrorBudget(1.0), layers=["0", "4"], **SETTINGS)
    assert set(named.layers) == {"0", "4"}


def test_a_function_may_make_the_budget(model: nn.Module, image: Tensor) -> None:
    made = sf.trace(model, image, lambda _: sf.ErrorBudget(0.05, SHARES), **SETTINGS)
    given = sf.trace(model, image, sf.ErrorBudget(0.05, SHARES), **SETTINGS)
    assert made.rows() == given.rows()
    assert made.settings == given.settings
    assert made.settings["shares"] == list(SHARES)


@pytest.mark.parametrize("layers", [5, [["2"]], "2"])
def test_layers_that_are_no_names(model: nn.Module, image: Tensor, layers: object) -> None:
    with pytest.raises(InvalidInputError, match="layers must be a sequence of names"):
        sf.trace(model, image, sf.ErrorBudget(0.05), layers=layers, **SETTINGS)  # type: ignore[arg-type]


def test_outputs_that_are_zero_have_no_error(model: nn.Module, image: Tensor) -> None:
    with torch.no_grad():
        model[2].weight.zero_()
    trace = sf.trace(model, image, sf.ErrorBudget(1e-6, SHARES), **SETTINGS)
    assert trace.layers["2"].requested_sparsity == 0.9


def test_images_have_budgets_of_their_own(model: nn.Module, image: Tensor) -> None:
    images = [image, torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(2)) ** 6]
    budget = sf.ErrorBudget(0.05, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    alone = [sf.trace(model, each, budget, **SETTINGS) for each in images]
    together = list(sf.trace_many(model, images, budget, images_in_flight=2, **SETTINGS))
    for one, same in zip(alone, together, strict=True):
        assert one.rows() == same.rows()
    assert alone[0].rows() != alone[1].rows()


def test_a_set_of_images_has_one_budget(model: nn.Module, image: Tensor) -> None:
    images = [image, 1 - image]
    errors = sweep(model, images, SHARES, **SETTINGS).errors
    trace = sf.trace(model, images, sf.ErrorBudget(errors["2"][2], SHARES), **SETTINGS)
    assert trace.layers["2"].requested_sparsity == SHARES[2]


@pytest.mark.parametrize("count", [1, 2, 7, 11])
def test_the_sparsest_allowed_target_is_found_by_bisection(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    shares = [(i + 1) / (count + 1) for i in range(count)]
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(20, 60, generator=torch.Generator().manual_seed(1))
    problem = Problem(weight, inputs @ inputs.T, tuple(Target(share) for share in shares))
    (all_of_them,) = solve_layers([problem])
    solved: list[int] = []
    prune_all = solver._prune_all

    def spy(of: Sequence[Problem], places: Sequence[tuple[int, int]], *more: Any) -> Any:
        solved.extend(j for _, j in places)
        return prune_all(of, places, *more)

    monkeypatch.setattr(solver, "_prune_all", spy)
    for best in range(-1, count):
        solved.clear()
        limit = all_of_them[best].loss if best >= 0 else 0.0
        (found,) = solve_within([problem], lambda _, loss, limit=limit: loss <= limit)
        assert len(solved) == len(set(solved)) <= count.bit_length()
        if best < 0:
            assert found is None
        else:
            assert found is not None
            assert found[0] == best
            assert torch.equal(found[1].weight, all_of_them[best].weight)


def test_refitting_changes_no_choice(model: nn.Module, image: Tensor) -> None:
    budget = sf.ErrorBudget(sweep(model, image, SHARES, **SETTINGS).errors["2"][2], SHARES)
    plain = sf.trace(model, image, budget, **SETTINGS)
    refitted = sf.trace(model, image, budget, refit=True, **SETTINGS)
    assert plain.layers.keys() == refitted.layers.keys()
    for name, layer in plain.layers.items():
        assert layer.requested_sparsity == refitted.layers[name].requested_sparsity
    alone = sf.trace(model, image, {"2": SHARES[2]}, refit=True, **SETTINGS).layers["2"]
    assert torch.equal(refitted.layers["2"].weight, alone.weight)
    assert refitted.layers["2"].loss < plain.layers["2"].loss


def test_a_budget_that_no_layer_keeps_is_told(model: nn.Module, image: Tensor) -> None:
    message = "no layer can be pruned within an error budget of 1e-09, so this trace is the dense network"
    with pytest.warns(UserWarning, match=message):
        trace = sf.trace(model, image, sf.ErrorBudget(1e-9), **SETTINGS)
    assert not trace.layers
    with pytest.warns(UserWarning, match=message):
        list(sf.trace_many(model, [image], sf.ErrorBudget(1e-9), **SETTINGS))


def test_tied_layers_stay_tied(image: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, -1)), nn.Linear(432, 9), nn.ReLU(), nn.Linear(9, 9),
                          nn.Linear(9, 9))  # fmt: skip
    model[5].weight = model[4].weight
    views = lambda image, count, _: image[None].expand(count, -1, -1, -1)  # noqa: E731
    trace = sf.trace(model, image, sf.ErrorBudget(0.5), augment=views, batch_size=1, **SETTINGS)
    assert trace.layers["4"].weight is trace.layers["5"].weight
    trace.pruned_copy(model)


@pytest.mark.parametrize("error", [0, -1, math.nan, math.inf, "0.1", True, None])
def test_budgets_that_are_none(error: object) -> None:
    with pytest.raises(InvalidInputError, match="an error budget must be a positive number"):
        sf.ErrorBudget(error)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shares", "message"), [((), "one above 0"), ((0,), "one above 0"), ((2,), "within 0")])
def test_shares_that_are_none(shares: tuple[float, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        sf.ErrorBudget(0.1, shares)


def test_shares_are_put_in_order() -> None:
    budget = sf.ErrorBudget(0.1, (0.9, 0, 0.5, 0.9))
    assert budget.shares == (0.5, 0.9)
    assert [budget.target(errors) for errors in ((0.2, 0.3), (0.1, 0.3), (0.01, 0.1), (0.3, 0.05))] == [
        0,
        0.5,
        0.9,
        0.9,
    ]
