"""Each method's defining property, against hand calculation, other libraries and what its authors promise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import cifar
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast import methods
from spade_fast.attribution import asked, attribute
from spade_fast.errors import InvalidInputError
from spade_fast.methods import METHODS, Question, register_method
from spade_fast.models import load_model
from spade_fast.preparation import prepare
from spade_fast.rules import check_total, deep_lift

pytest.importorskip("captum")

TARGET = 1


class Network(nn.Module):
    """Residual, with what methods trip over: a shared ReLU in place, functions, ReLU6, overlapping pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.ReLU6(inplace=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.relu(x + self.bn2(self.conv2(x)))
        x = F.relu(x + self.act(self.depthwise(x)) * 0.5)
        x = F.max_pool2d(x, 2)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    network = Network()
    for norm in (network.bn1, network.bn2):
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    with torch.no_grad():
        network.depthwise.weight[:4] = -network.depthwise.weight[:4].abs()
        network.depthwise.bias[:4] = 1.0  # what these give, they owe to their biases alone
    return network.double().eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(1, 3, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ask(network: nn.Module, inputs: Tensor, method: str, target: int = TARGET, **settings: int) -> Tensor:
    question = Question(network, inputs.clone().requires_grad_(), target, **settings)
    return METHODS[method].compute(question).detach()


def score(network: nn.Module, inputs: Tensor, target: int = TARGET) -> float:
    with torch.no_grad():
        return network(inputs)[0, target].item()


def test_the_ten_methods_of_the_paper_are_there() -> None:
    paper = {
        "saliency", "input_x_gradient", "deep_lift", "lrp", "guided_backprop", "guided_grad_cam", "lime", "occlusion",
        "integrated_gradients", "gradient_shap",
    }  # fmt: skip
    assert paper | {"grad_cam", "score_cam"} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_map(network: Network, inputs: Tensor, method: str) -> None:
    heat = attribute(network, inputs, TARGET, method)
    assert list(heat.shape) == [12, 16]
    assert heat.min() >= 0
    assert heat.max() > heat.min()


NETWORKS = ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_lite0", "cifar_resnet20"]


def network_named(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        pytest.importorskip("timm")
        return load_model(name).module, torch.randn(1, 3, 64, 64)
    if name == "cifar_resnet20":
        return cifar.CifarResNet(3).eval(), torch.randn(1, 3, 32, 32)
    models = pytest.importorskip("torchvision.models")
    return getattr(models, name)(weights=None).eval(), torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_method_runs_and_is_the_same_on_the_prepared_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_LIME_SAMPLES", 16)
    monkeypatch.setattr(methods, "_OCCLUSION_WINDOWS", 3)
    network, inputs = network_named(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    prepared = prepare(network, inputs)
    for method in METHODS:
        heat = attribute(network, inputs, TARGET, method)
        assert heat.max() > 0 or "cam" in method, method  # of random weights nothing may speak for a class
        difference = (attribute(prepared.module, inputs, TARGET, method) - heat).abs().max()
        assert difference <= 1e-4 * heat.max(), method
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    for module in network.modules():
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        assert not any(hooks)
        assert not module.training


# Completeness: attributions add up to what the input changes in the score


@pytest.mark.parametrize(("method", "tolerance"), [("integrated_gradients", 2e-2), ("deep_lift", 1e-10)])
def test_completeness(network: Network, inputs: Tensor, method: str, tolerance: float) -> None:
    change = score(network, inputs) - score(network, torch.zeros_like(inputs))
    found = ask(network, inputs, method)
    assert found.sum().item() == pytest.approx(change, abs=tolerance * found.abs().sum().item())


def test_integrated_gradients_of_a_smooth_network_are_complete(inputs: Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 10 * 14, 3)).double().eval()
    change = score(network, inputs) - score(network, torch.zeros_like(inputs))
    assert ask(network, inputs, "integrated_gradients").sum().item() == pytest.approx(change, abs=1e-6)


def test_gradient_shap_of_a_linear_network_is_its_noisy_input_times_the_weight(inputs: Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs.numel(), 2)).double()
    weight = network[1].weight[TARGET].detach().view_as(inputs)
    noise = 0.1 * inputs.std() / 64**0.5
    found = ask(network, inputs, "gradient_shap")
    deviation = (found - inputs * weight) / (noise * weight.abs())
    assert deviation.std().item() == pytest.approx(1, abs=0.1)
    assert deviation.abs().max().item() < 5


def test_gradient_shap_counts_each_sample_once() -> None:
    inputs = torch.full((1, 3, 4, 4), 0.5)  # of no spread, so without noise
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs.numel(), 2))
    weight = network[1].weight[TARGET].detach().view_as(inputs)
    with asked(network, inputs, TARGET, batch_size=24) as question:  # 64 = 24 + 24 + 16
        torch.testing.assert_close(METHODS["gradient_shap"].compute(question), inputs * weight)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Sigmoid()])
def test_deep_lift_is_the_rescale_rule_for_every_activation(activation: nn.Module) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), activation, nn.Linear(5, 2)).double().eval()
    inputs = 3 * torch.randn(1, 3, 2, 2, dtype=torch.float64)
    first, last = network[1], network[3]
    hidden, reference = first(inputs.flatten(1)), first(torch.zeros(1, 12).double())
    multipliers = (activation(hidden) - activation(reference)) / (hidden - reference)
    expected = (last.weight[TARGET] * multipliers) @ first.weight
    torch.testing.assert_close(ask(network, inputs, "deep_lift"), (expected.view_as(inputs) * inputs).detach())


@pytest.mark.parametrize(
    "pooling",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 1, 1),
        nn.MaxPool2d((2, 3), (3, 2), (1, 0), (1, 2)),
        nn.MaxPool2d(3, 2, ceil_mode=True),
    ],
    ids=str,
)
def test_deep_lift_of_max_pooling_is_complete_for_any_baseline(pooling: nn.Module) -> None:
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pooling, nn.Flatten())
    inputs, baseline = torch.randn(2, 1, 3, 10, 12).double()
    network = nn.Sequential(pooled, nn.Linear(pooled(inputs.float()).shape[1], 2)).double().eval()
    found = deep_lift(prepare(network, inputs), inputs, baseline, TARGET)
    change = score(network, inputs) - score(network, baseline)
    assert found.sum().item() == pytest.approx(change, abs=1e-10)


def test_deep_lift_of_max_pooling_by_hand() -> None:
    """A window above its reference, one below, and one below equal ones: the last is due to the largest input."""
    network = nn.Sequential(nn.MaxPool2d((1, 2)), nn.Flatten(), nn.Linear(3, 2, bias=False))
    nn.init.ones_(network[2].weight)
    inputs, baseline = torch.tensor([[[[1.0, 5, 2, 1, 1, 2]]]]), torch.tensor([[[[3.0, 2, 1, 4, 7, 7]]]])
    found = deep_lift(prepare(network, inputs), inputs, baseline, 0)
    assert found.tolist() == [[[[0, 2, 0, -2, 0, -5]]]]


class PreActivation(nn.Module):
    """What goes into an activation goes past it too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(5, 5, 3, padding=1)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(self.relu(x))
        return self.fc(self.relu(x + 0.1).mean((2, 3)))


def test_a_branch_past_an_activation_keeps_its_share(inputs: Tensor) -> None:
    torch.manual_seed(0)
    network = PreActivation().double().eval()
    change = score(network, inputs) - score(network, torch.zeros_like(inputs))
    assert ask(network, inputs, "deep_lift").sum().item() == pytest.approx(change, abs=1e-10)

    guided = lambda x: _Guided.apply(x, torch.inf)  # noqa: E731
    point = inputs.clone().requires_grad_()
    x = network.stem(point)
    x = x + network.conv(guided(x))
    (expected,) = torch.autograd.grad(network.fc(guided(x + 0.1).mean((2, 3)))[0, TARGET], point)
    torch.testing.assert_close(ask(network, inputs, "guided_backprop"), expected)


def whole(body: Callable[[nn.Module, Tensor], Tensor], **parameters: nn.Parameter) -> nn.Module:
    """A convolution with a ReLU, then `body`, then global pooling and a classifier, in float64."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.branch, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
            for name, parameter in parameters.items():
                self.register_parameter(name, parameter)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(body(self, torch.relu(self.conv(x))).mean((2, 3)))

    torch.manual_seed(0)
    return Whole().double().eval()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: x + self.gain * torch.relu(self.branch(x)),
        lambda self, x: torch.relu(self.branch(x)) * self.gain,
        lambda self, x: self.gain * x,
        lambda self, x: self.gain - x,
        lambda _, x: 1 - x,
        lambda self, x: torch.add(x, other=self.branch(x)),
        lambda self, x: torch.add(input=x, other=torch.relu(self.branch(x)), alpha=-0.5),
        lambda self, x: (-x / 2).sub(self.branch(x).neg() + self.gain),
    ],
)
def test_sums_hold_whatever_stands_where(
    inputs: Tensor, body: Callable[[nn.Module, Tensor], Tensor], trainable: bool
) -> None:
    gain = nn.Parameter(torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(3)), requires_grad=trainable)
    network = whole(body, gain=gain)
    change = score(network, inputs) - score(network, torch.zeros_like(inputs))
    assert ask(network, inputs, "deep_lift").sum().item() == pytest.approx(change, abs=1e-10)
    if prepare(network, inputs).report.supports("lrp"):
        relevance = ask(network, inputs, "lrp")
        assert relevance.sum().item() == pytest.approx(score(network, inputs), abs=1e-5 * relevance.abs().sum().item())


@pytest.mark.parametrize(
    "body",
    [
        lambda _, x: x * (x > 0.1),
        lambda _, x: x * (x > 0.1).float(),
        lambda _, x: (x * 10).long().double() / 10 + x,
    ],
)
def test_masks_made_of_activations_are_refused(inputs: Tensor, body: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with pytest.raises(InvalidInputError, match="'deep_lift' is not valid on this network: (gt|mul|long)"):
        ask(whole(body), inputs, "deep_lift")


def test_images_that_do_not_stay_apart_are_refused(inputs: Tensor) -> None:
    network = whole(lambda self, x: self.branch(x - 0.5 * x.mean(0, keepdim=True)))
    with pytest.raises(InvalidInputError, match="network: branch: what it gets of an image depends on the others of"):
        ask(network, inputs, "deep_lift")
    single = whole(lambda _, x: x.view(1, 4, 10, 14))
    with pytest.raises(InvalidInputError, match="one batch, on which this network fails"):
        ask(single, inputs, "deep_lift")


def test_relu6_has_no_slope_where_it_begins() -> None:
    network = nn.Sequential(nn.ReLU6(), nn.Flatten(), nn.Linear(4, 2, bias=False))
    inputs = torch.tensor([[[[0.0, 6.0, 3.0, -1.0]]]])
    expected = network[2].weight[TARGET].detach() * torch.tensor([0.0, 0, 1, 0])
    found = ask(prepare(network, inputs).module, inputs, "saliency")
    torch.testing.assert_close(found.flatten(), expected)
    assert ask(network, inputs, "guided_backprop").flatten()[[0, 1, 3]].tolist() == [0, 0, 0]


def test_where_nothing_changes_an_activations_slope_counts() -> None:
    """Two inputs that cancel: the difference that goes into the activation is zero, not its slope."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Softplus(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, -1], [0, 1]]))
        network[1].bias.copy_(torch.tensor([0.5, 0]))
        network[3].weight.copy_(torch.tensor([[0.0, 0], [3, 0]]))
    inputs = torch.tensor([[[[2.0, 2.0]]]]).double()
    slope = 3 * torch.tensor(0.5).double().sigmoid()
    expected = torch.stack([2 * slope, -2 * slope]).view(1, 1, 1, 2)
    torch.testing.assert_close(ask(network, inputs, "deep_lift"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_hides_nothing(inputs: Tensor, dtype: torch.dtype) -> None:
    for body in (lambda self, x: self.branch(x - 0.5 * x.mean(0, keepdim=True)), lambda _, x: torch.relu(x - 0.1)):
        network = whole(body)
        exact = None
        try:
            exact = ask(network, inputs, "deep_lift")
        except InvalidInputError:
            with pytest.raises(InvalidInputError, match="depends on the others of the batch"):
                ask(network.to(dtype), inputs.to(dtype), "deep_lift")
            continue
        found = ask(network.to(dtype), inputs.to(dtype), "deep_lift").double()
        torch.testing.assert_close(found, exact, rtol=0, atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize("channels", [4, 5])
def test_images_that_are_not_along_the_first_dimension_are_refused(inputs: Tensor, channels: int) -> None:
    """The rule would take other channels for their references."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 3)
            self.fc = nn.Linear(channels, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(x).transpose(0, 1)).transpose(0, 1).mean((2, 3)))

    torch.manual_seed(0)
    network = Turned().double().eval()
    assert prepare(network, inputs).report.supports("deep_lift")
    with pytest.raises(
        InvalidInputError, match="'deep_lift' is not valid .*: relu: .* not have the images along its fir"
    ):
        ask(network, inputs, "deep_lift")


@pytest.mark.parametrize(("total", "is_refused"), [(6.0, False), (6.0005, False), (6.001, True)])
def test_sums_are_checked(total: float, is_refused: bool) -> None:
    attributions, score = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([total])
    if is_refused:
        with pytest.raises(InvalidInputError, match=r"'own' is not valid .* attributions add up to 6, not to 6\.001"):
            check_total("own", attributions, score, score, 1e-4)
    else:
        check_total("own", attributions, score, score, 1e-4)


@pytest.mark.parametrize("method", ["deep_lift", "guided_backprop"])
def test_equals_captum_where_captum_is_right(inputs: Tensor, method: str) -> None:
    import captum.attr

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(60, 2)
    )
    network = network.double().eval()
    theirs = {"deep_lift": captum.attr.DeepLift, "guided_backprop": captum.attr.GuidedBackprop}[method](network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.attribute(inputs, target=TARGET).detach()
    torch.testing.assert_close(ask(network, inputs, method), expected)


# Guided backpropagation and class activation maps


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, limit):
        ctx.save_for_backward((input > 0) & (input < limit))
        return input.clamp(0, limit)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0) * ctx.saved_tensors[0], None


def guided_by_hand(network: Network, inputs: Tensor) -> Tensor:
    relu = lambda x, limit=torch.inf: _Guided.apply(x, limit)  # noqa: E731
    point = inputs.clone().requires_grad_()
    x = network.pool(relu(network.bn1(network.conv1(point))))
    x = relu(x + network.bn2(network.conv2(x)))
    x = relu(x + relu(network.depthwise(x), 6.0) * 0.5)
    x = F.max_pool2d(x, 2)
    (found,) = torch.autograd.grad(network.fc(x.mean((2, 3)))[0, TARGET], point)
    return found


def test_guided_backprop_by_hand(network: Network, inputs: Tensor) -> None:
    torch.testing.assert_close(ask(network, inputs, "guided_backprop"), guided_by_hand(network, inputs))


def grad_cam_by_hand(network: Network, inputs: Tensor, target: int = TARGET) -> Tensor:
    kept: list[Tensor] = []
    handle = network.pool.register_forward_hook(lambda _, __, output: kept.append(output))
    network(inputs)
    handle.remove()
    x = kept[0]
    x = network.relu(x + network.bn2(network.conv2(x)))
    last = F.max_pool2d(F.relu(x + network.act(network.depthwise(x)) * 0.5), 2).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(network.fc(last.mean((2, 3)))[0, target], last)
    coarse = (gradient.mean((2, 3), keepdim=True) * last).sum(dim=1, keepdim=True).clamp(min=0)
    return F.interpolate(coarse.detach(), inputs.shape[2:], mode="bilinear")


def test_grad_cam_by_hand(network: Network, inputs: Tensor) -> None:
    expected = grad_cam_by_hand(network, inputs)
    torch.testing.assert_close(ask(network, inputs, "grad_cam"), expected)
    others = [grad_cam_by_hand(network, inputs, target) for target in range(4)]
    assert min(other.min() for other in others) == 0  # where the class is spoken against
    for target, other in enumerate(others):
        torch.testing.assert_close(ask(network, inputs, "grad_cam", target), other)
    guided = ask(network, inputs, "guided_backprop")
    torch.testing.assert_close(ask(network, inputs, "guided_grad_cam"), guided * expected)


def test_guided_grad_cam_in_half_precision_does_not_underflow(network: Network, inputs: Tensor) -> None:
    with torch.no_grad():
        network.fc.weight.mul_(1e-2)
    expected = ask(network, inputs, "guided_grad_cam")
    found = ask(network.half(), inputs.half(), "guided_grad_cam").double()
    assert (expected.abs() < 1e-5).float().mean() > 0.1  # which half precision could not tell from zero
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert (found == 0).double().mean() < 1.1 * (expected == 0).double().mean() + 0.01


def test_score_cam_equals_that_of_grad_cam(network: Network, inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    cam = pytest.importorskip("pytorch_grad_cam")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    prepared = Question(network, inputs, TARGET).prepared
    layer = prepared.module.get_submodule(prepared.report.spatial_map or "")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with warnings.catch_warnings(), cam.ScoreCAM(prepared.module, [layer]) as other:
        warnings.simplefilter("ignore")
        weights = other.get_cam_weights(
            inputs, layer, [ClassifierOutputTarget(TARGET)], maps_of(prepared.module, layer, inputs).numpy(), None
        )
    coarse = (torch.from_numpy(weights)[:, :, None, None] * maps_of(prepared.module, layer, inputs)).sum(1).clamp(min=0)
    found = F.interpolate(coarse[:, None], inputs.shape[2:], mode="bilinear")
    # It upsamples with aligned corners, which moves the edges of a map of 3 x 4.
    correlation = torch.corrcoef(torch.stack([found.flatten(), ask(network, inputs, "score_cam").flatten()]))[0, 1]
    assert correlation > 0.99


def maps_of(module: nn.Module, layer: nn.Module, inputs: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: kept.append(output.detach()))
    with torch.no_grad():
        module(inputs)
    handle.remove()
    return kept[0]


def test_score_cam_by_hand() -> None:
    """Two maps: one lets the left half through, one the right; a third is flat and says nothing."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            masks = torch.zeros(3, 4, 4)
            masks[0, :, :2] = masks[1, :, 2:] = 1
            self.register_buffer("masks", masks)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.masks).sum((2, 3))

    network = Halves()
    inputs = torch.full((1, 1, 4, 4), 0.25)
    inputs[..., 2:] = 0.5
    weights = torch.tensor([0.0, 8 * 0.5]).softmax(dim=0)  # scores of class 1, the right half
    expected = weights[0] * 0.25 * network.masks[0] + weights[1] * 0.5 * network.masks[1]
    torch.testing.assert_close(ask(network, inputs, "score_cam", target=1)[0, 0], expected)


# Methods that hide parts of the image


def test_occlusion_by_hand() -> None:
    """On 4 x 4 pixels a window is 2 x 2 and moves by one: a pixel gets the mean of the windows that hide it."""
    weight = torch.arange(48.0).view(3, 4, 4)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([torch.zeros(48), weight.flatten()]))
    fall = F.avg_pool2d(weight.sum(0)[None, None], 2, 1, divisor_override=1)  # of each window, [3, 3]
    total = F.conv_transpose2d(fall, torch.ones(1, 1, 2, 2))
    count = F.conv_transpose2d(torch.ones_like(fall), torch.ones(1, 1, 2, 2))
    found = ask(network, torch.ones(1, 3, 4, 4), "occlusion")
    torch.testing.assert_close(found, (total / count).expand(1, 3, 4, 4))


def test_occlusion_moves_by_a_twenty_eighth_of_the_image() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(56 * 40, 2))
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments[0]))
    ask(network, torch.rand(1, 1, 56, 40) + 1, "occlusion")
    hidden = torch.stack([image for image in seen if (image == 0).any()])
    assert len(hidden) == 27 * 19
    assert (hidden == 0).sum((1, 2, 3)).unique().tolist() == [16]


def test_a_network_of_one_answer_says_so() -> None:
    class One(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1)).mean(0, keepdim=True)

    with pytest.raises(InvalidInputError, match=r"One gives scores \[1, 2\] for a batch of 16 images: it must take"):
        attribute(One(12, 2), torch.rand(1, 3, 2, 2), TARGET, "integrated_gradients")
    attribute(One(12, 2), torch.rand(1, 3, 2, 2), TARGET, "integrated_gradients", batch_size=1)


def test_lime_finds_what_each_superpixel_adds() -> None:
    torch.manual_seed(0)
    inputs = torch.rand(1, 3, 32, 32)
    weight = torch.randn(3, 32, 32)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([torch.zeros(3 * 32 * 32), weight.flatten()]))
    segments = methods._segments(inputs)[0, 0]
    assert 20 <= len(segments.unique()) <= 100
    expected = torch.zeros(int(segments.max()) + 1).index_add_(
        0, segments.flatten(), (weight * inputs[0]).sum(0).flatten()
    )
    found = ask(network, inputs, "lime")[0, 0]
    ridge = torch.stack([found[segments == index].mean() for index in segments.unique()])
    assert torch.corrcoef(torch.stack([ridge, expected]))[0, 1] > 0.995


@pytest.mark.parametrize(("share", "weight"), [(1.0, 1.0), (0.25, math.exp(-2)), (0.0, math.exp(-8))])
def test_choices_of_superpixels_count_by_their_distance_from_all(share: float, weight: float) -> None:
    kept = (torch.arange(64) < 64 * share)[None]
    assert methods._closeness(kept, kept, kept).item() == pytest.approx(weight)


# How attributions become a map


def test_reductions() -> None:
    attributions = torch.tensor([[[[1.0, -4.0]], [[-3.0, 1.0]]]])
    assert METHODS["saliency"].reduce(attributions).tolist() == [[4.0, 5.0]]
    assert METHODS["occlusion"].reduce(attributions).tolist() == [[0.0, 0.0]]
    assert METHODS["occlusion"].reduce(-attributions).tolist() == [[1.0, 1.5]]


# Methods of one's own


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    names: list[str] = []

    def register(name: str, *arguments: object, **keywords: object) -> None:
        register_method(name, *arguments, **keywords)  # type: ignore[arg-type]
        names.append(name)

    yield register
    for name in names:
        methods.unregister_method(name)


def test_a_method_of_ones_own(network: Network, inputs: Tensor, registered: Callable[..., None]) -> None:
    registered("brightness", lambda _, inputs, target: inputs[0].sum(0) * target, title="Brightness")
    registered("halves", lambda _, inputs, __: -inputs / 2)
    assert METHODS["brightness"].title == "Brightness"
    assert METHODS["halves"].title == "halves"
    torch.testing.assert_close(attribute(network, inputs, 3, "brightness"), (3 * inputs[0].sum(0).abs()).float())
    torch.testing.assert_close(attribute(network, inputs, 3, "halves"), (inputs[0].abs().sum(0) / 2).float())


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("saliency", lambda *_: None, "there is a method 'saliency' already"),
        ("my method", lambda *_: None, "must be a Python identifier, got 'my method'"),
        ("mine", "saliency", r"must be a function \(model, inputs, target\) to a map, got 'saliency'"),
    ],
)
def test_methods_that_cannot_be_registered(name: str, function: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        register_method(name, function)  # type: ignore[arg-type]
    assert set(METHODS) == methods._BUILT_IN


@pytest.mark.parametrize(
    "found",
    [
        torch.zeros(3, 3),
        torch.zeros(2, 3, 12, 16),
        None,
        [[1.0]],
        torch.zeros(12, 16, dtype=torch.complex64),
        torch.zeros(12, 16, device="meta"),
        torch.zeros(12, 16).to_sparse(),
    ],
)
def test_maps_of_another_shape(
    network: Network, inputs: Tensor, registered: Callable[..., None], found: object
) -> None:
    registered("mine", lambda *_: found)
    with pytest.raises(InvalidInputError, match=r"method 'mine' gives a .*: it must give a map \[12, 16\] or attribut"):
        attribute(network, inputs, TARGET, "mine")


def test_a_method_that_changes_things(network: Network, inputs: Tensor, registered: Callable[..., None]) -> None:
    def darken(_: nn.Module, inputs: Tensor, __: int) -> Tensor:
        inputs.data.mul_(0)
        return inputs + torch.rand(inputs.shape)

    def retrain(model: nn.Module, inputs: Tensor, _: int) -> Tensor:
        with torch.no_grad():
            model.fc.weight.add_(1)
        return inputs

    registered("darken", darken)
    registered("retrain", retrain)
    state = torch.get_rng_state()
    question = Question(network, inputs.clone().requires_grad_(), TARGET)
    METHODS["darken"].compute(question)
    assert torch.equal(question.inputs, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(
        InvalidInputError, match=r"method 'retrain' changes 'fc\.weight' of the model, which was put back"
    ):
        METHODS["retrain"].compute(question)


def halve(model: nn.Module) -> None:
    model.fc.weight.data.mul_(0.5)


def replace_weight(model: nn.Module) -> None:
    model.fc.weight = nn.Parameter(torch.zeros_like(model.fc.weight))


def hook(model: nn.Module) -> None:
    model.fc.register_forward_hook(lambda _, __, output: output * 0)


def freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def accumulate(model: nn.Module) -> None:
    model(torch.zeros(1, 3, 12, 16).double()).sum().backward()


def add_layer(model: nn.Module) -> None:
    model.fc = nn.Sequential(model.fc, nn.ReLU())


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        (halve, True),
        (lambda model: model.float(), True),
        (replace_weight, True),
        (lambda model: model.bn1.running_mean.add_(1), True),
        (add_layer, True),
        (hook, False),
        (lambda model: model.train(), False),
        (freeze, False),
        (accumulate, False),
        (lambda model: model.zero_grad(), False),
    ],
)
def test_whatever_a_method_does_to_the_network_is_undone(
    network: Network,
    inputs: Tensor,
    registered: Callable[..., None],
    change: Callable[[nn.Module], Any],
    is_refused: bool,
) -> None:
    network.conv1.weight.grad = torch.ones_like(network.conv1.weight)
    network.fc.bias.requires_grad_(False)

    def state() -> list[object]:
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        return [
            {
                name: (id(tensor), tensor.dtype, tensor.tolist(), tensor.requires_grad, tensor.grad is None)
                for name, tensor in tensors.items()
            },
            network.conv1.weight.grad.tolist(),
            [(id(module), module.training, len(module._forward_hooks)) for module in network.modules()],
        ]

    def method(model: nn.Module, inputs: Tensor, _: int) -> Tensor:
        change(model)
        return inputs

    registered("mine", method)
    before = state()
    if is_refused:
        with pytest.raises(InvalidInputError, match="method 'mine' changes '.*' of the model, which was put back"):
            attribute(network, inputs, TARGET, "mine")
    else:
        attribute(network, inputs, TARGET, "mine")
    assert state() == before


def test_what_a_method_does_is_undone_where_it_fails(
    network: Network, inputs: Tensor, registered: Callable[..., None]
) -> None:
    def method(model: nn.Module, _: Tensor, __: int) -> Tensor:
        halve(model)
        raise KeyError("a message")

    weight = network.fc.weight.detach().clone()
    registered("mine", method)
    with pytest.raises(InvalidInputError, match=r"method 'mine' fails on Network \(KeyError: 'a message'\)"):
        attribute(network, inputs, TARGET, "mine")
    assert torch.equal(network.fc.weight, weight)


def test_built_in_methods_stay() -> None:
    for name in ("saliency", "absent"):
        with pytest.raises(InvalidInputError, match=f"no method '{name}' was registered"):
            methods.unregister_method(name)
