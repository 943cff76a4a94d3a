"""A grid of sparsities solved at once: every plan gives the trace that it gives alone; errors are those of outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import spade_fast as sf
from spade_fast.errors import InvalidInputError
from spade_fast.plans import ErrorBudget, SparsityPlan
from spade_fast.sweep import Sweep, sweep
from spade_fast.traces import Trace

# Layers are small: some outputs are left without a weight.
pytestmark = pytest.mark.filterwarnings("ignore:.*have no weight left")

GRID = (0, 0.3, 0.6, 0.9)


class Network(nn.Module):
    """Strided, grouped, depthwise and pointwise convolutions, and two linear layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.point = nn.Conv2d(12, 9, 1)
        self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 9)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.strided, self.depthwise, self.grouped, self.point):
            x = torch.relu(layer(x))
        return self.second(torch.relu(self.first(x.mean((2, 3)))))


@pytest.fixture(params=["contiguous", "channels last"])
def network(request: pytest.FixtureRequest) -> Network:
    module = Network().eval()
    return module.to(memory_format=torch.channels_last) if request.param == "channels last" else module


@pytest.fixture
def image() -> Tensor:
    return torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(1))


SETTINGS = {"preprocess": nn.Identity(), "num_augmentations": 12}
PLANS = [
    SparsityPlan.uniform(0.6),
    SparsityPlan.from_mapping({"strided": 0.3, "grouped": 0.9, "first": 0.6, "second": 0.6}),
    SparsityPlan.from_mapping({"strided": 0.0, "point": 0.9}),
    SparsityPlan({"depthwise": 0.3}, default=0.9),
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("solver", ["fast", "exact"])
def test_a_plan_gives_the_trace_that_it_gives_alone(
    network: Network, image: Tensor, plan: SparsityPlan, backend: str, solver: str
) -> None:
    settings = {**SETTINGS, "backend": backend, "solver": solver}
    found = sweep(network, image, GRID, **settings).trace(plan)
    alone = sf.trace(network, image, plan, **settings)
    assert list(found.layers) == list(alone.layers)
    assert found.dense.keys() == alone.dense.keys()
    for name, layer in alone.layers.items():
        same = found.layers[name]
        assert torch.equal(same.weight, layer.weight)
        assert torch.equal(same.mask, layer.mask)
        assert same.weight.stride() == layer.weight.stride()
        facts = ("requested_sparsity", "loss", "damping", "fallback", "sparsity")
        assert [getattr(same, fact) for fact in facts] == [getattr(layer, fact) for fact in facts]
    x = image[None]
    assert torch.equal(found.pruned_copy(network)(x), alone.pruned_copy(network)(x))


def test_layers_that_are_named_are_all_that_is_solved(network: Network, image: Tensor) -> None:
    found = sweep(network, image, GRID, layers=["stem", "point"], **SETTINGS)
    assert set(found.errors) == {"stem", "point"}
    alone = sf.trace(network, image, {"stem": 0.6}, **SETTINGS)
    assert torch.equal(found.trace(SparsityPlan.from_mapping({"stem": 0.6})).layers["stem"].weight,
                       alone.layers["stem"].weight)  # fmt: skip


@pytest.mark.parametrize("layer", ["strided", "depthwise", "grouped", "point"])
def test_errors_are_those_of_the_outputs(layer: str) -> None:
    network = Network().eval().double()
    generator = torch.Generator().manual_seed(2)
    views = torch.rand(10, 3, 14, 14, dtype=torch.float64, generator=generator)
    found = sweep(network, views[0], GRID, augment=lambda *_: views, preprocess=nn.Identity(), num_augmentations=10,
                  batch_size=10, damping=0)  # fmt: skip
    seen: list[Tensor] = []
    hook = network.get_submodule(layer).register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    network(views)
    hook.remove()
    dense = network.get_submodule(layer)
    outputs = outputs_without_bias(dense, seen[0])
    for share, error in zip(found.grid, found.errors[layer], strict=True):
        sparse = found.trace(SparsityPlan.uniform(share)).pruned_copy(network).get_submodule(layer)
        wrong = (outputs_without_bias(sparse, seen[0]) - outputs).square().sum() / outputs.square().sum()
        assert error == pytest.approx(wrong.item(), rel=1e-8)
    assert found.errors[layer][-1] > 1e-3
    assert list(found.errors[layer]) == sorted(found.errors[layer])


def outputs_without_bias(layer: nn.Module, inputs: Tensor) -> Tensor:
    outputs = layer(inputs)
    bias = layer.bias
    return (outputs - (bias if outputs.dim() == 2 else bias[:, None, None])).detach()


def test_little_is_kept_of_sparse_layers(network: Network, image: Tensor) -> None:
    found = sweep(network, image, (0.9,), **SETTINGS)
    packed = found._layers["grouped"][0]
    assert len(packed.values) == found.trace(SparsityPlan.uniform(0.9)).layers["grouped"].mask.count_nonzero()
    assert packed.bits.numel() * 8 - network.grouped.weight.numel() in range(8)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([0], "must hold one above 0"),
        ([], "must hold one above 0"),
        ([0.5, 1.5], "a sparsity to choose from must lie within 0"),
        (["0.5"], "a sparsity to choose from must be a number"),
        ("0.5", "must be a sequence of numbers"),
        (0.5, "must be a sequence of numbers"),
    ],
)
def test_grids_that_cannot_be_used(network: Network, image: Tensor, grid: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        sweep(network, image, grid, **SETTINGS)


def test_plans_beside_the_grid_are_refused(network: Network, image: Tensor) -> None:
    found = sweep(network, image, GRID, **SETTINGS)
    with pytest.raises(
        InvalidInputError, match=r"'strided' has target 0\.5, but what was solved is 0, 0\.3, 0\.6, 0\.9"
    ):
        found.trace(SparsityPlan.uniform(0.5, layers=["strided"]))
    with pytest.raises(InvalidInputError, match="'strid' matches no"):
        found.trace(SparsityPlan.uniform(0.3, layers=["strid"]))
    with pytest.raises(InvalidInputError, match="'stem' was left out as the first layer"):
        found.trace(SparsityPlan.uniform(0.3, layers=["stem"]))
    with pytest.raises(InvalidInputError, match="plan must be a SparsityPlan, got a ErrorBudget"):
        found.trace(ErrorBudget(0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [{"first": 0.3, "second": 0.6}, {"first": 0.3}, {"second": 0.3, "first": 0.0}])
def test_tied_layers_have_one_target(network: Network, image: Tensor, targets: dict[str, float]) -> None:
    found = sweep(network, image, GRID, **SETTINGS)
    with pytest.raises(InvalidInputError, match="'first' and 'second' share one weight, but have different targets"):
        found.trace(SparsityPlan.from_mapping(targets))


def test_the_sweep_of_a_set(network: Network, image: Tensor) -> None:
    pair = [image, 1 - image]
    found = sweep(network, pair, GRID, **SETTINGS)
    assert isinstance(found, Sweep)
    alone = sf.trace(network, pair, 0.6, **SETTINGS)
    made = found.trace(SparsityPlan.uniform(0.6))
    assert isinstance(made, Trace)
    assert made.overlap(alone) == dict.fromkeys(alone.layers, 1.0)
    assert made.settings["images"] == 2
