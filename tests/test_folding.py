"""Batch norms are folded only where nothing but rounding changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spade_fast as sf
from spade_fast.folding import FoldedBatchNorms, FoldingMismatch, learn_folds
from spade_fast.models import Runner


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
    handle = model.norm.register_forward_pre_hook(lambda *_: None)
    assert learned(model, INPUTS) == []
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert learned(model, INPUTS) == []
    handle.remove()
    assert learned(model, INPUTS) == [True]
    model.norm._orig_mod = nn.Identity()  # as of a compiled module
    assert learned(model, INPUTS) == []
    del model.norm._orig_mod
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


def raw_output_later(net: Net, x: Tensor) -> Tensor:
    maps = net.conv(x)
    normed = net.norm(maps)
    return normed + maps if x.mean() > 1 else normed


def caught(net: Net, x: Tensor) -> Tensor:
    maps = net.conv(x)
    try:
        return net.norm(maps) + (maps.sum() if x.mean() > 1 else 0)
    except Exception:
        return maps


def another_norm(net: Net, x: Tensor) -> Tensor:
    norm = net.norm
    scale = nn.Parameter(norm.weight * 2) if x.mean() > 1 else norm.weight
    return F.batch_norm(net.conv(x), norm.running_mean, norm.running_var, scale, norm.bias)


def another_mean(net: Net, x: Tensor) -> Tensor:
    norm = net.norm
    mean = norm.running_mean + 1 if x.mean() > 1 else norm.running_mean
    return F.batch_norm(net.conv(x), mean, norm.running_var, norm.weight, norm.bias)


def another_eps(net: Net, x: Tensor) -> Tensor:
    net.norm.eps = 0.1 if x.mean() > 1 else 1e-5
    return net.norm(net.conv(x))


def another_conv(net: Net, x: Tensor) -> Tensor:
    conv = net.other if x.mean() > 1 else net.conv
    return net.norm(conv(x))


def another_reader(net: Net, x: Tensor) -> Tensor:
    maps = net.conv(x)
    return net.norm(maps) if x.mean() < 1 else net.second(maps)


@pytest.mark.parametrize(
    "body", [raw_output_later, caught, another_norm, another_mean, another_eps, another_conv, another_reader]
)
def test_a_model_that_does_otherwise_for_other_inputs_is_noticed(body):
    model = settled(Net(body))
    model.other = nn.Conv2d(3, 4, 3, bias=False).double()
    with torch.no_grad():
        folds = learn_folds(model, INPUTS)
        assert any(folds)
        with pytest.raises(FoldingMismatch), FoldedBatchNorms(folds):
            model(INPUTS + 9)
    with pytest.raises(FoldingMismatch), FoldedBatchNorms(folds):
        model((INPUTS + 9).requires_grad_())


class Deep(nn.Module):
    """Activations that write on what batch norms give, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.last = nn.Linear(8, 5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        maps = F.relu6(self.norms[0](self.first(x)), inplace=True)
        return self.last(F.hardswish(self.norms[1](self.second(maps)) + maps, inplace=True).mean(dim=(2, 3)))


def test_a_runner_folds_from_the_first_large_batch_on(monkeypatch):
    model, batch = settled(Deep()), torch.rand(8, 3, 9, 9, dtype=torch.float64)
    norms = []
    batch_norm = torch.batch_norm
    monkeypatch.setattr(torch, "batch_norm", lambda *given: norms.append(1) or batch_norm(*given))
    plain, folded = Runner(model), Runner(model, fold=True)
    for count, expected in ((7, 2), (8, 2), (8, 0), (3, 0)):  # of the first large batch, one run tells what to fold
        with torch.no_grad():
            wanted = plain(batch[:count])
            norms.clear()
            torch.testing.assert_close(folded(batch[:count]), wanted, rtol=1e-12, atol=1e-12)
        assert len(norms) == expected
    inputs = batch.clone().requires_grad_()
    gradients = [torch.autograd.grad(run(inputs)[:, 2].sum(), inputs)[0] for run in (plain, folded)]
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
    plain(inputs).sum().backward()
    assert model.first.weight.grad is not None


def test_a_runner_goes_on_where_a_network_does_otherwise_later():
    def body(net: Net, x: Tensor) -> Tensor:
        return raw_output_later(net, x).mean(dim=(2, 3))

    model, batch = settled(Net(body)), torch.rand(8, 3, 6, 7, dtype=torch.float64)
    run = Runner(model, fold=True)
    with torch.no_grad():
        for inputs in (batch, batch + 9, batch):
            torch.testing.assert_close(run(inputs), model(inputs), rtol=1e-12, atol=1e-12)


def test_a_runner_learns_nothing_of_a_network_without_batch_norms():
    model = Deep().double().eval()
    model.norms = nn.ModuleList([nn.Identity(), nn.Identity()])
    with torch.no_grad():
        Runner(model, fold=True)(torch.rand(8, 3, 9, 9, dtype=torch.float64))
    assert model.calls == 1


def test_a_computed_scale_is_not_folded():
    def body(net: Net, x: Tensor) -> Tensor:
        norm = net.norm
        return F.batch_norm(net.conv(x), norm.running_mean, norm.running_var, norm.weight * x.mean(), norm.bias)

    assert not any(learned(settled(Net(body)), INPUTS))


def test_a_reader_that_cannot_be_seen_shows_in_the_inputs_of_other_layers():
    scripted = torch.jit.script(doubled)

    def body(net: Net, x: Tensor) -> Tensor:
        maps = net.conv(x)
        normed = net.norm(maps)
        return normed + 1e-6 * net.second(scripted(maps))  # too little to show in the output

    assert learned(settled(Net(body)), INPUTS) == []


def doubled(maps: Tensor) -> Tensor:
    return maps * 2


def test_a_small_change_of_the_output_is_noticed():
    def body(net: Net, x: Tensor) -> Tensor:
        net.runs = getattr(net, "runs", 0) + 1
        return net.norm(net.conv(x)) * (1 + 0.01 * net.runs)

    assert learned(settled(Net(body)), INPUTS) == []


def test_the_view_is_left_alone_and_each_run_gets_it_whole():
    def body(net: Net, x: Tensor) -> Tensor:
        return net.norm(net.conv(x.mul_(2)))

    inputs = INPUTS.clone()
    assert learned(settled(Net(body)), inputs) == [True]
    assert torch.equal(inputs, INPUTS)


def test_empty_outputs_are_no_hindrance():
    model = settled(Net(lambda net, x: {"boxes": x.new_zeros(0, 4), "maps": net.norm(net.conv(x))}))
    assert learned(model, INPUTS) == [True]


def test_weights_that_would_overflow_are_not_folded():
    model = settled(Net(lambda net, x: net.norm(net.conv(x)).clamp(-1, 1)))
    model.norm.weight.data.fill_(1e308)
    model.conv.weight.data.fill_(1e10)
    assert not any(learned(model, INPUTS * 0))


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
        folded = FoldedBatchNorms(learn_folds(model, inputs[:1]))
        for size in (3, 1, 2):  # packed for the first, then used for the others
            with folded:
                torch.testing.assert_close(model(inputs[:size]), plain[:size])
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


def test_what_overflows_when_folded_stays_and_the_rest_is_folded():
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    model = settled(nn.Sequential(*layers))
    assert learned(model, INPUTS) == [True, True]
    # Tiny inputs come out as ordinary numbers, but the product of the two scales is none.
    layers[0].weight.data.mul_(1e200)
    layers[1].running_mean.zero_()
    layers[1].weight.data.mul_(1e200)
    assert learned(model, INPUTS * 1e-200) == [False, True]


def test_memory_that_runs_out_is_no_reason_to_fold_nothing():
    def body(net: Net, x: Tensor) -> Tensor:  # noqa: ARG001
        raise torch.OutOfMemoryError("as on a GPU")

    with pytest.raises(torch.OutOfMemoryError):
        learned(settled(Net(body)), INPUTS)
