"""Error budgets: each layer as sparse as the errors of its outputs allow, image by image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spade_fast as sf
from spade_fast.errors import InvalidInputError
from spade_fast.sweep import sweep

pytestmark = pytest.mark.filterwarnings("ignore:.*have no weight left")

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
def test_each_layer_is_pruned_as_far_as_its_error_allows(model: nn.Module, image: Tensor, position: int) -> None:
    errors = sweep(model, image, SHARES, **SETTINGS).errors
    budget = errors["2"][position]  # just enough
    for allowed, expected in ((budget, SHARES[position]), (0.999 * budget, SHARES[position - 1] if position else None)):
        trace = sf.trace(model, image, sf.ErrorBudget(allowed, SHARES), **SETTINGS)
        assert trace.settings["error_budget"] == allowed
        if expected is None:
            assert trace.dense["2"] == "no sparsity is within the error budget"
            continue
        assert trace.layers["2"].requested_sparsity == expected
        alone = sf.trace(model, image, {"2": expected}, **SETTINGS).layers["2"]
        assert torch.equal(trace.layers["2"].weight, alone.weight)
        within = [share for share, error in zip(SHARES, errors["8"], strict=True) if error <= allowed]
        assert ("8" in trace.layers) == bool(within)
        if within:
            assert trace.layers["8"].requested_sparsity == max(within)


def test_first_and_depthwise_layers_stay_dense_unless_they_are_named(model: nn.Module, image: Tensor) -> None:
    trace = sf.trace(model, image, sf.ErrorBudget(1.0), **SETTINGS)
    assert set(trace.layers) == {"2", "8"}
    assert trace.dense["0"] == "first layer"
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
