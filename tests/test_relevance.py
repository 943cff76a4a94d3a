"""LRP by hand, and that relevance is conserved."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast.attribution import attribute
from spade_fast.errors import InvalidInputError
from spade_fast.preparation import prepare
from spade_fast.relevance import _stabilized, relevance

pytest.importorskip("zennit")
models = pytest.importorskip("torchvision.models")

TARGET = 1


def found(network: nn.Module, inputs: Tensor, target: int = TARGET) -> Tensor:
    return relevance(prepare(network.eval(), inputs), inputs, target)


def conserved(network: nn.Module, inputs: Tensor, target: int = TARGET) -> float:
    """How far the relevance is from the score, as a share of it."""
    with torch.no_grad():
        score = network.eval()(inputs)[0, target]
    return ((found(network, inputs, target).sum() - score).abs() / score.abs()).item()


def test_epsilon_and_flat_by_hand() -> None:
    """The first layer is flat, the second divides by contribution: its bias has no part in it."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, 0, 2], [1, 1, 1]]))
        network[1].bias.copy_(torch.tensor([0.0, 1]))
        network[3].weight.copy_(torch.tensor([[0.0, 0], [2, -1]]))
        network[3].bias.copy_(torch.tensor([0.0, 3]))
    inputs = torch.tensor([[[[1.0, 2, 3]]]]).double()
    # Hidden 7 and 7; contributions 14 and -7; score 10. Relevance 20 and -10, of which each input gets a third.
    torch.testing.assert_close(found(network, inputs), torch.full_like(inputs, 10 / 3), rtol=1e-5, atol=0)


def test_epsilon_takes_contributions_of_both_signs() -> None:
    """Of a linear layer that is not the first: z+ would leave the negative ones out."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.eye(2))
        network[2].weight.copy_(torch.tensor([[0.0, 0], [3, -1]]))
    inputs = torch.tensor([[[[1.0, 2.0]]]]).double()
    # Hidden 1 and 2 contribute 3 and -2; flat, each divides its own among both inputs.
    torch.testing.assert_close(found(network, inputs).flatten(), torch.tensor([0.5, 0.5]).double(), rtol=1e-9, atol=0)
    eyes = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2, bias=False), nn.Flatten(), *network[1:]).double()
    with torch.no_grad():
        eyes[0].weight.fill_(1)
    inputs = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).double()
    torch.testing.assert_close(found(eyes, inputs).flatten(), torch.tensor([3.0, -2.0]).double(), rtol=1e-9, atol=0)


def test_layers_that_see_the_inputs_are_all_flat() -> None:
    class Stems(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c, self.fc = (
                nn.Conv2d(3, 4, 3),
                nn.Conv2d(3, 4, 3),
                nn.Conv2d(4, 4, 3),
                nn.Linear(4, 2),
            )
            self.turned = turned

        def forward(self, x: Tensor) -> Tensor:
            found = self.b(x) + self.a(x) if self.turned else self.a(x) + self.b(x)
            return self.fc(F.relu(self.c(F.relu(found))).mean((2, 3)))

    inputs = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    one, other = (found(Stems(turned).double(), inputs) for turned in (False, True))
    torch.testing.assert_close(one, other)


def test_batch_norms_are_folded() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.weight)  # of both signs, which z+ tells apart
    nn.init.normal_(norm.bias)
    merged = nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())
    inputs = torch.randn(1, 3, 8, 8).double()
    apart = found(made(lambda self, x: self.norm(self.layer(F.relu(x))), layer=conv, norm=norm), inputs)
    together = found(made(lambda self, x: self.layer(F.relu(x)), layer=merged), inputs)
    torch.testing.assert_close(apart, together)


@pytest.mark.parametrize(
    ("pad", "name"), [(lambda self, x: self.pad(x), "pad"), (lambda _, x: F.pad(x, (2, 2, 2, 2)), "pad")]
)
def test_relevance_that_is_lost_in_padding_is_noticed(pad: Callable[[nn.Module, Tensor], Tensor], name: str) -> None:
    network = made(
        lambda self, x: self.layer(pad(self, F.relu(x) * 0 - 1)), pad=nn.ZeroPad2d(2), layer=nn.Conv2d(4, 4, 3)
    )
    with torch.no_grad():
        network.layer.weight.abs_()  # of negative inputs all contributions are negative: relevance is divided evenly
        network.layer.bias.fill_(50.0)
    with pytest.raises(
        InvalidInputError, match=f"'lrp' is not valid .* so {name}, to whose zeros relevance is lost, has"
    ):
        found(network, torch.randn(1, 3, 8, 8).double())


def test_z_plus_by_hand() -> None:
    """Positive contributions alone count, whatever their signs come from; without any, relevance is divided evenly."""
    network = nn.Sequential(
        nn.Conv2d(2, 2, 1, groups=2, bias=False), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)
    ).double()
    with torch.no_grad():
        network[0].weight.copy_(
            torch.tensor([1.0, -1]).view(2, 1, 1, 1)
        )  # flat: each input keeps its channel's relevance
        network[1].weight.copy_(torch.tensor([[3.0, -1], [-2, 2]])[..., None, None])
        network[1].bias.copy_(torch.tensor([0.5, 9]))
        network[4].weight.copy_(torch.tensor([[0.0, 0], [1, 1]]))
        network[4].bias.zero_()
    inputs = torch.tensor([2.0, 1]).view(1, 2, 1, 1).double()
    # Activations 2 and -1 give 6 + 1 + 0.5, due to both, and -4 - 2 + 9, due to nothing but the bias.
    expected = torch.tensor([7.5 * 6 / 7 + 3 / 2, 7.5 / 7 + 3 / 2]).double()
    torch.testing.assert_close(found(network, inputs).flatten(), expected, rtol=1e-5, atol=0)


def test_branches_and_pooling_by_hand() -> None:
    """A sum divides relevance by contribution, an average pooling as well; a factor lets it pass."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1, bias=False)
            self.branch = nn.Conv2d(1, 1, 1, bias=False)
            self.fc = nn.Linear(1, 2, bias=False)
            for layer in (self.conv, self.branch, self.fc):
                nn.init.ones_(layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc((x + self.branch(x) * 6).mean((2, 3)))

    network = Network().double()
    inputs = torch.tensor([[[[1.0, 3]]]]).double()
    # (1 + 6) * (1 + 3) / 2 = 14, of which the second input contributed three quarters.
    torch.testing.assert_close(found(network, inputs).flatten(), torch.tensor([3.5, 10.5]).double(), rtol=1e-5, atol=0)


def test_scaled_sums_and_keywords_have_a_rule() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.branch, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(input=self.conv(x))
            return self.fc(F.relu(input=torch.add(x, self.branch(x), alpha=0.5), inplace=True).mean(dim=(2, 3)))

    torch.manual_seed(0)
    assert conserved(Network().double(), torch.randn(1, 3, 8, 8).double()) < 1e-6


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11_bn", "densenet121", "mobilenet_v2"])
def test_relevance_is_conserved(name: str) -> None:
    torch.manual_seed(0)
    network = getattr(models, name)(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
    inputs = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        target = int(network.eval()(inputs).argmax())
    assert conserved(network, inputs, target) < 1e-3


def test_activations_that_owe_their_value_to_the_bias_keep_their_relevance() -> None:
    """Depthwise layers with negative weights, as in MobileNets: the usual z+ would lose everything here."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU6(), nn.Flatten(), nn.Linear(64, 2)
    ).double()
    with torch.no_grad():
        network[2].weight.copy_(-network[2].weight.abs())
        network[2].bias.fill_(2.0)
    assert conserved(network, torch.randn(1, 3, 8, 8).double()) < 1e-4


def test_the_network_is_left_as_it_was() -> None:
    network = models.resnet18(weights=None).eval()
    inputs = torch.randn(1, 3, 64, 64)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    identities = [id(parameter) for parameter in network.parameters()]
    found(network, inputs)
    assert [id(parameter) for parameter in network.parameters()] == identities
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_layer_called_twice_has_a_rule_for_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, bias=False)
            self.conv = nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.conv(self.stem(x))))
            return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

    torch.manual_seed(0)
    network = Twice().double()
    assert conserved(network, torch.randn(1, 3, 8, 8).double()) < 1e-4


class Body(nn.Module):
    """A convolution, then `body`, then global pooling and a classifier."""

    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.fc, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2), body
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self, self.conv(x)).mean((2, 3)))


def made(body: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Body(body, **modules).double().eval()


def test_calls_of_one_layer_keep_apart() -> None:
    """Conservation cannot see whether the rule of one call works on what went through the other."""
    inputs = torch.randn(1, 3, 8, 8).double()
    again, act = nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.1)
    once = made(lambda self, x: self.act(self.a(self.act(self.a(x)))), a=again, act=act)
    twice = made(
        lambda self, x: self.act2(self.b(self.act(self.a(x)))),
        a=again,
        b=copy.deepcopy(again),
        act=act,
        act2=copy.deepcopy(act),
    )
    torch.testing.assert_close(found(once, inputs), found(twice, inputs))
    for method in ("score_cam", "grad_cam"):
        torch.testing.assert_close(attribute(once, inputs, TARGET, method), attribute(twice, inputs, TARGET, method))


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.avg_pool2d(x, 8),
        lambda x: F.avg_pool2d(x, x.size(3)),
        lambda x: F.avg_pool2d(x, (x.size(2), x.size(3))),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1)[..., None],
        lambda x: (x.sum(x.dim() - 1, keepdim=True) / x.size(3)).mean(2, keepdim=True),
    ],
)
def test_averages_are_divided_by_contribution_however_they_are_written(pool: Callable[[Tensor], Tensor]) -> None:
    inputs = torch.randn(1, 3, 8, 8).double()
    expected = found(made(lambda self, x: self.pool(F.relu(x)), pool=nn.AvgPool2d(8)), inputs)
    torch.testing.assert_close(found(made(lambda _, x: pool(F.relu(x))), inputs), expected)


@pytest.mark.parametrize(
    "network",
    [
        made(lambda _, x: torch.add(torch.ones(4, 1, 1).double(), x, alpha=3)),
        made(lambda _, x: F.relu(x) * 0 + 1),
        made(lambda self, x: F.avg_pool2d(F.relu(x) * 0, 2) + self.branch(x)[..., ::2, ::2], branch=nn.Conv2d(4, 4, 1)),
        made(
            lambda self, x: self.norm(self.linear(x.flatten(2))).view(1, 4, 2, 2),
            linear=nn.Linear(64, 4),
            norm=nn.BatchNorm1d(4),
        ),
        made(
            lambda self, x: self.norm(self.up(F.relu(x))),
            up=nn.ConvTranspose2d(4, 4, 2, groups=2),
            norm=nn.BatchNorm2d(4),
        ),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 2)).double(),
        made(lambda self, x: self.norm(y := self.branch(x)) + y, branch=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)),
        made(lambda _, x: x.mean((2, 3), keepdim=True) * torch.ones(4, 3, 5).double()),
        made(lambda _, x: torch.ones(4, 3, 5).double() + x.mean((2, 3), keepdim=True)),
        made(lambda _, x: F.relu(x) + x.mean((2, 3), keepdim=True)),
        made(lambda _, x: x.mean((2, 3), keepdim=True) + F.relu(x)),
    ],
)
def test_relevance_is_conserved_in_odd_places(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    assert conserved(network, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5)).double()) < 1e-4


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_enlarging_divides_relevance_by_contribution_however_it_is_written(mode: str) -> None:
    inputs = torch.randn(1, 3, 8, 8).double()
    expected = found(made(lambda _, x: F.interpolate(F.relu(x), scale_factor=2, mode=mode)), inputs)
    module = nn.Upsample(scale_factor=2, mode=mode)
    torch.testing.assert_close(found(made(lambda self, x: self.up(F.relu(x)), up=module), inputs), expected)


def test_denominators_are_kept_from_zero_with_their_sign() -> None:
    kept = _stabilized(torch.tensor([-1e-12, 0, 1e-12], dtype=torch.float64))
    torch.testing.assert_close(kept, torch.tensor([-2e-12, 1e-12, 2e-12]).double(), rtol=1e-6, atol=0)


def test_networks_without_rules_are_refused_by_layer() -> None:
    network = models.mobilenet_v3_small(weights=None)
    with pytest.raises(InvalidInputError, match=r"'lrp' is not valid .*: features\.1\.block\.1\.mul: multiplies"):
        found(network, torch.randn(1, 3, 64, 64))
