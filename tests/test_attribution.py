"""Attribution maps against gradients taken by hand, refusals, and the network left as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast import attribution
from spade_fast.attribution import METHODS, Method, attribute, find_method
from spade_fast.errors import InvalidInputError, MissingDependencyError
from spade_fast.models import LoadedModel
from spade_fast.preprocessing import IMAGENET

pytest.importorskip("captum")

TARGET = 2


class Residual(nn.Module):
    """Two convolutions around a skip connection; batch norm and dropout behave differently in training.

    One ReLU is called twice and works in place, another is a function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = F.relu6(self.relu(x + self.conv(x)) - 0.1)
        return self.fc(self.drop(x).mean(dim=(2, 3)))


@pytest.fixture
def network() -> Residual:
    torch.manual_seed(0)
    network = Residual()
    network.norm.running_mean.uniform_(-0.5, 0.5)
    return network


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(1, 3, 8, 10, generator=torch.Generator().manual_seed(1))


def gradient(network: nn.Module, inputs: Tensor) -> Tensor:
    """The gradient of the target's score in evaluation mode, by autograd alone."""
    network.eval()
    point = inputs.clone().requires_grad_()
    (result,) = torch.autograd.grad(network(point)[:, TARGET].sum(), point)
    return result


def integrated(network: nn.Module, inputs: Tensor) -> Tensor:
    """Integrated gradients from zero, by 50-point Gauss-Legendre quadrature over 0..1."""
    nodes, weights = np.polynomial.legendre.leggauss(50)
    total = torch.zeros_like(inputs)
    for node, weight in zip(nodes, weights, strict=True):
        total += weight / 2 * gradient(network, (node + 1) / 2 * inputs)
    return total * inputs


BY_HAND: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "saliency": gradient,
    "input_x_gradient": lambda network, inputs: inputs * gradient(network, inputs),
    "integrated_gradients": integrated,
}


@pytest.mark.parametrize("method", BY_HAND)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6), (torch.bfloat16, 0.1)])
def test_equals_the_method_by_hand(
    network: Residual, inputs: Tensor, method: str, dtype: torch.dtype, tolerance: float
) -> None:
    expected = BY_HAND[method](network.double(), inputs.double()).abs().sum(dim=1)[0]
    heat = attribute(network.to(dtype), inputs, TARGET, method)
    assert (heat.dtype, heat.device.type, list(heat.shape)) == (torch.float32, "cpu", [8, 10])
    assert not heat.requires_grad
    assert (heat - expected).norm() <= tolerance * expected.norm()


def test_map_of_a_linear_network_is_the_sum_of_absolute_weights() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    weight = torch.arange(12.0).sub(6).view(1, 3, 2, 2)
    with torch.no_grad():
        network[1].weight.copy_(torch.cat([torch.zeros(1, 12), weight.view(1, 12)]))
    heat = attribute(network, torch.ones(1, 3, 2, 2), 1, "saliency")
    assert torch.equal(heat, torch.tensor([[6.0 + 2 + 2, 5.0 + 1 + 3], [4.0 + 0 + 4, 3.0 + 1 + 5]]))


@pytest.mark.parametrize(
    ("method", "inputs_seen"),
    [("integrated_gradients", 50), ("gradient_shap", 64), ("lime", 1001), ("occlusion", 63), ("score_cam", 6)],
)
def test_batches_are_bounded(network: Residual, inputs: Tensor, method: str, inputs_seen: int) -> None:
    batches: list[int] = []

    network.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    attribute(network, inputs, TARGET, method, batch_size=4)
    assert sum(batches) >= inputs_seen
    assert max(batches) == 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(
    network: Residual, inputs: Tensor, method: str, mode: Callable[[], torch.no_grad]
) -> None:
    expected = attribute(network, inputs, TARGET, method)
    with mode():
        assert torch.equal(attribute(network, inputs + 0, TARGET, method), expected)


def test_network_that_begins_in_place() -> None:
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3, 2))
    inputs = torch.tensor([-1.0, 2, 3]).view(1, 3, 1, 1)
    before = inputs.clone()
    heat = attribute(network, inputs, 0, "saliency")
    assert torch.equal(inputs, before)
    torch.testing.assert_close(heat[0, 0], network[2].weight[0, 1:].abs().sum().detach())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_network_is_left_as_it_was(
    network: Residual, inputs: Tensor, method: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.train()
    network.norm.eval()
    network.stem.weight.requires_grad_(False)
    network.fc.weight.grad = torch.full_like(network.fc.weight, 3.0)

    def state() -> dict[str, object]:
        return {
            "flags": [module.training for module in network.modules()],
            "hooks": [
                (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in network.modules()
            ],
            "requires_grad": [parameter.requires_grad for parameter in network.parameters()],
            "grads": [None if p.grad is None else p.grad.tolist() for p in network.parameters()],
            "values": [value.tolist() for value in network.state_dict().values()],
            "inputs": (inputs.tolist(), inputs.requires_grad),
        }

    before = state()
    if fails:
        monkeypatch.setattr(network.fc, "forward", lambda _: torch.full((1,), 1 / 0))
        with pytest.raises(InvalidInputError, match="does not run on inputs .*ZeroDivisionError"):
            attribute(network, inputs, TARGET, method)
    else:
        attribute(network, inputs, TARGET, method)
    assert state() == before


@pytest.mark.parametrize("method", ["gradient_shap", "lime"])
def test_random_methods_have_a_seed(network: Residual, inputs: Tensor, method: str) -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = attribute(network, inputs, TARGET, method, seed=3)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(attribute(network, inputs, TARGET, method, seed=3), first)
    assert not torch.equal(attribute(network, inputs, TARGET, method, seed=4), first)


def test_random_methods_in_several_threads(network: Residual, inputs: Tensor) -> None:
    state = torch.get_rng_state()
    expected = [attribute(network, inputs, TARGET, "gradient_shap", seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: attribute(network, inputs, TARGET, "gradient_shap", seed=seed), range(4)))
    assert all(map(torch.equal, found, expected))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [2, 4, 5])
def test_network_is_left_as_it_was_after_an_interruption(
    network: Residual, inputs: Tensor, method: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    forward, calls = F.conv2d, []

    def interrupted(*arguments: Any, **keywords: Any) -> Tensor:
        calls.append(1)
        if len(calls) > call:  # the first four are those of two looks at the outputs
            raise KeyboardInterrupt
        return forward(*arguments, **keywords)

    monkeypatch.setattr(F, "conv2d", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attribute(network, inputs, TARGET, method)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for module in network.modules():
        assert module.training
        assert not any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive whole number, got 0"),
        ({"batch_size": True}, "batch_size must be"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": 1.0}, "seed must be"),
    ],
)
def test_settings_out_of_range(network: Residual, inputs: Tensor, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        attribute(network, inputs, TARGET, "saliency", **setting)


def test_unknown_method_names_the_nearest(network: Residual, inputs: Tensor) -> None:
    with pytest.raises(InvalidInputError, match="'salliency'; nearest: 'saliency'"):
        attribute(network, inputs, TARGET, "salliency")
    with pytest.raises(InvalidInputError, match="'zzz'; known: 'saliency', 'input_x_gradient'"):
        find_method("zzz")


def test_target_of_numpy_or_torch(network: Residual, inputs: Tensor) -> None:
    expected = attribute(network, inputs, TARGET, "saliency")
    for target in (np.int64(TARGET), torch.tensor(TARGET)):
        assert torch.equal(attribute(network, inputs, target, "saliency"), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(network: Residual, inputs: Tensor, method: str, dtype: torch.dtype) -> None:
    heat = attribute(network.to(dtype), inputs, TARGET, method)
    assert heat.isfinite().all()


@pytest.mark.parametrize("target", [-1, 4, True, 1.0, "2", None, torch.tensor(True), torch.tensor([1, 2])])
def test_target_that_is_no_class(network: Residual, inputs: Tensor, target: object) -> None:
    with pytest.raises(InvalidInputError, match=r"target .* is no class of this model: pass an index, .* 0\.\.3"):
        attribute(network, inputs, target, "saliency")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x: x, r"gives a tensor \[1, 3, 8, 10\]"),
        (lambda x: (x.mean(dim=(2, 3)),), "gives a tuple"),
        (lambda x: x.mean(dim=(2, 3))[0], r"gives a tensor \[3\]"),
        (lambda x: x.mean(dim=(2, 3)).detach(), "no gradient flows"),
        (lambda x: x.mean(dim=(2, 3)).sub(10).sqrt(), "'saliency' gives NaN or infinite values for target 2"),
    ],
)
def test_outputs_that_cannot_be_explained(inputs: Tensor, outputs: Callable[[Tensor], Tensor], message: str) -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return outputs(x)

    with pytest.raises(InvalidInputError, match=message):
        attribute(Network(), inputs, TARGET, "saliency")


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8)])
def test_inputs_that_are_not_one_image(network: Residual, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match=r"one image, a float tensor \[1, c, h, w\], got torch.float32"):
        attribute(network, torch.zeros(shape), TARGET, "saliency")


def test_inputs_and_weights_without_values(network: Residual, inputs: Tensor) -> None:
    with pytest.raises(InvalidInputError, match="Residual has no weights: it is on the meta device"):
        attribute(network.to("meta"), inputs, TARGET, "saliency")
    inputs[0, 1, 2, 3] = torch.nan
    with pytest.raises(InvalidInputError, match="model inputs hold NaN or infinite values"):
        attribute(Residual(), inputs, TARGET, "saliency")


def test_missing_captum_names_the_cure(network: Residual, inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'spade-fast\[interpret\]'"):
        attribute(network, inputs, TARGET, "saliency")


def test_methods_are_read_only() -> None:
    with pytest.raises(TypeError):
        attribution.METHODS["mine"] = Method("Mine", lambda *_: torch.zeros(1))  # type: ignore[index]


def test_what_a_loaded_model_holds_is_asked(network: Residual, inputs: Tensor) -> None:
    loaded = LoadedModel("mine", network, IMAGENET, categories=None, source="random")
    assert torch.equal(attribute(loaded, inputs, TARGET, "saliency"), attribute(network, inputs, TARGET, "saliency"))
    with pytest.raises(InvalidInputError, match="model is a function: pass an nn.Module"):
        attribute(lambda x: x, inputs, TARGET, "saliency")  # type: ignore[arg-type]


def test_networks_that_mix_the_images_of_a_batch(inputs: Tensor) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )
    with pytest.raises(
        InvalidInputError, match="Sequential makes of an image depends on the others .*: pass batch_size=1"
    ):
        attribute(network, inputs, TARGET, "integrated_gradients")
    attribute(network, inputs, TARGET, "integrated_gradients", batch_size=1)


def test_networks_made_in_inference_mode(inputs: Tensor) -> None:
    with torch.inference_mode():
        network = Residual()
    with pytest.raises(InvalidInputError, match="Residual was made in inference mode, so no gradient can pass it"):
        attribute(network, inputs, TARGET, "saliency")


@pytest.mark.parametrize("method", METHODS)
def test_failures_of_the_network_say_so(network: Residual, method: str) -> None:
    with pytest.raises(
        InvalidInputError, match=r"Residual does not run on inputs torch.float32 \[1, 4, 8, 10\] \(Runt"
    ):
        attribute(network, torch.zeros(1, 4, 8, 10), TARGET, method)


def test_failures_of_a_method_say_so(inputs: Tensor) -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x))
            x *= 0.5  # which a ReLU needs for its gradient
            return x.mean((2, 3))

    with pytest.raises(
        InvalidInputError, match="method 'saliency' fails on Halved .RuntimeError: one of the variables"
    ):
        attribute(Halved(), inputs, TARGET, "saliency")


@pytest.mark.parametrize(
    "inputs", [torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros(1, 3, 8, 8).to_sparse(), torch.zeros(1, 3, 0, 8)]
)
def test_inputs_that_hold_no_pixels(network: Residual, inputs: Tensor) -> None:
    with pytest.raises(InvalidInputError, match="model inputs must be one image, a float tensor"):
        attribute(network, inputs, TARGET, "saliency")


def test_names_may_come_from_anywhere() -> None:
    assert attribution.check_methods(name for name in ["saliency", "lrp", "saliency"]) == ("saliency", "lrp")
