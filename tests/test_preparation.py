"""Prepared networks: equal to the originals, an activation module for each call, and what stands in a method's way."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import is_fx_tracing

import spade_fast as sf
from spade_fast import preparation
from spade_fast.errors import InvalidInputError
from spade_fast.operations import INSIDE_METHODS, ClippedReLU, Elementwise, MaxPool2d
from spade_fast.preparation import Prepared, prepare


def small(body: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> nn.Module:
    """A convolution, then `body`, then global pooling and a classifier."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.fc = nn.Linear(4, 2)
            for name, module in modules.items():
                self.add_module(name, module)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(body(self, self.conv(x)).mean((2, 3)))

    torch.manual_seed(0)
    return Small().eval()


def inputs() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def prepared(network: nn.Module) -> Prepared:
    """Prepared, and checked here to give the same outputs."""
    found = prepare(network, inputs())
    with torch.no_grad():
        torch.testing.assert_close(found.module(inputs()), network(inputs()), rtol=0, atol=0)
    return found


def kinds(found: Prepared) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in found.module.named_modules() if name}


# Modules for functions and for each call


def test_each_call_gets_a_module_of_its_own() -> None:
    found = prepared(small(lambda self, x: self.relu(x + self.relu(x)), relu=nn.ReLU(inplace=False)))
    modules = dict(found.module.named_modules())
    assert type(modules["relu"]) is type(modules["relu_1"]) is nn.ReLU
    assert modules["relu"] is not modules["relu_1"]
    assert found.report.changes == {"relu_1": "call 2 of 'relu'"}


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (F.relu, nn.ReLU),
        (lambda x: F.relu(input=x), nn.ReLU),
        (torch.relu, nn.ReLU),
        (lambda x: x.relu(), nn.ReLU),
        (lambda x: F.relu(x, inplace=True), nn.ReLU),
        (lambda x: x.relu_(), nn.ReLU),
        (lambda x: x.clamp(min=0), nn.ReLU),
        (lambda x: torch.clamp_min(x, 0), nn.ReLU),
        (F.relu6, ClippedReLU),
        (lambda x: x.clamp(0, 3), ClippedReLU),
        (lambda x: F.hardtanh(x, 0.0, 2.0), ClippedReLU),
        (lambda x: F.hardtanh(x, -1.0, 1.0), Elementwise),
        (lambda x: F.leaky_relu(x, 0.3), nn.LeakyReLU),
        (torch.sigmoid, nn.Sigmoid),
        (lambda x: x.tanh(), nn.Tanh),
        (lambda x: F.softplus(x, beta=2), nn.Softplus),
        (lambda x: F.elu(x, 0.5), nn.ELU),
        (F.silu, Elementwise),
        (lambda x: F.gelu(x, approximate="tanh"), Elementwise),
        (F.hardswish, Elementwise),
        (lambda x: F.max_pool2d(x, 2, padding=1), MaxPool2d),
        (lambda x: F.avg_pool2d(x, 3, stride=2), nn.AvgPool2d),
        (lambda x: F.adaptive_avg_pool2d(x, 2), nn.AdaptiveAvgPool2d),
    ],
)
def test_functions_become_modules(function: Callable[[Tensor], Tensor], kind: type[nn.Module]) -> None:
    found = prepared(small(lambda _, x: function(x)))
    (name,) = found.report.changes
    assert type(found.module.get_submodule(name)) is kind
    assert found.report.supports("deep_lift")
    assert found.report.supports("lrp")


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.ReLU6(inplace=True), ClippedReLU),
        (nn.Hardtanh(0, 4), ClippedReLU),
        (nn.Hardswish(inplace=True), Elementwise),
        (nn.SiLU(), Elementwise),
        (nn.PReLU(), Elementwise),
        (nn.Mish(), Elementwise),
        (nn.LeakyReLU(0.1, inplace=True), nn.LeakyReLU),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), MaxPool2d),
    ],
)
def test_modules_become_such_as_methods_know(module: nn.Module, kind: type[nn.Module]) -> None:
    found = prepared(small(lambda self, x: self.step(x), step=module))
    assert type(found.module.get_submodule("step")) is kind
    assert not any(getattr(each, "inplace", False) for each in found.module.modules())


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: self.relu(x) + x,
        lambda _, x: F.relu(x, inplace=True) + x,
        lambda _, x: x.relu_() * x,
        lambda _, x: x.add_(1) + x,
    ],
)
def test_what_was_changed_in_place_is_seen_changed(body: Callable[[nn.Module, Tensor], Tensor]) -> None:
    found = prepared(small(body, relu=nn.ReLU(inplace=True)))
    assert found.report.untraceable is None
    assert found.report.largest_difference == 0


def test_batch_norm_by_function_becomes_a_module() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps))

    norm = Activated(4, eps=0.1)
    nn.init.normal_(norm.running_mean)
    nn.init.normal_(norm.weight)
    found = prepared(small(lambda self, x: self.norm(x), norm=norm))
    assert type(found.module.get_submodule("norm.batch_norm")) is nn.BatchNorm2d
    assert found.report.supports("lrp")


def test_batch_norm_by_function_of_the_batchs_own_statistics_stays_a_function() -> None:
    class Live(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.batch_norm(x, self.running_mean, self.running_var, training=True, momentum=0.0))

    report = prepared(small(lambda self, x: self.norm(x), norm=Live(4))).report
    assert report.obstacles["deep_lift"] == {
        "norm.batch_norm": "calls the function batch_norm, perhaps with the batch's own statistics: make it a module"
    }


# Around the original's weights


def test_weights_are_the_originals_and_traces_apply() -> None:
    network = small(lambda self, x: self.relu(x + self.relu(x)), relu=nn.ReLU())
    found = prepared(network)
    originals = dict(network.named_parameters())
    assert {name: id(value) for name, value in found.module.named_parameters()} == {
        name: id(value) for name, value in originals.items()
    }
    trace = sf.trace(network, torch.rand(3, 8, 8), 0.5, layers=["conv"], preprocess=nn.Identity())
    with trace.applied(network), torch.no_grad():
        expected = network(inputs())
    with trace.applied(found.module), torch.no_grad():
        assert torch.equal(found.module(inputs()), expected)
        assert not torch.equal(network(inputs()), expected)


@pytest.mark.parametrize("training", [False, True])
def test_the_original_is_left_as_it_was(training: bool) -> None:
    network = small(lambda self, x: self.drop(self.relu(x)), relu=nn.ReLU6(inplace=True), drop=nn.Dropout(0.5))
    network.train(training)
    network.fc.eval()
    calls: list[nn.Module] = []
    network.relu.register_forward_hook(lambda module, *_: calls.append(module))
    before = copy.deepcopy(network.state_dict())
    modules = {name: (id(module), module.training) for name, module in network.named_modules()}
    prepare(network, inputs())
    assert {name: (id(module), module.training) for name, module in network.named_modules()} == modules
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.relu.inplace
    assert len(network.relu._forward_hooks) == 1
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_whatever_mode_the_caller_is_in(mode: Callable[[], Any]) -> None:
    network = small(lambda _, x: F.relu(x))
    with mode():
        found = prepare(network, inputs())
    assert found.report.largest_difference == 0
    found.module(inputs()).sum().backward()


# Networks that torch.fx cannot trace


def branching(self: nn.Module, x: Tensor) -> Tensor:
    if x.sum() > -torch.inf:  # a decision on values
        x = self.relu(x)
    return self.relu(x - 0.1)


def test_an_untraceable_network_is_converted_module_by_module() -> None:
    found = prepared(small(branching, relu=nn.ReLU6(inplace=True)))
    assert not isinstance(found.module, fx.GraphModule)
    assert found.report.untraceable is not None
    assert "control flow" in found.report.untraceable
    assert kinds(found)["relu"] == "ClippedReLU"
    for method in INSIDE_METHODS:
        assert found.report.supports(method) == (method != "lrp"), method
    assert list(found.report.obstacles["lrp"]) == ["the network"]
    assert found.report.spatial_map == "relu"


def test_functions_of_an_untraceable_network_are_named() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return F.relu(branching(self, x)) * self.gate(x)

    found = prepared(small(body, relu=nn.ReLU(), gate=nn.Sigmoid()))
    assert found.report.obstacles["deep_lift"] == {
        "relu": "calls the function relu: make it a module of its own",
        "mul": "multiplies or divides activations by each other",
    }
    assert set(found.report.obstacles["guided_backprop"]) == {"gate", "relu"}


class _PositivePart(torch.autograd.Function):
    """A ReLU with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return 0.5 * (input + (input * input).sqrt())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (ctx.saved_tensors[0] > 0)


@torch.jit.script
def _scripted_relu(input: Tensor) -> Tensor:
    return torch.relu(input)


@torch.jit.script
def _scripted_softplus(input: Tensor) -> Tensor:
    return torch.log1p(torch.exp(input))


@pytest.mark.filterwarnings("ignore:`torch.jit.script.* is deprecated")
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize(
    ("activation", "hidden"),
    [
        (_scripted_relu, r"(ReluBackward0|DifferentiableGraphBackward)"),
        (_scripted_softplus, r"(ExpBackward0|Log1PBackward0|DifferentiableGraphBackward)"),
        (_PositivePart.apply, "_PositivePartBackward"),
        (nn.Sequential(nn.ReLU(), nn.ReLU6()), None),
    ],
    ids=["scripted", "of several steps", "own gradient", "modules"],
)
def test_activations_that_cannot_be_seen(
    activation: Callable[[Tensor], Tensor], hidden: str | None, calls: int
) -> None:
    visible = isinstance(activation, nn.Module)

    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu, self.last = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 2)
            if visible:
                self.modules_of_it = activation

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.first(x))
            if x.sum() > 1e9:
                return x.mean((2, 3))
            return self.last((self.modules_of_it if visible else activation)(x - 0.5).mean((2, 3)))

    module, inputs = Untraceable().eval(), torch.randn(2, 3, 8, 8, requires_grad=True)
    for _ in range(calls):  # scripted functions are rewritten after a few calls
        module(inputs)
    report = prepare(module, inputs.detach()).report
    assert report.untraceable is not None
    for method in ("guided_backprop", "guided_grad_cam"):
        if hidden is None:
            assert report.supports(method)
        else:
            with pytest.raises(InvalidInputError, match=rf"the network: it has an activation.*\({hidden}\)"):
                report.require(method)


def test_a_network_that_needs_to_work_in_place_is_refused() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        branching(self, x)
        return self.relu(x) + x

    network = small(body, relu=nn.ReLU(inplace=True))
    with pytest.raises(InvalidInputError, match="Small cannot be prepared: with nothing done in place its outputs dif"):
        prepare(network, inputs())


def flipping(x: Tensor) -> Tensor:
    """The identity, with a gradient of its own that torch.fx cannot see."""

    class Flip(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, input: Tensor) -> Tensor:
            return input.clone()

        @staticmethod
        def backward(_: Any, *gradients: Tensor) -> Tensor:
            return -gradients[0]

    return Flip.apply(x)


def half_hidden(x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = 2 * x
    return x + hidden


@pytest.mark.parametrize("body", [flipping, half_hidden])
def test_gradients_that_tracing_loses_are_kept(body: Callable[[Tensor], Tensor]) -> None:
    network, batch = small(lambda _, x: body(F.relu(x))), inputs()
    found = prepare(network, batch)
    assert (
        found.report.untraceable == "an operation has a gradient of its own, or none, which the traced network has lost"
    )
    gradients = []
    for each in (network, found.module):
        point = batch.clone().requires_grad_()
        gradients += torch.autograd.grad(each(point)[:, 0].sum(), point)
    assert torch.equal(*gradients)
    assert not found.report.supports("lrp")
    assert found.report.supports("grad_cam")
    assert not found.report.supports("guided_backprop")  # of a ReLU by function


# What stands in a method's way


@pytest.mark.parametrize(
    ("body", "modules", "methods", "layer", "reason"),
    [
        (lambda self, x: self.act(x), {"act": nn.SiLU()}, "guided", "act", "SiLU is no ReLU"),
        (lambda _, x: F.relu(x) * torch.sigmoid(x), {}, "ruled", "mul", "multiplies or divides activations by each"),
        (lambda _, x: F.relu(x) / (x * x + 1), {}, "ruled", "mul", "multiplies or divides activations by each other"),
        (lambda self, x: self.norm(F.relu(x)), {"norm": nn.GroupNorm(2, 4)}, "ruled", "norm", "GroupNorm normalises"),
        (lambda _, x: F.relu(x).softmax(1), {}, "ruled", "softmax", "normalises activations by their own statistics"),
        (lambda _, x: F.relu(x) @ x.mT, {}, "ruled", "matmul", "multiplies activations with each other"),
        (lambda _, x: F.relu(x) @ torch.ones(8, 8), {}, "lrp", "matmul", "calls the function matmul: make it a mod"),
        (lambda _, x: 1 / (F.relu(x) + 1), {}, "all", "truediv", "truediv is no operation that these methods have"),
        (lambda _, x: F.relu(x) - x, {}, "lrp", "sub", "subtracts one activation from another"),
        (lambda _, x: torch.div(x, 2, rounding_mode="floor"), {}, "all", "div", "floor is no operation that these"),
        (lambda _, x: F.relu(x).to(torch.int32).float(), {}, "all", "to", "to makes masks or whole numbers"),
        (lambda _, x: F.relu(x).exp(), {}, "all", "exp", "exp is no operation that these methods have a rule for"),
        (lambda self, x: self.pool(F.relu(x)), {"pool": nn.LPPool2d(2, 2)}, "all", "pool", "LPPool2d is no module"),
        (
            lambda self, x: F.relu(self.norm(x)),
            {"norm": nn.BatchNorm2d(4, track_running_stats=False)},
            "ruled",
            "norm",
            "BatchNorm2d normalises activations by their own statistics",
        ),
        (
            lambda self, x: F.relu(self.layer(x)),
            {"layer": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))},
            "lrp",
            "layer",
            "computes its weight, which LRP has to change",
        ),
        (lambda _, x: x, {}, "guided", "the network", "it has no ReLU whose gradient could be guided"),
    ],
)
def test_obstacles(
    body: Callable[[nn.Module, Tensor], Tensor], modules: dict[str, nn.Module], methods: str, layer: str, reason: str
) -> None:
    ruled, guided = {"deep_lift", "lrp"}, {"guided_backprop", "guided_grad_cam"}
    expected = {"ruled": ruled, "guided": guided, "lrp": {"lrp"}, "all": ruled | guided}[methods]
    report = prepared(small(body, **modules)).report
    for method in expected:
        assert not report.supports(method), method
        found = next((why for where, why in report.obstacles[method].items() if where.startswith(layer)), None)
        assert found is not None, (method, report.obstacles[method])
        assert reason in found
        with pytest.raises(InvalidInputError, match=rf"method '{method}' is not valid on this network: .*; choose"):
            report.require(method)
    if layer not in ("softmax", "exp", "the network"):
        assert all(report.supports(method) for method in ruled - expected)
    assert reason in report.summary()


def test_factors_constants_and_shapes_stand_in_no_ones_way() -> None:
    def body(_: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(x) * 0.5 + 1
        x = torch.cat([x, torch.zeros_like(x)], 1)[:, :4]
        return -(F.pad(x, (1, 1)) / 2).flatten(2).view(x.shape[0], 4, 8, 10)

    report = prepared(small(body)).report
    assert all(report.supports(method) for method in ("deep_lift", "lrp", "guided_backprop"))
    report.require("saliency")


class ConvReLU(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", [lambda _, x: x, branching])
def test_layers_that_do_more_than_to_apply_their_weight(
    bias: bool, first: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    network = small(
        lambda self, x: self.relu(self.layer(first(self, x))), relu=nn.ReLU(), layer=ConvReLU(4, 4, 1, bias=bias)
    )
    report = prepared(network).report
    for method in ("deep_lift", "guided_backprop"):
        assert report.obstacles[method]["layer"] == "ConvReLU does more than apply its weight"


@pytest.mark.parametrize("function", [lambda x: x.relu_(), lambda x: F.relu(x, inplace=True), torch.relu_, torch.exp_])
def test_functions_that_work_in_place_are_seen(function: Callable[[Tensor], Tensor]) -> None:
    found = prepared(small(lambda self, x: function(branching(self, x) + 0), relu=nn.ReLU()))
    assert not found.report.supports("deep_lift")
    assert not found.report.supports("guided_backprop")
    if function is not torch.exp_:
        assert prepared(small(lambda _, x: function(x + 0))).report.supports("deep_lift")
    else:
        assert not prepared(small(lambda _, x: function(x + 0))).report.supports("deep_lift")


def test_what_is_set_in_place_is_seen() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        x = branching(self, x) + 0
        x[x < 0.1] = 0
        return x

    report = prepared(small(body, relu=nn.ReLU())).report
    assert any("setitem" in layer for layer in report.obstacles["deep_lift"])


def test_modules_called_by_keyword_are_seen() -> None:
    for first in (branching, lambda _, x: x):
        body = lambda self, x: self.norm(input=first(self, x))  # noqa: E731, B023
        report = prepared(small(body, relu=nn.ReLU(), norm=nn.GroupNorm(2, 4))).report
        assert "norm" in report.obstacles["deep_lift"]


def test_arguments_with_defaults_keep_them() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor, features: bool = False, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
            x = F.relu(self.conv(x)) * scale
            if features:
                return x
            return self.fc((x if mask is None else x * mask).mean((2, 3)))

    report = prepared(Network().eval()).report
    assert all(map(report.supports, INSIDE_METHODS))


def test_the_last_map_takes_no_ones_place() -> None:
    network = small(lambda self, x: x + self.add(x), add=nn.Conv2d(4, 4, 1))
    report = prepared(network).report
    assert report.untraceable is None
    assert report.supports("lrp")


def test_hooks_are_left_to_the_original() -> None:
    seen: list[float] = []
    network = small(lambda self, x: self.block(x), block=nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    network.block.register_forward_hook(lambda _, __, output: seen.append(float(output.sum())))
    found = prepare(network, inputs())
    assert found.report.untraceable is None
    count = len(seen)
    found.module(inputs())
    assert len(seen) == count


def test_outputs_are_compared_on_noise_and_on_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[list[Tensor]] = []
    real = preparation._largest_difference

    def watched(module: nn.Module, tried: list[Tensor], expected: list[Tensor]) -> float:
        compared.append(tried)
        return real(module, tried, expected)

    monkeypatch.setattr(preparation, "_largest_difference", watched)
    prepare(small(lambda _, x: F.relu(x)), inputs())
    noise, given = compared[0]
    assert torch.equal(given, inputs())
    assert noise.shape == given.shape
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert not torch.equal(noise, given)


def test_a_traced_network_that_gives_other_outputs_is_not_used() -> None:
    found = prepare(small(lambda _, x: F.relu(x) * (1.001 if is_fx_tracing() else 1.0)), inputs())
    assert not isinstance(found.module, fx.GraphModule)
    assert "outputs differ by" in (found.report.untraceable or "")


@pytest.mark.parametrize("held", [threading.Lock(), _scripted_relu], ids=["lock", "scripted function"])
def test_what_cannot_be_copied_is_refused(held: Any) -> None:
    network = small(lambda _, x: F.relu(x))
    network.held = held
    with pytest.raises(InvalidInputError, match="Small cannot be copied .*: keep such things outside"):
        prepare(network, inputs())


def test_layers_that_standardise_their_weights_are_found_by_what_they_do() -> None:
    class Padded(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias)

    class Standardized(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight / self.weight.norm(), self.bias)

    for kind, supported in ((Padded, True), (Standardized, False)):
        report = prepared(small(lambda self, x: F.relu(self.layer(x)), layer=kind(4, 4, 3))).report
        assert report.supports("lrp") is supported
        assert report.supports("deep_lift")


# The last map


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (lambda self, x: self.relu(x), "relu"),
        (lambda self, x: x + self.relu(x), "add"),
        (lambda self, x: F.adaptive_avg_pool2d(self.relu(x), 1), "relu"),
        (lambda self, x: F.adaptive_avg_pool2d(self.relu(x), 1).permute(0, 2, 3, 1).permute(0, 3, 1, 2), "relu"),
        (lambda self, x: self.relu(x) * x.mean((2, 3), keepdim=True).sigmoid(), "mul"),
    ],
)
def test_the_last_map(body: Callable[[nn.Module, Tensor], Tensor], name: str) -> None:
    found = prepared(small(body, relu=nn.ReLU()))
    assert found.report.spatial_map == name
    kept: list[Tensor] = []
    found.module.get_submodule(name).register_forward_hook(lambda _, __, output: kept.append(output))
    found.module(inputs())
    assert kept[0].dim() == 4


def test_maps_with_channels_last_are_none() -> None:
    report = prepared(small(lambda _, x: F.relu(x.permute(0, 2, 3, 1)).mean((1, 2))[..., None, None])).report
    assert report.spatial_map is None
    report = prepared(small(lambda _, x: F.relu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))).report
    assert report.spatial_map is not None


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize(
    ("body", "name"),
    [
        (lambda self, x: self.relu(x.permute(0, 2, 3, 1)).mean((1, 2)), None),
        (lambda self, x: self.relu(self.mix(x.permute(0, 2, 3, 1)).contiguous()).mean((1, 2)), None),
        (lambda self, x: self.relu(x.transpose(1, 3).transpose(3, 1)).mean((2, 3)), "relu"),
        (lambda self, x: self.relu(x.movedim(1, -1).contiguous().movedim(-1, 1) + x).mean((2, 3)), "relu"),
        (lambda self, x: self.relu(self.conv2(x.permute(0, 2, 3, 1).contiguous())).mean((2, 3)), "relu"),
        (lambda self, x: self.relu(x.flatten(2).mT.view(2, 8, 8, 8)).mean((1, 2)), None),
        (lambda self, x: self.relu(x).mean((2, 3)) + (x > 0).sum((2, 3)), "relu"),
    ],
)
def test_maps_are_told_from_others_of_their_shape(
    body: Callable[[nn.Module, Tensor], Tensor], name: str | None, traceable: bool
) -> None:
    """Eight channels of eight by eight: only what was done to them tells which are which."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.conv2, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)
            self.relu, self.fc = nn.ReLU(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if not traceable and x.sum() > 1e9:
                return x
            return self.fc(body(self, self.conv(x)))

    report = prepared(Square().eval()).report
    assert (report.untraceable is None) is traceable
    assert report.spatial_map == name


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("shared", ["relu", "drop"])
def test_the_call_that_gives_the_last_map_counts(traceable: bool, shared: str) -> None:
    class Network(nn.Module):
        def __init__(self, relus: int) -> None:
            super().__init__()
            self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 16, 3), nn.Linear(16, 16), nn.Linear(16, 2)
            self.relu, self.drop = nn.ReLU(), nn.Dropout()
            self.other = nn.ReLU() if relus == 2 else self.relu

        def forward(self, x: Tensor) -> Tensor:
            if not traceable and x.sum() > 1e9:
                return x
            x = self.relu(self.conv(x))
            x = (self.drop(x) if shared == "drop" else x).mean((2, 3))
            return self.fc2(self.drop(self.other(self.fc1(x))))

    networks = []
    for relus in (1, 2):
        torch.manual_seed(0)
        networks.append(Network(relus).eval())
    found = [[sf.attribute(each, inputs()[:1], target, "grad_cam") for target in (0, 1)] for each in networks]
    assert torch.stack(found[1]).max() > 0
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


def test_a_map_on_which_the_answer_does_not_rest_is_not_the_last() -> None:
    class Painting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.side, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            if x.sum() > -1e9:
                self.picture = self.side(x).detach()
            return self.fc(x.mean((2, 3)))

    report = prepared(Painting().eval()).report
    assert report.untraceable is not None
    assert report.spatial_map == "conv"


def test_hooks_that_change_what_goes_into_a_layer() -> None:
    network = small(lambda self, x: self.relu(self.layer(x)), layer=nn.Conv2d(4, 4, 1), relu=nn.ReLU())
    network.layer.register_forward_pre_hook(lambda _, given: (given[0].abs(),))
    for report in (prepared(network).report, prepared(controlled(network)).report):
        for method in ("deep_lift", "guided_backprop"):
            assert (
                "a hook that runs before this Conv2d may change what goes into it" in report.obstacles[method].values()
            )


def controlled(network: nn.Module) -> nn.Module:
    """With control flow, which torch.fx cannot trace."""

    class Controlled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 1e9 else self.network(x)

    return Controlled().eval()


def test_weights_with_something_beside_them_are_not_plain() -> None:
    class LowRank(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 4, 1)
            self.down, self.up = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(1, 4))

        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight + (self.down @ self.up)[:, :, None, None], self.bias)

    report = prepared(small(lambda self, x: F.relu(self.layer(x)), layer=LowRank())).report
    assert report.obstacles["lrp"] == {"layer": "LowRank computes its weight, which LRP has to change"}
    assert report.supports("deep_lift")


def test_weights_and_hooks_that_spoil_outputs_are_named() -> None:
    network = small(lambda _, x: F.relu(x))
    network.conv.register_forward_hook(lambda _, __, output: 2 * output)
    with pytest.raises(InvalidInputError, match=r"remove the forward hooks \(of conv, for one\)"):
        prepare(network, inputs())
    with torch.no_grad():
        network.fc.weight[0, 0] = torch.nan
    with pytest.raises(InvalidInputError, match="Small gives NaN or infinite outputs: look for them in its weights"):
        prepare(network, inputs())


def test_networks_that_cannot_take_a_gradient_say_so() -> None:
    def body(_: nn.Module, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        if x.sum() > 1e9:
            return x
        first.mul_(2)  # a view of several, in place
        return torch.cat([first, second], dim=1)

    with pytest.raises(
        InvalidInputError, match="Small does not run where a gradient is to be taken .*, though it does"
    ):
        prepare(small(body), inputs())


def test_activations_and_computed_weights_that_a_network_keeps() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        self.seen = [F.relu(x)]
        return F.relu(self.layer(self.seen[0]))

    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Conv2d(4, 4, 1))
    network = small(body, layer=layer)
    network(inputs())
    report = prepare(network, inputs()).report
    assert report.untraceable is None
    assert not report.supports("lrp")
    assert report.supports("deep_lift")


def test_preparing_takes_no_gradients() -> None:
    modes: list[bool] = []
    network = small(lambda _, x: F.relu(x))
    network.conv.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    prepare(network, inputs())
    assert modes
    assert not any(modes)


def test_tokens_are_no_map() -> None:
    report = prepared(small(lambda _, x: F.relu(x).flatten(2).mean(2)[:, :, None, None])).report
    assert report.spatial_map is None
    with pytest.raises(InvalidInputError, match="the network: no layer before its answer gives a map"):
        report.require("grad_cam")


# Refusals


def test_inputs_that_do_not_fit() -> None:
    network = small(lambda _, x: F.relu(x))
    with pytest.raises(InvalidInputError, match=r"Small does not run on inputs \[2, 5, 8, 8\] .*: pass inputs="):
        prepare(network, torch.randn(2, 5, 8, 8))
    with pytest.raises(InvalidInputError, match=r"inputs must be a non-empty batch of model inputs, .* torch.int64"):
        prepare(network, torch.ones(2, 3, 8, 8).long())
    with pytest.raises(InvalidInputError, match="inputs hold NaN or infinite values"):
        prepare(network, torch.full((2, 3, 8, 8), torch.nan))
    with pytest.raises(InvalidInputError, match="model is a DataParallel: pass the network that it wraps"):
        prepare(nn.DataParallel(network), inputs())
    with pytest.raises(InvalidInputError, match="Small has no weights: it is on the meta device"):
        prepare(copy.deepcopy(network).to("meta"), inputs())
    with pytest.raises(InvalidInputError, match="model is a str"):
        prepare("resnet18")  # type: ignore[arg-type]


def test_inputs_are_made_where_none_are_given() -> None:
    assert prepare(small(lambda _, x: F.relu(x))).report.largest_difference == 0


def test_networks_that_hide_their_layers_are_refused() -> None:
    network = small(lambda _, x: F.relu(x))
    with pytest.raises(InvalidInputError, match="model is compiled, which hides its layers"):
        prepare(torch.compile(network), inputs())
    with pytest.raises(InvalidInputError, match="scripted models hide their layers"):
        prepare(torch.jit.trace(network, inputs()), inputs())


def test_networks_without_an_answer_of_their_own_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="Small gives other outputs for the same inputs each time"):
        prepare(small(lambda _, x: F.dropout(F.relu(x))), inputs())


@pytest.mark.parametrize("pooling", [nn.MaxPool1d(2), nn.MaxPool2d(2, return_indices=True)])
def test_max_pooling_without_a_rule(pooling: nn.Module) -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        if isinstance(pooling, nn.MaxPool1d):
            return self.pool(F.relu(x).flatten(2))[..., None]
        return self.pool(F.relu(x))[0]

    report = prepared(small(body, pool=pooling)).report
    assert "pool" in report.obstacles["deep_lift"]
    assert report.supports("guided_backprop")


# Networks of libraries


@pytest.mark.parametrize(
    "name",
    [
        "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vgg11_bn", "densenet121",
        "vit_b_16",
    ],
)  # fmt: skip
def test_networks_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    network = getattr(models, name)(weights=None).eval()
    report = prepare(
        network, torch.randn(1, 3, 224 if name.startswith("vit") else 64, 224 if name.startswith("vit") else 64)
    ).report
    assert report.untraceable is None
    assert report.largest_difference == 0
    residual = {"resnet18", "mobilenet_v2", "vgg11_bn", "densenet121"}
    for method in ("deep_lift", "lrp", "guided_backprop"):
        assert report.supports(method) == (name in residual), method
    assert (report.spatial_map is None) == (name == "vit_b_16")


def test_efficientnet_lite0() -> None:
    pytest.importorskip("timm")
    found = prepare(sf.load_model("efficientnet_lite0"))
    assert found.report.untraceable is None
    assert found.report.largest_difference == 0
    assert all(map(found.report.supports, INSIDE_METHODS))
    assert found.report.spatial_map == "bn2.act"
