"""Batch norms are folded only where nothing but rounding changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spade_fast as sf
from spade_fast.folding import FoldedBatchNorms, FoldingMismatch, learn_folds


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def settled(model: nn.Module) -> nn.Module:
    """Evaluation mode in float64, with batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator)
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
            if module.affine:
                module.weight.data = torch.randn(module.num_features, generator=generator)
                module.bias.data = torch.randn(module.num_features, generator=generator)
    return model.double().eval()


class Net(nn.Module):
    """A convolution, a batch norm, and what a test does with them."""

    def __init__(self, body: Callable[[Net, Tensor], object], affine: bool = True, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, bias=bias)
        self.norm = nn.BatchNorm2d(4, affine=affine)
        self.second = nn.Conv2d(4, 4, 1)
        self.body = body
        self.kept: Tensor | None = None

    def forward(self, input: Tensor) -> object:
        return self.body(self, input)


def learned(model: nn.Module, inputs: Tensor) -> list[bool]:
    with torch.no_grad():
        return [fold is not None for fold in learn_folds(model, inputs)]


INPUTS = torch.rand(2, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folded_runs_skip_the_norm_and_give_the_same(affine, bias, monkeypatch):
    model = settled(Net(lambda net, x: net.second(F.relu(net.norm(net.conv(x)), inplace=True)), affine, bias))
    with torch.no_grad():
        plain = model(INPUTS)
        folds = learn_folds(model, INPUTS[:1])
        assert [fold is not None for fold in folds] == [True, False]
        monkeypatch.setattr(torch, "batch_norm", None)  # from here on a batch norm that is called fails
        for _ in range(2):
            with FoldedBatchNorms(folds):
                torch.testing.assert_close(model(INPUTS), plain, rtol=1e-12, atol=1e-12)


def test_asking_for_the_shape_does_not_hinder():
    def body(net: Net, x: Tensor) -> Tensor:
        maps = net.conv(x)
        assert maps.shape[1] == maps.size(1) == 4
        assert maps.dim() == maps.ndim == 4
        return net.norm(maps)

    assert learned(settled(Net(body)), INPUTS) == [True]


def keep(net: Net, x: Tensor) -> Tensor:
    net.kept = net.conv(x)
    return net.norm(net.kept)


def add_before(net: Net, x: Tensor) -> Tensor:
    maps = net.conv(x)
    return maps + net.norm(maps)


def add_after(net: Net, x: Tensor) -> Tensor:
    maps = net.conv(x)
    return net.norm(maps) + maps


def return_both(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    maps = net.conv(x)
    return maps, net.norm(maps)


@pytest.mark.parametrize(
    "body",
    [
        keep,
        add_before,
        add_after,
        return_both,
        lambda net, x: net.norm(F.relu(net.conv(x))),
        lambda net, x: net.norm(net.conv(x).relu_()),
        lambda net, x: net.norm(net.conv(x).mT),
        lambda net, x: net.norm(net.conv(x)[..., 1:]),
        lambda net, x: torch.cat([net.norm(maps := net.conv(x)), maps]),
        lambda net, x: F.batch_norm(net.conv(x), None, None, training=True),
        lambda net, x: net.norm(F.conv2d(x, net.conv.weight * 2)),
        lambda net, x: net.norm(net.conv(x)).tolist(),
    ],
)
def test_what_is_read_elsewhere_is_not_folded(body):
    assert not any(learned(settled(Net(body)), INPUTS))


def test_hooks_and_scripted_parts_prevent_folding():
    model = settled(Net(lambda net, x: net.norm(net.conv(x))))
    assert learned(model, INPUTS) == [True]
    handle = model.conv.register_forward_hook(lambda *_: None)
    assert learned(model, INPUTS) == []
    handle.remove()
    assert learned(nn.Sequential(model, torch.jit.script(nn.Identity())), INPUTS) == []


def test_half_precision_is_not_folded():
    model = settled(Net(lambda net, x: net.norm(net.conv(x)))).bfloat16()
    assert not any(learned(model, INPUTS.bfloat16()))


def test_a_model_for_batches_of_one_size_is_not_folded():
    model = settled(Net(lambda net, x: net.norm(net.conv(x)).view(2, 4, 4, 5)))
    assert learned(model, INPUTS) == [True]
    assert learned(model, INPUTS[:1]) == []


def test_another_course_than_the_learned_one_is_noticed():
    def body(net: Net, x: Tensor) -> Tensor:
        maps = net.conv(x)
        if len(x) == 3:
            return maps
        return net.norm(maps) if len(x) == 2 else F.relu(maps)

    model = settled(Net(body))
    with torch.no_grad():
        assert not any(learn_folds(model, INPUTS[:1]))
        folds = learn_folds(model, INPUTS)
        assert any(folds)
        with pytest.raises(FoldingMismatch, match="reads the output"), FoldedBatchNorms(folds):
            model(INPUTS[:1])
        with pytest.raises(FoldingMismatch, match="1 batch norms did not read"), FoldedBatchNorms(folds):
            model(torch.cat([INPUTS, INPUTS[:1]]))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("padding", [0, (2, 1), "same", "valid"])
def test_float32_convolutions_are_packed_whatever_their_geometry(padding, groups):
    model = settled(Net(lambda net, x: net.norm(net.conv(x)))).float()
    model.conv = nn.Conv2d(4, 4, (3, 2), padding=padding, groups=groups, dilation=(1, 2))
    if not isinstance(padding, str):
        model.conv.stride = (2, 1)
    inputs = torch.rand(3, 4, 9, 8)
    with torch.no_grad():
        plain = model(inputs)
        for size in (1, 3):  # packed for one view, then used for three
            with FoldedBatchNorms(learn_folds(model, inputs[:size])) as folded:
                torch.testing.assert_close(model(inputs), plain)
                assert list(folded._packed) == [0]


def test_traces_with_and_without_folding_differ_by_rounding_only():
    model = settled(Net(lambda net, x: net.second(F.relu(net.norm(net.conv(x)))).mean((2, 3))))
    views = torch.rand(8, 3, 9, 9, dtype=torch.float64)
    traces = []
    for batch_size in (8, 2):  # a single batch is never folded
        batches = iter(views.split(batch_size))
        settings = {"augment": lambda *_, given=batches: next(given), "batch_size": batch_size}
        targets = {"conv": 0.5}
        traces.append(sf.trace(model, views[0], targets, preprocess=nn.Identity(), num_augmentations=8, **settings))
    for name, layer in traces[0].layers.items():
        assert torch.equal(layer.mask, traces[1].layers[name].mask)
        torch.testing.assert_close(layer.weight, traces[1].layers[name].weight, rtol=1e-10, atol=1e-10)
        assert layer.loss != 0


def test_a_trace_folds_all_its_batches(monkeypatch):
    norms = []
    plain = torch.batch_norm

    def counted(input: Tensor, *rest: object) -> Tensor:
        norms.append(len(input))
        return plain(input, *rest)

    monkeypatch.setattr(torch, "batch_norm", counted)
    model = settled(Net(lambda net, x: net.second(net.norm(net.conv(x))).mean((2, 3))))
    image = torch.rand(3, 9, 9, dtype=torch.float64)
    sf.trace(model, image, {"second": 0.25}, preprocess=nn.Identity(), num_augmentations=7, batch_size=3)
    assert norms == [1]  # the view from which the folds are learned


def test_a_model_that_takes_another_course_later_is_traced_without_folding():
    runs: list[int] = []

    def body(net: Net, x: Tensor) -> Tensor:
        runs.append(len(x))
        maps = net.conv(x)
        return net.second(F.relu(maps) if len(runs) % 5 == 0 else net.norm(maps)).mean((2, 3))

    model = settled(Net(body))
    image = torch.rand(3, 9, 9, dtype=torch.float64)
    settings = {"preprocess": nn.Identity(), "num_augmentations": 5, "batch_size": 2}
    trace = sf.trace(model, image, {"second": 0.25}, **settings)
    # Learned and tried on one view, then folded until the last view took the other course; then all again.
    assert runs == [1, 1, 2, 2, 1, 2, 2, 1]
    runs.clear()
    model.register_forward_hook(lambda *_: None)  # nothing is folded under hooks
    expected = sf.trace(model, image, {"second": 0.25}, **settings)
    assert torch.equal(trace.layers["second"].weight, expected.layers["second"].weight)
