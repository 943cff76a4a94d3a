"""LRP by hand, and that relevance is conserved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast.errors import InvalidInputError
from spade_fast.preparation import prepare
from spade_fast.relevance import relevance

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


def test_z_plus_by_hand() -> None:
    """Positive contributions alone count, whatever their signs come from; without any, relevance is divided evenly."""
    network = nn.Sequential(
        nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)
    ).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(2)[..., None, None])
        network[1].weight.copy_(torch.tensor([[3.0, -1], [-2, -2]])[..., None, None])
        network[1].bias.copy_(torch.tensor([0.5, 9]))
        network[4].weight.copy_(torch.tensor([[0.0, 0], [1, 1]]))
        network[4].bias.zero_()
    prepared = prepare(network, torch.ones(1, 2, 1, 1).double())
    inputs = torch.tensor([2.0, 1]).view(1, 2, 1, 1).double()
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(kept.append)

    network[0].register_forward_hook(keep)
    # Outputs 5.5 and 3, each with that relevance: the first is due to input 0, the second to nothing but its bias.
    relevance(prepare(network, inputs), inputs, TARGET)
    torch.testing.assert_close(kept[-1].flatten(), torch.tensor([5.5 + 1.5, 1.5]).double(), rtol=1e-5, atol=0)
    assert prepared.report.supports("lrp")


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


def test_networks_without_rules_are_refused_by_layer() -> None:
    network = models.mobilenet_v3_small(weights=None)
    with pytest.raises(InvalidInputError, match=r"'lrp' is not valid .*: features\.1\.block\.1\.mul: multiplies"):
        found(network, torch.randn(1, 3, 64, 64))
