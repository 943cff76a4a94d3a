"""Feature visualization: known optima, equal bits, the network left as it was, refusals, figure and files."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from spade_fast import visualization
from spade_fast.errors import InvalidInputError, MissingDependencyError
from spade_fast.models import LoadedModel
from spade_fast.preprocessing import Preprocess
from spade_fast.traces import LayerTrace, Trace
from spade_fast.visualization import Visualization, visualize

pytest.importorskip("lucent")
pytest.importorskip("matplotlib")

QUICK: dict[str, Any] = {"thresholds": (3,), "size": 12, "preprocess": nn.Identity()}


class Colours(nn.Module):
    """Channel 0 of `see` is the red of the image alone; class 1 is the mean green minus the mean blue."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(3, 2, 1, bias=False)
        self.judge = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.see.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]])[:, :, None, None])
            self.judge.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, -1]]))

    def forward(self, x: Tensor) -> Tensor:
        self.see(x)
        return self.judge(x.mean(dim=(2, 3)))


class Tiny(nn.Module):
    """A network with a part of every kind: maps, tokens, a module called twice, in-place operations, dead ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.tokens = nn.Linear(8, 5)
        self.pair = Pair()
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.conv(x))
        tokens = self.tokens(x.flatten(2).transpose(1, 2))
        self.pair(tokens)
        return self.fc(tokens.mean(dim=1))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def load_tiny() -> LoadedModel:
    torch.manual_seed(0)
    preprocess = Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), input_size=16, resize_size=18)
    module = Tiny()
    with torch.no_grad():  # of one channel the activation is below zero, another one's statistics are not the default
        module.norm.bias[3] = -100
        module.norm.running_mean.normal_()
    return LoadedModel("tiny", module.eval(), preprocess, ("ant", "bee", "cat", "a $dog$"), "random")


def pruned(network: nn.Module, name: str, keep: Callable[[Tensor], Tensor], sparsity: float = 0.5) -> Trace:
    weight = network.get_submodule(name).weight.detach()
    mask = keep(weight)
    return Trace({name: LayerTrace(weight * mask, mask, sparsity, 0.0, 0.0)}, settings={"seed": 7})


def halved(network: nn.Module) -> Trace:
    return pruned(network, "conv", lambda weight: weight.abs() > weight.abs().median())


@pytest.fixture
def loaded() -> LoadedModel:
    return load_tiny()


@pytest.fixture(scope="module")
def found() -> Visualization:
    loaded = load_tiny()
    traces = [halved(loaded.module), pruned(loaded.module, "tokens", lambda weight: weight > 0)]
    return visualize(loaded, "fc", 1, trace=traces, thresholds=(2, 4))


def state(network: nn.Module) -> tuple[object, ...]:
    """Everything about a network that might be left changed; tensors by identity and by value."""
    return (
        [(name, id(parameter), parameter.requires_grad) for name, parameter in network.named_parameters()],
        [value.tolist() for value in network.state_dict().values()],
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in network.parameters()],
        [module.training for module in network.modules()],
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
            for m in network.modules()
        ],
    )


def seed_all(seed: int) -> None:
    """Seed as `visualize` never does, so that what it leaves behind shows."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def random_state() -> tuple[object, ...]:
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


# What the images show


@pytest.mark.parametrize("fourier", [True, False])
@pytest.mark.parametrize("decorrelate", [True, False])
def test_image_for_a_channel_that_sees_red_is_red(fourier: bool, decorrelate: bool) -> None:
    settings = {**QUICK, "thresholds": (1, 150), "fourier": fourier, "decorrelate": decorrelate, "learning_rate": 0.1}
    result = visualize(Colours(), "see", 0, transforms=[], **settings)
    first, last = (image.mean(dim=(1, 2)) for image in result.dense)
    assert last[0] > 0.9
    assert last[0] - first[0] > 0.3
    if not decorrelate:  # where colours are optimised one by one, the others stay as they were
        assert (last[1:] - 0.5).abs().max() < 0.02
    assert result.dense_score == pytest.approx(last[0].item(), abs=1e-5)


def test_image_for_a_class_that_is_green_and_not_blue() -> None:
    result = visualize(Colours(), "judge", 1, decorrelate=False, **{**QUICK, "thresholds": (200,)})
    red, green, blue = result.dense[-1].mean(dim=(1, 2)).tolist()
    assert green > 0.65
    assert blue < 0.35
    assert abs(red - 0.5) < 0.02
    assert result.dense_score == pytest.approx(green - blue, abs=1e-5)
    assert result.name == "class 1"


@pytest.mark.parametrize("layer", ["stem", "norm", "conv", "relu", "tokens", "fc"])
def test_activation_rises(loaded: LoadedModel, layer: str) -> None:
    channel = 0 if layer == "fc" else 1
    scores = [visualize(loaded, layer, channel, thresholds=(steps,)).dense_score for steps in (1, 20, 60)]
    assert scores[0] + 0.003 < scores[1] < scores[2] - 0.003


@pytest.mark.parametrize(
    ("layer", "channel", "name", "kind"),
    [
        ("conv", 7, "channel 7", "channel"),
        ("tokens", 4, "unit 4", "unit"),
        ("fc", 2, "cat", "class"),
    ],
)
def test_score_is_the_mean_activation_without_transforms(
    loaded: LoadedModel, layer: str, channel: int, name: str, kind: str
) -> None:
    result = visualize(loaded, layer, channel, thresholds=(2, 3))
    outputs: list[Tensor] = []
    submodule = loaded.module.get_submodule(layer)
    with submodule.register_forward_hook(lambda _, __, output: outputs.append(output.clone())), torch.no_grad():
        loaded.module(loaded.preprocess(result.dense[-1:]))
    axis = 2 if layer == "tokens" else 1
    assert result.dense_score == pytest.approx(outputs[0].select(axis, channel).mean().item(), rel=1e-6)
    assert (result.name, result.settings["kind"]) == (name, kind)
    assert (result.layer, result.channel, result.thresholds) == (layer, channel, (2, 3))


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def test_map_with_channels_last() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 20, 1)
    network = nn.Sequential(conv, ChannelsLast())
    expected = visualize(network, "0", 15, **QUICK)
    result = visualize(network, "1", 15, **QUICK)
    assert torch.allclose(result.dense, expected.dense, atol=1e-4)
    assert result.dense_score == pytest.approx(expected.dense_score, rel=1e-3)
    assert result.name == "channel 15"


def test_activation_is_that_of_the_layer_and_not_of_what_works_on_it_in_place(loaded: LoadedModel) -> None:
    result = visualize(loaded, "norm", 3, thresholds=(1,))  # channel 3 is negative; the ReLU behind it is in place
    assert result.dense_score < -50


def test_last_call_of_a_module_counts(loaded: LoadedModel) -> None:
    # Channel 3 is never active in the first call of the ReLU; in the last it is what comes out of `conv`.
    assert visualize(loaded, "relu", 3, thresholds=(1,)).dense_score > 0


def test_images_are_pixels_after_each_threshold(loaded: LoadedModel, found: Visualization) -> None:
    assert (found.dense.shape, found.dense.dtype, found.dense.device.type) == ((2, 3, 16, 16), torch.float32, "cpu")
    assert all(images.shape == found.dense.shape for images in found.spade)
    for images in (found.dense, *found.spade):
        assert 0 <= images.min() < images.max() <= 1
        assert not images.requires_grad
        assert not torch.equal(images[0], images[1])
    early = visualize(loaded, "fc", 1, thresholds=[2])
    assert torch.equal(early.dense[0], found.dense[0])


def test_noise_begins_the_same_in_fourier_space_and_differs_by_parametrization(loaded: LoadedModel) -> None:
    images = [
        visualize(loaded, "fc", 1, thresholds=(1,), fourier=fourier, decorrelate=decorrelate).dense
        for fourier, decorrelate in itertools.product((True, False), repeat=2)
    ]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(images, 2))


def test_a_network_that_works_in_place_on_its_input() -> None:
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1))
    result = visualize(network, "1", 0, transforms=[], **QUICK)
    assert result.dense.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_network_of_another_dtype(loaded: LoadedModel, dtype: torch.dtype) -> None:
    loaded.module.to(dtype)
    assert visualize(loaded, "fc", 1, thresholds=(2,)).dense.dtype == torch.float32


def test_module_names_that_would_be_one_if_joined_by_underscores() -> None:
    torch.manual_seed(0)
    network = nn.Sequential()
    network.add_module("a_b", nn.Sequential(nn.Conv2d(3, 2, 1)))
    network.add_module("a", nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 1))))
    network.a.add_module("b_0", nn.Identity())
    assert visualize(network, "a.0.0", 3, **QUICK).name == "channel 3"
    with pytest.raises(InvalidInputError, match=r"layer 'a_b.0' has 2 channels, and 3 is none of them"):
        visualize(network, "a_b.0", 3, **QUICK)


# Traces


def test_each_trace_is_visualised_with_its_own_weights(loaded: LoadedModel, found: Visualization) -> None:
    traces = [halved(loaded.module), pruned(loaded.module, "tokens", lambda weight: weight > 0)]
    for trace, images, score in zip(traces, found.spade, found.spade_scores, strict=True):
        alone = visualize(trace.pruned_copy(loaded), "fc", 1, thresholds=(2, 4), preprocess=loaded.preprocess)
        assert torch.equal(alone.dense, images)
        assert alone.dense_score == score
    assert torch.equal(visualize(loaded, "fc", 1, thresholds=(2, 4)).dense, found.dense)
    pictures = (found.dense, *found.spade)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(pictures, 2))


def test_trace_that_keeps_everything_gives_the_dense_images(loaded: LoadedModel) -> None:
    result = visualize(loaded, "fc", 1, trace=pruned(loaded.module, "conv", torch.ones_like), thresholds=(3,))
    assert torch.equal(result.spade[0], result.dense)
    assert result.spade_scores == (result.dense_score,)


def test_trace_without_green_turns_no_image_green() -> None:
    network = Colours()
    trace = pruned(network, "judge", lambda _: torch.tensor([[True, True, True], [True, False, True]]))
    result = visualize(network, "judge", 1, trace=trace, decorrelate=False, **{**QUICK, "thresholds": (200,)})
    dense, spade = (images[-1].mean(dim=(1, 2)) for images in (result.dense, result.spade[0]))
    assert dense[1] > 0.65
    assert abs(spade[1] - 0.5) < 0.02
    assert spade[2] < 0.35


def test_a_neuron_that_the_trace_lost_is_warned_of(loaded: LoadedModel) -> None:
    trace = pruned(loaded.module, "fc", torch.zeros_like)
    with pytest.warns(UserWarning, match="channel 1 of layer 'fc' answers to nothing in the trace") as caught:
        result = visualize(loaded, "fc", 1, trace=trace, thresholds=(1, 3))
    assert caught[0].filename == __file__
    assert torch.equal(result.spade[0][0], result.spade[0][1])
    assert not torch.equal(result.dense[0], result.dense[1])


# Random numbers


def test_same_seed_gives_same_bits_and_another_one_others(loaded: LoadedModel, found: Visualization) -> None:
    seed_all(5)
    trace = halved(loaded.module)
    settings: dict[str, Any] = {"trace": trace, "thresholds": (2, 4)}
    again, other = (visualize(loaded, "fc", 1, seed=seed, **settings) for seed in (0, 1))
    assert torch.equal(again.dense, found.dense)
    assert torch.equal(again.spade[0], found.spade[0])
    assert not torch.equal(other.dense, found.dense)
    assert (other.dense - found.dense).abs().max() > 1e-3


def test_seeds_beyond_32_bits_differ(loaded: LoadedModel) -> None:
    images = [visualize(loaded, "fc", 1, seed=seed, thresholds=(2,)).dense for seed in (1, 1 + 2**32, 2**63 - 1)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(images, 2))


def draws_from_everything(image: Tensor) -> Tensor:
    return image + 0.1 * (random.random() + np.random.rand() + torch.rand(1))  # noqa: NPY002


def test_transforms_of_the_caller_are_seeded_and_used(loaded: LoadedModel) -> None:
    settings: dict[str, Any] = {"thresholds": (3,), "transforms": [draws_from_everything]}
    one, same, other = (visualize(loaded, "fc", 1, seed=seed, **settings).dense for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, visualize(loaded, "fc", 1, thresholds=(3,), transforms=[]).dense)


@pytest.mark.parametrize("failing_call", [None, 3])
def test_random_numbers_go_on_as_if_nothing_had_been_drawn(loaded: LoadedModel, failing_call: int | None) -> None:
    seed_all(99)
    before = random_state()
    if failing_call is None:
        visualize(loaded, "fc", 1, thresholds=(3,), transforms=[draws_from_everything])
        visualize(loaded, "fc", 1, thresholds=(3,))
    else:
        failing_in_call(loaded.module, failing_call, RuntimeError("no"))
        with pytest.raises(InvalidInputError):
            visualize(loaded, "fc", 1)
    assert random_state() == before


@pytest.mark.parametrize("standard", [True, False])
def test_network_sees_images_of_the_size_asked_for(loaded: LoadedModel, standard: bool) -> None:
    shapes = set()
    loaded.module.stem.register_forward_hook(lambda _, args, __: shapes.add(tuple(args[0].shape)))
    transforms = None if standard else [nn.ZeroPad2d((3, 0, 0, 8))]
    visualize(loaded, "fc", 1, thresholds=(20,), size=11, transforms=transforms)
    assert shapes == {(1, 3, 11, 11)}


def test_without_transforms_what_is_seen_is_the_image(loaded: LoadedModel) -> None:
    seen: list[Tensor] = []
    loaded.module.stem.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    result = visualize(loaded, "fc", 1, thresholds=(1, 2), transforms=())
    assert torch.equal(seen[2], loaded.preprocess(result.dense[:1]))  # a trial, step 1, step 2


def test_inference_mode_autocast_and_no_grad_change_nothing(loaded: LoadedModel, found: Visualization) -> None:
    with torch.inference_mode(), torch.autocast("cpu"):
        result = visualize(loaded, "fc", 1, thresholds=(2, 4))
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(result.dense, found.dense)
    with torch.no_grad():
        assert torch.equal(visualize(loaded, "fc", 1, thresholds=(2, 4)).dense, found.dense)
        assert not torch.is_grad_enabled()


def test_default_device_changes_nothing(loaded: LoadedModel) -> None:
    expected = visualize(loaded, "fc", 1, **QUICK)
    with torch.device("meta"):
        assert torch.equal(visualize(loaded, "fc", 1, **QUICK).dense, expected.dense)


def test_network_on_the_cpu_of_a_machine_with_a_gpu(
    loaded: LoadedModel, found: Visualization, monkeypatch: pytest.MonkeyPatch
) -> None:
    visualization._lucent.cache_clear()
    transform = pytest.importorskip("lucent.optvis.transform")
    monkeypatch.setattr(transform, "device", torch.device("cuda:0"))
    try:
        with monkeypatch.context() as there:
            there.setattr(torch.cuda, "is_available", lambda: True)  # what lucent chooses its device by, on import
            visualization._lucent()
        result = visualize(loaded, "fc", 1, thresholds=(2, 4))
    finally:
        visualization._lucent.cache_clear()
    assert torch.equal(result.dense, found.dense)
    assert transform.device == torch.device("cuda:0")  # lucent's own is left to its other users


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_network_on_the_last_gpu(loaded: LoadedModel, found: Visualization) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    loaded.module.to(device)
    before = torch.cuda.get_rng_state(device), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    one, same = (visualize(loaded, "fc", 1, thresholds=(2, 4), trace=halved(loaded.module)) for _ in range(2))
    assert torch.equal(one.dense, same.dense)
    assert torch.equal(one.spade[0], same.spade[0])
    assert one.dense.device.type == "cpu"
    assert (one.dense - found.dense).abs().max() < 1e-2
    assert torch.equal(torch.cuda.get_rng_state(device), before[0])
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before[1:]


# The network is left as it was


def failing_in_call(network: nn.Module, call: int, failure: BaseException) -> None:
    """Have the last layer of a network fail, in its class alone, so that no hook is needed."""

    class Failing(type(network.fc)):  # type: ignore[misc]
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Failing.calls += 1
            if Failing.calls == call:
                raise failure
            return super().forward(x)

    network.fc.__class__ = Failing


def prepared(network: nn.Module) -> nn.Module:
    network.train()
    network.norm.eval()
    network.stem.weight.grad = torch.ones(8, 3, 3, 3)
    network.fc.weight.requires_grad_(False)
    network.conv.register_forward_hook(lambda *_: None)
    return network


def test_network_is_left_as_it_was(loaded: LoadedModel) -> None:
    before = state(prepared(loaded.module))
    visualize(loaded, "conv", 1, trace=halved(loaded.module), thresholds=(3,))
    assert state(loaded.module) == before


# A trial comes first. Calls 2 to 4 are the steps of the dense network, 5 its score, 6 to 8 the steps of the trace.
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (1, r"Tiny fails in a first trial of the dense network, on an image of 16 x 16 pixels \(RuntimeError: no\)"),
        (4, "Tiny fails in step 3 for the dense network"),
        (5, "Tiny fails on the finished image for the dense network"),
        (8, "Tiny fails in step 3 for the trace"),
    ],
)
@pytest.mark.parametrize("layer", ["conv", "fc"])
def test_network_that_fails_is_refused_and_left_as_it_was(
    loaded: LoadedModel, call: int, message: str, layer: str
) -> None:
    trace = halved(loaded.module)
    failing_in_call(prepared(loaded.module), call, RuntimeError("no"))
    before = state(loaded.module)
    with pytest.raises(InvalidInputError, match=message) as caught:
        visualize(loaded, layer, 1, trace=trace, thresholds=(3,))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert state(loaded.module) == before


@pytest.mark.parametrize("call", [1, 4, 8])
def test_ctrl_c_gets_through_and_leaves_the_network_as_it_was(loaded: LoadedModel, call: int) -> None:
    trace = halved(loaded.module)
    failing_in_call(prepared(loaded.module), call, KeyboardInterrupt())
    seed_all(99)
    before = state(loaded.module), random_state()
    with pytest.raises(KeyboardInterrupt):
        visualize(loaded, "fc", 1, trace=trace, thresholds=(3,))
    assert (state(loaded.module), random_state()) == before


def test_differences_in_state_are_seen(loaded: LoadedModel) -> None:
    network = loaded.module
    before = state(network)
    network.conv.train()
    assert state(network) != before
    network.conv.eval()
    assert state(network) == before
    handle = network.conv.register_forward_hook(lambda *_: None)
    assert state(network) != before
    handle.remove()
    network.conv.weight.grad = torch.zeros_like(network.conv.weight)
    assert state(network) != before


def test_network_runs_in_evaluation_mode(loaded: LoadedModel) -> None:
    modes: list[bool] = []
    loaded.module.train()
    loaded.module.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    visualize(loaded, "fc", 1, thresholds=(2,), trace=halved(loaded.module))
    assert modes == [False] * 7  # a trial, and for either network two steps and the score


# Refusals


def resizing(batch: Tensor) -> Tensor:
    return batch[0]


def raising(batch: Tensor) -> Tensor:
    raise ValueError(f"cannot take {list(batch.shape)}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "tokenz"}, r"Tiny has no layer 'tokenz'; nearest: 'tokens'"),
        ({"layer": ""}, "Tiny has no layer ''; nearest: "),
        ({"layer": "unused"}, "layer 'unused' is not called when Tiny runs"),
        ({"layer": "pair"}, r"layer 'pair' gives a tuple, not a float tensor \[n, c, h, w\], \[n, t, c\] or \[n, c\]"),
        ({"channel": 4}, r"layer 'fc' has 4 channels, and 4 is none of them: pass one within 0\.\.3"),
        ({"layer": "tokens", "channel": 5}, "layer 'tokens' has 5 channels"),
        ({"layer": "conv", "channel": 8}, "layer 'conv' has 8 channels"),
        ({"channel": -1}, "channel must be a whole number of at least 0, got -1"),
        ({"channel": True}, "channel must be a whole number of at least 0, got True"),
        ({"size": 0}, "size must be a whole number of at least 1, got 0"),
        ({"thresholds": ()}, r"thresholds must be a sequence of numbers of steps, such as \(512,\), got \(\)"),
        ({"thresholds": 512}, "thresholds must be a sequence .* got 512"),
        ({"thresholds": (5, 5)}, r"thresholds must increase, got \[5, 5\]"),
        ({"thresholds": (0, 5)}, "each of thresholds must be a whole number of at least 1, got 0"),
        ({"thresholds": (1.5,)}, "each of thresholds must be a whole number of at least 1, got 1.5"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"fourier": "no"}, "fourier must be True or False, got 'no'"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number above 0, got nan"),
        ({"transforms": resizing}, r"transforms must be a sequence of functions of a batch \[1, 3, h, w\]"),
        ({"transforms": [None]}, "transforms must be a sequence of functions"),
        ({"transforms": [resizing]}, r"transform resizing must give a batch \[1, 3, h, w\], got \[3, 16, 16\]"),
        ({"transforms": [raising]}, r"transform raising fails \(ValueError: cannot take \[1, 3, 16, 16\]\)"),
        ({"transforms": [torch.detach]}, "no gradient flows from layer 'fc' to the image"),
        ({"preprocess": raising}, r"Tiny fails in a first trial .* \(ValueError: cannot take"),
        ({"preprocess": 3}, "preprocess must be a function of a batch of pixels, got 3"),
        ({"trace": 3}, "trace must be a spade_fast.Trace or a sequence of them, got a int"),
        ({"trace": [Trace({}), "file"]}, r"trace\[1\] is a str: pass what spade_fast.trace returns"),
        ({"trace": pruned(nn.ModuleDict({"x": nn.Linear(2, 2)}), "x", torch.ones_like)}, "'x' is missing"),
    ],
)
def test_refusals_come_before_the_first_step(
    loaded: LoadedModel, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visualization, "_ascend", lambda *_: pytest.fail("the ascent began"))
    before = state(loaded.module)
    with pytest.raises(InvalidInputError, match=message):
        visualize(loaded, **{"layer": "fc", "channel": 1, **arguments})
    assert state(loaded.module) == before


def test_standard_transforms_need_the_usual_default_dtype(loaded: LoadedModel) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(InvalidInputError, match="default dtype to be float32, not torch.float64"):
            visualize(loaded, "fc", 1)
        assert visualize(loaded, "fc", 1, transforms=[], thresholds=(1,)).dense.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_size_must_be_known(loaded: LoadedModel) -> None:
    with pytest.raises(InvalidInputError, match="Tiny does not say how its inputs are normalised"):
        visualize(loaded.module, "fc", 1)
    with pytest.raises(InvalidInputError, match="input size is not known: pass size=, in pixels"):
        visualize(loaded.module, "fc", 1, preprocess=nn.Identity())
    assert visualize(loaded, "fc", 1, preprocess=nn.Identity(), thresholds=(1,)).dense.shape[-1] == 16


@pytest.mark.parametrize("model", [nn.Conv2d(3, 2, 1), "efficientnet_lite0"])
def test_what_has_no_layers(model: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"it has none: wrap it in nn.Sequential|pass an nn.Module"):
        visualize(model, "weight", 0, **QUICK)


def test_integers_have_no_gradient() -> None:
    class Integers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.long()

    with pytest.raises(InvalidInputError, match=r"layer '1' gives torch.int64 \[1, 2, 12, 12\], not a float tensor"):
        visualize(nn.Sequential(nn.Conv2d(3, 2, 1), Integers()), "1", 0, **QUICK)


def test_nan_is_refused(loaded: LoadedModel) -> None:
    with torch.no_grad():
        loaded.module.fc.bias[1] = torch.nan
    with pytest.raises(InvalidInputError, match="layer 'fc' of Tiny gives NaN or infinite values in a first trial"):
        visualize(loaded, "fc", 1)
    assert visualize(loaded, "fc", 2, thresholds=(1,)).name == "cat"


def test_missing_lucent_names_the_cure(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    visualization._lucent.cache_clear()
    monkeypatch.setitem(sys.modules, "lucent.optvis.transform", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'spade-fast\[visualize\]'"):
        visualize(loaded, "fc", 1)


def test_import_of_lucent_warns_of_nothing(tmp_path: Path) -> None:
    import subprocess

    code = "from spade_fast.visualization import _lucent; _lucent()"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Figure and files


def drawn_texts(figure: Any) -> list[tuple[str, Any]]:
    """Every text on the page that is not empty, and the box it takes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]


def collisions(figure: Any) -> list[str]:
    """Texts that reach beyond the page, into a picture or into another text."""
    texts = drawn_texts(figure)
    found = [
        f"{text!r} is clipped"
        for text, box in texts
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1
    ]
    found += [
        f"{one!r} lies over {other!r}"
        for (one, box), (other, its) in itertools.combinations(texts, 2)
        if box.overlaps(its)
    ]
    for axes in figure.axes:
        found += [f"{text!r} lies over a picture" for text, box in texts if box.overlaps(axes.get_window_extent())]
    return found


@pytest.mark.parametrize("kind", ["class", "channel"])
@pytest.mark.parametrize("traces", [0, 1, 2, 5])
@pytest.mark.parametrize("photographed", [False, True])
def test_nothing_in_the_figure_is_clipped_or_covered(
    found: Visualization, kind: str, traces: int, photographed: bool
) -> None:
    long = replace(
        found,
        spade=found.spade[:1] * traces,
        spade_scores=(-123456.789,) * traces,
        name="a $class$ whose name goes on and on and on, and then some more" if kind == "class" else "channel 1024",
        layer="a.module.within.a.module.within.a.module.within.another",
        settings={**found.settings, "kind": kind, "model": "an_architecture_with_a_name_as_long_as_they_come"},
    )
    shapes = [(20, 30), (30, 20), (16, 16), (10, 40), (40, 10)]
    photos = [torch.rand(3, *shape) for shape in shapes[:traces]] if photographed else None
    figure = long.figure(photos=photos)
    assert collisions(figure) == []
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == len(figure.axes) == 2 * (traces + 1) + (traces if photographed else 0)


def test_collisions_would_be_noticed(found: Visualization) -> None:
    figure = found.figure()
    assert collisions(figure) == []
    figure.text(0.99, 0.001, "reaches out")
    figure.text(0.5, 0.5, "covers")
    figure.text(0.5, 0.5, "is covered")
    assert collisions(figure)[0] == "'reaches out' is clipped"
    assert "'covers' lies over 'is covered'" in collisions(figure)
    assert "'covers' lies over a picture" in collisions(figure)


def test_figure_shows_all_images_where_they_belong(found: Visualization) -> None:
    photos = [Image.new("RGB", (30, 20), "red"), torch.zeros(3, 8, 8)]
    figure = found.figure(photos=photos)
    texts = [text for text, _ in drawn_texts(figure)]
    assert "“bee”" in texts
    assert {"Dense network", "SPADE trace 1", "SPADE trace 2", "Photograph 1", "Photograph 2"} <= set(texts)
    assert {"2 steps", "4 steps", f"activation {found.dense_score:.3g}"} <= set(texts)
    shown = {
        (axes.get_title(), axes.get_ylabel(), axes.get_xlabel()): axes.images[0].get_array() for axes in figure.axes
    }
    scores = [f"activation {score:.3g}" for score in (found.dense_score, *found.spade_scores)]
    expected = {
        ("Dense network", "2 steps", ""): found.dense[0],
        ("", "4 steps", scores[0]): found.dense[1],
        ("SPADE trace 1", "", ""): found.spade[0][0],
        ("", "", scores[1]): found.spade[0][1],
        ("SPADE trace 2", "", ""): found.spade[1][0],
        ("", "", scores[2]): found.spade[1][1],
        ("Photograph 1", "", ""): torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 20, 30),
        ("Photograph 2", "", ""): photos[1],
    }
    assert shown.keys() == expected.keys()
    for key, image in expected.items():
        assert np.array_equal(shown[key], image.permute(1, 2, 0).numpy())


def test_photos_are_one_for_each_trace(found: Visualization, tmp_path: Path) -> None:
    for act in (found.figure, lambda **photos: found.save(tmp_path, **photos)):
        with pytest.raises(InvalidInputError, match="1 photos for 2 traces: pass one for each"):
            act(photos=[torch.zeros(3, 8, 8)])
    assert not list(tmp_path.iterdir())


def test_figure_needs_no_pyplot(found: Visualization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    found.figure()


def test_save_writes_everything(found: Visualization, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    found.save(folder)
    files = found.save(folder, photos=[torch.zeros(3, 8, 8)] * 2)  # again, over the first
    written = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert written == files  # and no temporary files
    arms = {"dense": found.dense, "spade_1": found.spade[0], "spade_2": found.spade[1]}
    for arm, images in arms.items():
        for threshold, image in zip((2, 4), images, strict=True):
            assert torch.equal(torch.from_numpy(np.load(files[f"images/{arm}_{threshold}.npy"])), image)
            with Image.open(files[f"images/{arm}_{threshold}.png"]) as picture:
                pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
            assert (pixels - image).abs().max() <= 0.5 / 255 + 1e-6
    assert len(files) == 2 * 6 + 2
    assert list(files)[-1] == "report.json"
    assert json.loads(files["report.json"].read_text(encoding="utf-8")) == found.report()
    with Image.open(files["visualization.png"]) as picture:
        inches = found.figure(photos=[torch.zeros(3, 8, 8)] * 2).get_size_inches()
        assert picture.size == tuple(int(160 * side) for side in inches)


def test_save_where_nothing_can_be_written(found: Visualization, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInputError, match=r"cannot write '.*visualization.png' \(Not a directory\)"):
        found.save(tmp_path / "file" / "folder")


def test_report_is_plain_json(found: Visualization) -> None:
    report = json.loads(json.dumps(found.report(), allow_nan=False))
    assert report == found.report()
    assert (report["layer"], report["channel"], report["name"], report["thresholds"]) == ("fc", 1, "bee", [2, 4])
    assert report["spade_scores"] == list(found.spade_scores)
    settings = report["settings"]
    assert (settings["model"], settings["weights"], settings["size"], settings["seed"]) == ("tiny", "random", 16, 0)
    assert settings["transforms"] == "standard"
    assert Preprocess.from_dict(settings["preprocess"]).input_size == 16
    assert [trace["settings"] for trace in settings["traces"]] == [{"seed": 7}] * 2
    assert settings["traces"][0]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert set(report["versions"]) == {"spade_fast", "torch", "torch-lucent", "python"}


def test_result_can_be_pickled_and_not_changed(found: Visualization) -> None:
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.dense, found.dense)
    assert again.report() == found.report()
    with pytest.raises(TypeError):
        found.settings["seed"] = 1  # type: ignore[index]


def test_progress_is_shown_on_stderr_only_when_asked_for(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    visualize(loaded, "fc", 1, thresholds=(2,))
    assert capsys.readouterr() == ("", "")
    visualize(loaded, "fc", 1, thresholds=(2,), trace=halved(loaded.module), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "visualization" in err
    assert "/4" in err
