"""Insertion, deletion and Trojan AUC by hand, against scikit-learn, and what they refuse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spade_fast as sf
from spade_fast.errors import InvalidInputError
from spade_fast.metrics import blurred, deletion, insertion, roc_curve, trojan_auc

TARGET = 1


class Scores(nn.Module):
    """A linear network; it counts the images that it sees, and how many at most at a time."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.images = self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images, self.most = self.images + len(x), max(self.most, len(x))
        return x.flatten(1) @ self.weight.flatten(1).T


@pytest.fixture
def network() -> Scores:
    return Scores(torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))).double()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def maps() -> Tensor:
    """Three maps without ties."""
    return torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(3)]).view(3, 4, 4)


def by_hand(network: nn.Module, before: Tensor, after: Tensor, map: Tensor, counts: list[int]) -> list[float]:
    """Pixel by pixel, the largest first."""
    pixels = sorted(range(16), key=lambda pixel: -map.flatten()[pixel].item())
    probabilities = []
    for count in counts:
        image = before.clone()
        for pixel in pixels[:count]:
            image[0, :, pixel // 4, pixel % 4] = after[0, :, pixel // 4, pixel % 4]
        probabilities.append(network(image)[0].softmax(0)[TARGET].item())
    return probabilities


@pytest.mark.parametrize(
    ("steps", "counts"), [(4, [0, 4, 8, 12, 16]), (3, [0, 5, 11, 16]), (16, list(range(17))), (1, [0, 16])]
)
@pytest.mark.parametrize("baseline", ["zero", "blur", "own"])
@pytest.mark.parametrize("metric", [insertion, deletion])
def test_curves_by_hand(
    network: Scores,
    inputs: Tensor,
    maps: Tensor,
    metric: Callable[..., Any],
    baseline: str,
    steps: int,
    counts: list[int],
) -> None:
    nothing = {"zero": torch.zeros_like(inputs), "blur": blurred(inputs), "own": inputs.flip(3) / 2}[baseline]
    given: Any = nothing if baseline == "own" else baseline
    found = metric(network, inputs, maps, TARGET, steps=steps, **{"start" if metric is insertion else "end": given})
    ends = (nothing, inputs) if metric is insertion else (inputs, nothing)
    expected = torch.tensor([by_hand(network, *ends, each, counts) for each in maps], dtype=torch.float64)
    torch.testing.assert_close(found.probabilities, expected)
    assert found.shares.tolist() == [count / 16 for count in counts]
    widths = [(b - a) / 16 for a, b in itertools.pairwise(counts)]
    areas = [
        sum(width * sum(pair) / 2 for width, pair in zip(widths, itertools.pairwise(curve), strict=True))
        for curve in expected.tolist()
    ]
    assert found.auc.tolist() == pytest.approx(areas)


def test_a_good_map_is_better_than_a_bad_one(network: Scores, inputs: Tensor) -> None:
    gain = (network.weight[TARGET] - network.weight.mean(0)).detach() * inputs[0]
    best = gain.sum(0)
    inserted = insertion(network, inputs, torch.stack([best, -best]), TARGET, start="zero")
    deleted = deletion(network, inputs, torch.stack([best, -best]), TARGET)
    assert inserted.auc[0] > inserted.auc[1]
    assert deleted.auc[0] < deleted.auc[1]


def test_the_way_there_is_the_way_back(network: Scores, inputs: Tensor, maps: Tensor) -> None:
    """What goes last came first: deletion of a map is insertion of its negative, read backwards."""
    there = deletion(network, inputs, maps, TARGET, steps=8)
    back = insertion(network, inputs, -maps, TARGET, steps=8, start="zero")
    torch.testing.assert_close(there.probabilities, back.probabilities.flip(1))
    torch.testing.assert_close(there.auc, back.auc)


def test_equal_attributions_come_in_one_random_order(network: Scores, inputs: Tensor) -> None:
    flat = torch.zeros(2, 4, 4)
    first, other = (insertion(network, inputs, flat, TARGET, steps=16, seed=seed).probabilities for seed in (0, 1))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, other)
    rows = insertion(network, inputs, -torch.arange(16.0).view(4, 4), TARGET, steps=16).probabilities
    assert not torch.equal(first[:1], rows)  # not row by row
    graded = flat[0].clone()
    graded[2, 1] = 1
    once = insertion(network, inputs, graded, TARGET, steps=16).probabilities[0, 1]
    assert once == pytest.approx(by_hand(network, blurred(inputs), inputs, graded, [1])[0])


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_batches_change_nothing_and_ends_are_seen_once(
    network: Scores, inputs: Tensor, maps: Tensor, batch_size: int
) -> None:
    expected = insertion(network, inputs, maps, TARGET, steps=8)
    network.images = network.most = 0
    found = insertion(network, inputs, maps, TARGET, steps=8, batch_size=batch_size)
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=0, atol=1e-14)
    assert network.images == 2 + 3 * 7
    assert network.most == max(2, min(batch_size, 21))


def test_the_network_is_left_as_it_was(inputs: Tensor, maps: Tensor) -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 3)).double().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    insertion(network, inputs, maps, TARGET)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_one_map_of_whole_numbers_will_do(network: Scores, inputs: Tensor, maps: Tensor) -> None:
    one = insertion(network, inputs.float(), maps[1], TARGET)
    assert one.probabilities.shape == (1, 17)
    torch.testing.assert_close(one.auc, insertion(network, inputs.float(), maps, TARGET).auc[1:2])


def test_blur_is_that_of_torchvision() -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image = torch.randn(1, 3, 224, 300, generator=torch.Generator().manual_seed(0))
    expected = functional.gaussian_blur(image, [11, 11], [5.0, 5.0])
    torch.testing.assert_close(blurred(image)[..., 5:-5, 5:-5], expected[..., 5:-5, 5:-5])
    constant = torch.full((1, 3, 40, 20), 0.3)
    torch.testing.assert_close(blurred(constant), constant)


@pytest.mark.parametrize("levels", [3, 20, 10**9])
def test_trojan_auc_equals_that_of_scikit_learn(levels: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(levels)
    maps = torch.randint(levels, (4, 9, 11), generator=generator).double()
    patch = torch.zeros(9, 11, dtype=torch.bool)
    patch[2:5, 3:9] = True
    maps[1] += 0.3 * levels * patch
    expected = [metrics.roc_auc_score(patch.flatten(), each.flatten()) for each in maps]
    assert trojan_auc(maps, patch).tolist() == pytest.approx(expected, abs=1e-12)
    assert trojan_auc(maps[2], patch).tolist() == pytest.approx(expected[2:3], abs=1e-12)
    for each, area in zip(maps, expected, strict=True):
        outside, inside = roc_curve(each, patch)
        wrong, right, _ = metrics.roc_curve(patch.flatten(), each.flatten(), drop_intermediate=False)
        assert outside.tolist() == pytest.approx(wrong.tolist())
        assert inside.tolist() == pytest.approx(right.tolist())
        assert torch.trapezoid(inside, outside).item() == pytest.approx(area)


def test_trojan_auc_by_hand() -> None:
    patch = torch.tensor([[True, True], [False, False]])
    maps = torch.tensor([[[3.0, 2], [1, 0]], [[0, 1], [2, 3]], [[1, 1], [1, 1]], [[2, 0], [1, 0]]])
    # Of four pairs: all, none, ties; and 2 > 1, 2 > 0, 0 < 1, 0 = 0.
    assert trojan_auc(maps, patch).tolist() == [1.0, 0.0, 0.5, 0.625]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"maps": torch.zeros(3, 4, 5)}, "maps are 4 x 5, but the model's input is 4 x 4"),
        (
            {"maps": torch.zeros(4)},
            r"maps must be a tensor of real numbers \[maps, h, w\] or \[h, w\], got torch.float32 \[4\]",
        ),
        ({"maps": torch.zeros(0, 4, 4)}, r"got torch.float32 \[0, 4, 4\]"),
        ({"maps": torch.zeros(4, 4, dtype=torch.complex64)}, "maps must be a tensor of real numbers"),
        ({"maps": [[1.0]]}, "got list"),
        ({"maps": torch.stack([torch.zeros(4, 4), torch.full((4, 4), math.nan)])}, "map 1 of 2 holds NaN or infinite"),
        ({"target": 3}, r"target 3 is no class of this model: pass an index, a whole number within 0\.\.2"),
        ({"inputs": torch.zeros(2, 2, 4, 4)}, "model inputs must be one image"),
        ({"inputs": torch.full((1, 2, 4, 4), math.nan)}, "model inputs hold NaN or infinite values"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.0}, "got 2.0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"start": "black"}, "start must be 'blur', 'zero' or a tensor of model inputs .*, got 'black'"),
        ({"start": np.zeros((2, 4, 4))}, "start must be 'blur', 'zero' or a tensor of model inputs .*, got ndarray"),
        ({"start": torch.zeros(2, 4, 5)}, r"start must be model inputs \[2, 4, 4\], got a tensor \[2, 4, 5\]"),
    ],
)
def test_refusals(network: Scores, inputs: Tensor, maps: Tensor, changed: dict[str, Any], message: str) -> None:
    given = {"inputs": inputs, "maps": maps, "target": TARGET} | changed
    with pytest.raises(InvalidInputError, match=message):
        insertion(network, **given)


def test_a_network_of_one_score(inputs: Tensor, maps: Tensor) -> None:
    one = nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 1, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="gives one score only, whose probability is always 1"):
        insertion(one, inputs, maps, 0)


def test_no_more_steps_than_pixels(network: Scores, inputs: Tensor, maps: Tensor) -> None:
    found, wanted = (insertion(network, inputs, maps, TARGET, steps=steps) for steps in (10**9, 16))
    assert torch.equal(found.shares, torch.arange(17) / 16)
    assert torch.equal(found.probabilities, wanted.probabilities)
    assert torch.equal(found.auc, wanted.auc)


def test_outputs_that_are_no_scores(inputs: Tensor, maps: Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"must give one score for each class, \[2, classes\]"):
        insertion(nn.Identity(), inputs, maps, 0)
    scores = Scores(torch.full((3, 2, 4, 4), math.inf)).double()
    with pytest.raises(InvalidInputError, match="Scores gives NaN or infinite class scores for a partly shown image"):
        deletion(scores, inputs, maps, 0)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (torch.zeros(4, 4), r"patch must be a bool tensor \[h, w\], got torch.float32 \[4, 4\]"),
        (torch.zeros(1, 4, 4, dtype=torch.bool), r"got torch.bool \[1, 4, 4\]"),
        (torch.zeros(4, 4, dtype=torch.bool), "covers none of the image"),
        (torch.ones(4, 4, dtype=torch.bool), "covers all of the image"),
        (torch.ones(5, 4, dtype=torch.bool), "maps are 4 x 4, but the patch is 5 x 4"),
    ],
)
def test_patches_that_tell_nothing(maps: Tensor, patch: Tensor, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        trojan_auc(maps, patch)
    with pytest.raises(InvalidInputError, match=message):
        roc_curve(maps[0], patch)


def test_a_roc_curve_is_of_one_map(maps: Tensor) -> None:
    patch = torch.eye(4, dtype=torch.bool)
    with pytest.raises(InvalidInputError, match=r"of one map \[h, w\], got \[3, 4, 4\]"):
        roc_curve(maps, patch)


def test_they_are_where_the_package_says() -> None:
    assert sf.metrics.insertion is insertion


def test_beyond_its_edge_an_image_goes_on_as_it_ends() -> None:
    image = torch.zeros(1, 1, 1, 224, dtype=torch.float64).expand(1, 1, 224, 224).clone()
    image[..., 0] = 1.0  # a bright first column
    side = torch.arange(-5, 6, dtype=torch.float64)
    weights = torch.exp(-0.5 * (side / 5) ** 2)
    weights /= weights.sum()
    # At the edge half of the Gaussian and its middle lie on that column, or beyond it.
    torch.testing.assert_close(blurred(image)[0, 0, 100, 0], weights[:6].sum())
    torch.testing.assert_close(blurred(image)[0, 0, 0, 2], weights[:4].sum())
