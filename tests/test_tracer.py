"""Tracing on small networks: what is pruned, what is refused, and that the model comes back as it was."""

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cifar
import numpy as np
import pytest
import torch
import trace_specificity
from PIL import Image
from torch import Tensor, nn

import spade_fast as sf
from spade_fast import ops, tracer
from spade_fast.layers import GramSum, InputRecorder, _round_to_tf32, mask_block_size, prunable_layers
from spade_fast.memory import memory_errors
from spade_fast.models import evaluation_mode


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 16, 1),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).to(dtype)


def picture(seed: int = 0, size: tuple[int, int] = (12, 14)) -> Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))


#: For tests whose last layer has few outputs: some lose all their weights, which is warned of.
NARROW = pytest.mark.filterwarnings("ignore:layer .* outputs have no weight left")
SETTINGS = {"preprocess": nn.Identity(), "num_augmentations": 8}


def assert_same_bits(first: sf.Trace, second: sf.Trace) -> None:
    assert list(first.layers) == list(second.layers)
    for name, layer in first.layers.items():
        assert torch.equal(layer.weight, second.layers[name].weight), name
        assert layer.loss == second.layers[name].loss


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that must come back: values bit for bit, identities, flags, hooks, gradients."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    hooks = [
        [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        for module in modules
    ]
    parameters = [(id(parameter), parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return {"state": state, "training": [m.training for m in modules], "hooks": hooks, "parameters": parameters}


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    state = after.pop("state")
    expected = dict(before)
    for name, tensor in expected.pop("state").items():
        assert torch.equal(tensor, state[name]), name
    assert after == expected


# What is pruned


def test_a_uniform_target_prunes_all_but_the_first_layer():
    trace = sf.trace(network(), picture(), 0.5, **SETTINGS)
    assert list(trace.layers) == ["3", "4", "9"]
    assert trace.dense == {"0": "first layer"}
    assert [layer.requested_sparsity for layer in trace.layers.values()] == [0.5] * 3
    # More than asked for only where inputs were never active.
    assert all(0.49 < layer.sparsity < 0.8 for layer in trace.layers.values())


@pytest.mark.parametrize(
    "rules", [{"solver": "fast"}, {"solver": "exact"}, {"solver": "exact", "block_layout": "channels"}]
)
def test_trace_equals_solving_each_layer_on_dense_activations(rules):
    model = network(torch.float64).eval()
    model[3] = nn.Conv2d(6, 6, 3, padding=1, dtype=torch.float64)
    views = sf.Augmentation(size=(12, 14))(picture(), 8, torch.Generator().manual_seed(3)).double()
    trace = sf.trace(model, picture(), {"3": 0.6, "4": 0.5, "9": 0.7}, seed=3, **rules, **SETTINGS)
    assert {name: trace.settings[name] for name in rules} == rules
    inputs = {"3": model[:3](views), "4": model[:4](views), "9": model[:9](views)}
    for name, layer in trace.layers.items():
        module = model.get_submodule(name)
        hessian, block_size = sf.hessian(module, inputs[name]), module.weight.shape[2:].numel()
        expected = sf.solve(module.weight, hessian, layer.requested_sparsity, block_size=block_size, **rules)
        assert torch.equal(layer.mask, expected.mask)
        torch.testing.assert_close(layer.weight, expected.weight, rtol=0, atol=1e-12)


def test_exact_traces_of_many_images_are_those_of_each():
    model, images = network(), [picture(seed) for seed in range(3)]
    settings = {"solver": "exact", **SETTINGS}
    for image, trace in zip(images, sf.trace_many(model, images, 0.5, images_in_flight=2, **settings), strict=True):
        assert_same_bits(trace, sf.trace(model, image, 0.5, **settings))
        depthwise = trace.layers["3"].mask.flatten(1)
        assert torch.equal(depthwise.any(1), depthwise.all(1))  # whole channels


def test_the_first_layer_is_pruned_where_it_is_named():
    assert "0" in sf.trace(network(), picture(), {"0": 0.5}, **SETTINGS).layers
    assert list(sf.trace(network(), picture(), 0.5, layers=["0"], **SETTINGS).layers) == ["0"]


def test_a_plan_with_a_default_may_name_the_first_layer():
    named = sf.trace(network(), picture(), sf.SparsityPlan(targets={"0": 0.5}, default=0.4), **SETTINGS)
    assert list(named.layers) == ["0", "3", "4", "9"]
    dense = sf.trace(network(), picture(), sf.SparsityPlan(targets={"0": 0.0}, default=0.4), **SETTINGS)
    assert list(dense.layers) == ["3", "4", "9"]
    assert dense.dense == {"0": "target sparsity 0"}


def test_the_only_layer_is_pruned_only_by_name():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 14, 10))
    for sparsity in (0.5, sf.presets.default):
        with pytest.raises(sf.InvalidInputError, match="no layer is left to prune: name one.*'1': first layer"):
            sf.trace(model, picture(), sparsity, **SETTINGS)
    assert list(sf.trace(model, picture(), {"1": 0.5}, **SETTINGS).layers) == ["1"]


def test_the_exact_solver_takes_single_weights_of_few_rows():
    model = network()
    model[9] = nn.Linear(16, 2)
    plain = sf.trace(model, picture(), {"9": 0.3}, solver="exact", **SETTINGS).layers["9"]
    single = sf.trace(model, picture(), {"9": 0.3}, solver="exact", block_size=1, **SETTINGS).layers["9"]
    assert torch.equal(plain.weight, single.weight)
    assert (~plain.mask).sum() == 10


@pytest.mark.parametrize("outputs", [1, 2])
def test_small_classifiers_do_not_lose_every_weight(outputs):
    model = network()
    model[9] = nn.Linear(16, outputs)
    trace = sf.trace(model, picture(), {"9": 0.8}, **SETTINGS)
    assert 0 < trace.layers["9"].mask.count_nonzero() < 16 * outputs
    assert trace.layers["9"].sparsity >= 0.75


@NARROW
def test_the_published_rule_keeps_the_published_blocks():
    model = network(torch.float64)
    model[9] = nn.Linear(16, 3).double()
    published = sf.trace(model, picture(), {"9": 0.25}, mask_rule="published", **SETTINGS).layers["9"]
    one_column = sf.trace(model, picture(), {"9": 0.25}, mask_rule="published", block_size=1, **SETTINGS).layers["9"]
    assert torch.equal(published.mask, one_column.mask)
    widened = sf.trace(model, picture(), {"9": 0.25}, **SETTINGS).layers["9"]
    assert not torch.equal(widened.mask, one_column.mask)


def test_experts_that_get_no_input_stay_dense():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.used, self.idle = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input: Tensor) -> Tensor:
            rows = self.first(input.movedim(1, -1)).flatten(0, 2)
            return torch.cat([self.used(rows), self.idle(rows[:0])])

    trace = sf.trace(Experts(), picture(), 0.5, **SETTINGS)
    assert list(trace.layers) == ["used"]
    assert trace.dense["idle"] == "called with empty batches only"


def test_autocast_around_a_trace_reaches_the_model_only():
    model = network()
    plain = sf.trace(model, picture(), 0.5, **SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sf.trace(model, picture(), 0.5, **SETTINGS)
    assert [layer.fallback for layer in inside.layers.values()] == [None] * 3
    assert min(plain.overlap(inside).values()) > 0.9


def test_what_a_module_caches_can_still_take_part_in_a_gradient():
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = None, network()

        def forward(self, input: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.linspace(0.9, 1.1, input.shape[-1])
            return self.body(input * self.table)

    model = Caching()
    trace = sf.trace(model, picture(), 0.5, **SETTINGS)
    model(picture()[None].repeat(2, 1, 1, 1).requires_grad_()).sum().backward()
    with torch.inference_mode():
        copied = trace.pruned_copy(model)
    copied(picture()[None].repeat(2, 1, 1, 1)).sum().backward()


def test_train_and_eval_of_the_model_itself_are_not_called():
    class Merging(nn.Linear):
        """Changes its weight when it leaves training, as LoRA layers do."""

        def train(self, mode: bool = True) -> nn.Module:
            if not mode:
                self.weight.data.add_(1)
            return super().train(mode)

    model = nn.Sequential(*network()[:9], Merging(16, 10)).train()
    before = snapshot(model)
    sf.trace(model, picture(), 0.5, **SETTINGS)
    assert_unchanged(model, before)


def test_each_image_of_a_set_gets_its_own_views():
    seen = []

    class Spy(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(input.clone())
            return input

    sf.trace(nn.Sequential(Spy(), network()), [picture(1), picture(1)], 0.5, **SETTINGS)
    assert not torch.equal(seen[-2], seen[-1])


def test_a_missing_kernel_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(ops, "_C", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = sf.trace(network(), picture(), 0.5, batch_size=1, **SETTINGS)
    assert len([warning for warning in caught if "much slower" in str(warning.message)]) == 1
    assert trace.settings["backend"] == "reference"


def test_a_photograph_needs_a_known_input_size():
    photo = Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8))
    with pytest.raises(sf.InvalidInputError, match="pass augment=spade_fast.Augmentation"):
        sf.trace(network(), photo, 0.5, **SETTINGS)
    assert sf.trace(network(), photo, 0.5, augment=sf.Augmentation(size=16), **SETTINGS).layers


def test_layers_restricts_a_plan():
    trace = sf.trace(network(), picture(), {"3": 0.5, "9": 0.2}, layers=["9"], **SETTINGS)
    assert list(trace.layers) == ["9"]
    assert trace.dense["3"] == "not in the plan"


def test_target_zero_is_dense():
    trace = sf.trace(network(), picture(), {"3": 0.0, "9": 0.5}, **SETTINGS)
    assert trace.dense["3"] == "target sparsity 0"
    assert list(trace.layers) == ["9"]
    empty = sf.trace(network(), picture(), 0.0, **SETTINGS)
    assert (dict(empty.layers), empty.sparsity) == ({}, 0.0)


@NARROW
def test_the_default_is_an_error_budget():
    default = sf.trace(network(), picture(), **SETTINGS)
    assert default.settings["error_budget"] == 0.03
    assert default.rows() == sf.trace(network(), picture(), sf.ErrorBudget(0.03), **SETTINGS).rows()


@NARROW
def test_the_last_half_leaves_depthwise_layers_dense():
    trace = sf.trace(network(), picture(), sf.presets.last_half, **SETTINGS)
    assert list(trace.layers) == ["4", "9"]


def test_block_size_is_the_taps_of_one_channel_unless_asked_for():
    model = network(torch.float64)
    published = sf.trace(model, picture(), {"0": 0.5}, **SETTINGS).layers["0"]
    assert torch.equal(
        published.mask, sf.trace(model, picture(), {"0": 0.5}, block_size=9, **SETTINGS).layers["0"].mask
    )
    counts = [block.count_nonzero().item() for block in published.mask.flatten(1).split(9, dim=1)]
    assert counts == [27, 27, 27]
    whole = sf.trace(model, picture(), {"0": 0.5}, block_size=27, **SETTINGS).layers["0"]
    assert not torch.equal(whole.mask, published.mask)
    assert whole.sparsity == 0.5


def test_a_model_that_views_its_maps_is_traced_in_their_usual_layout():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.linear = nn.Linear(4 * 10 * 12, 3)
            self.layouts: list[bool] = []

        def forward(self, input: Tensor) -> Tensor:
            self.layouts.append(input.is_contiguous())
            maps = self.conv(input)
            return self.linear(maps.view(len(maps), -1))  # fails for maps that are stored channels last

    model = Views().double()
    trace = sf.trace(model, picture(), {"conv": 0.5, "linear": 0.5}, batch_size=3, **SETTINGS)
    assert model.layouts == [False] * 2 + [True] * 4  # one view each, and the batches: the first in both layouts
    plain = nn.Sequential(model.conv, nn.Flatten(), model.linear)
    expected = sf.trace(plain, picture(), {"0": 0.5, "2": 0.5}, batch_size=3, **SETTINGS)
    for name, other in (("conv", "0"), ("linear", "2")):
        assert torch.equal(trace.layers[name].mask, expected.layers[other].mask)
        torch.testing.assert_close(trace.layers[name].weight, expected.layers[other].weight)


def test_an_error_of_the_model_itself_comes_through():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, _input: Tensor) -> Tensor:
            raise RuntimeError("broken by itself")

    with pytest.raises(RuntimeError, match="broken by itself"):
        sf.trace(Broken(), torch.rand(3, 8, 8), {"conv": 0.5}, **SETTINGS)


def test_bfloat16_rounds_the_inputs_once_and_sums_in_float32():
    model = nn.Sequential(nn.Conv2d(3, 6, 3))
    views = torch.rand(8, 3, 12, 14)
    settings = {**SETTINGS, "augment": lambda *_: views, "batch_size": 8}
    trace = sf.trace(model, picture(), {"0": 0.5}, hessian_dtype=torch.bfloat16, **settings)
    rounded = views.bfloat16().float()
    assert not torch.equal(rounded, views)
    expected = sf.solve(model[0].weight, sf.hessian(model[0], rounded), 0.5, block_size=9)
    assert torch.equal(trace.layers["0"].weight, expected.weight)
    assert trace.settings["hessian_dtype"] == "bfloat16"


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_tf32_rounds_the_inputs_once_and_sums_in_float32(backend):
    model = nn.Sequential(nn.Conv2d(3, 6, 3))
    views = torch.rand(8, 3, 12, 14)
    settings = {**SETTINGS, "augment": lambda *_: views, "batch_size": 8, "backend": backend}
    trace = sf.trace(model, picture(), {"0": 0.5}, hessian_dtype="tf32", **settings)
    rounded = _round_to_tf32(views)
    assert not torch.equal(rounded, views)
    hessian = sf.hessian(model[0], rounded, backend=backend)
    expected = sf.solve(model[0].weight, hessian, 0.5, block_size=9, backend=backend)
    assert torch.equal(trace.layers["0"].weight, expected.weight)
    assert trace.settings["hessian_dtype"] == "tf32"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tf32_sums_of_a_model_in_another_precision(dtype):
    trace = sf.trace(network(dtype), picture(), 0.5, hessian_dtype="tf32", **SETTINGS)
    assert all(layer.weight.dtype == dtype for layer in trace.layers.values())


def test_float64_sums_of_a_float32_model():
    model = network()
    trace = sf.trace(model, picture(), {"9": 0.5}, hessian_dtype=torch.float64, **SETTINGS)
    plain = sf.trace(model, picture(), {"9": 0.5}, **SETTINGS)
    assert trace.layers["9"].weight.dtype == torch.float32
    torch.testing.assert_close(trace.layers["9"].weight, plain.layers["9"].weight, rtol=1e-3, atol=1e-4)
    assert trace.layers["9"].loss != plain.layers["9"].loss


def test_positions_per_column_caps_what_a_layer_contributes(monkeypatch):
    seen: dict[str, int] = {}
    finish = InputRecorder.__exit__

    def watched(self: InputRecorder, *details: Any) -> Any:
        seen.update({name: total.samples for name, total in self.sums.items()})
        return finish(self, *details)

    monkeypatch.setattr(InputRecorder, "__exit__", watched)
    model = network(torch.float64)
    targets = {"0": 0.5, "4": 0.5, "9": 0.5}
    every = sf.trace(model, picture(), targets, batch_size=4, **SETTINGS)
    assert seen == {"0": 8 * 12 * 14, "4": 8 * 12 * 14, "9": 8}
    capped = sf.trace(model, picture(), targets, batch_size=4, positions_per_column=10, **SETTINGS)
    assert seen == {"0": 10 * 27, "4": 10 * 6, "9": 8}
    assert_same_bits(capped, sf.trace(model, picture(), targets, batch_size=4, positions_per_column=10, **SETTINGS))
    assert not torch.equal(capped.layers["0"].weight, every.layers["0"].weight)
    assert torch.equal(capped.layers["9"].weight, every.layers["9"].weight)
    assert_same_bits(every, sf.trace(model, picture(), targets, batch_size=4, positions_per_column=1e6, **SETTINGS))


def test_a_cap_beyond_all_numbers_is_none():
    model = network(torch.float64)
    every = sf.trace(model, picture(), {"9": 0.5}, **SETTINGS)
    assert_same_bits(every, sf.trace(model, picture(), {"9": 0.5}, positions_per_column=sys.float_info.max, **SETTINGS))


def test_refit_keeps_the_mask_and_lowers_the_loss():
    model = network(torch.float64)
    plain, refitted = (sf.trace(model, picture(), {"0": 0.5}, refit=refit, **SETTINGS) for refit in (False, True))
    assert torch.equal(plain.layers["0"].mask, refitted.layers["0"].mask)
    assert refitted.layers["0"].loss < plain.layers["0"].loss
    assert (plain.settings["refit"], refitted.settings["refit"]) == (False, True)


def test_a_set_of_images_makes_one_trace_from_all_of_them():
    model = network(torch.float64)
    images = [picture(1), picture(2, (9, 20))]
    both = sf.trace(model, images, {"9": 0.5}, **SETTINGS)
    assert both.settings["images"] == 2
    single = sf.trace(model, images[0], {"9": 0.5}, **SETTINGS)
    assert not torch.equal(both.layers["9"].weight, single.layers["9"].weight)


@NARROW
def test_a_module_called_twice_is_pruned_once_on_all_its_inputs():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Linear(3, 5).double(), nn.Linear(5, 5).double()

        def forward(self, input: Tensor) -> Tensor:
            return self.shared(self.shared(self.first(input.movedim(1, -1))))

    model = Twice()
    trace = sf.trace(model, picture(), 0.5, **SETTINGS)
    views = sf.Augmentation(size=(12, 14))(picture(), 8, torch.Generator().manual_seed(0)).double()
    once = model.first(views.movedim(1, -1)).reshape(-1, 5)
    inputs = torch.cat([once, model.shared(once)])
    block_size = mask_block_size(model.shared.weight, 0.5)
    expected = sf.solve(model.shared.weight, sf.hessian(model.shared, inputs), 0.5, block_size=block_size)
    torch.testing.assert_close(trace.layers["shared"].weight, expected.weight)


class Tied(nn.Module):
    """An encoder and a decoder of one weight; the decoder's is an embedding's too, on request."""

    def __init__(self, embedding: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        if embedding:
            self.embedding = nn.Embedding(4, 4)
            self.embedding.weight = self.encoder.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.decoder(self.encoder(self.first(input.movedim(1, -1))))


@NARROW
def test_tied_weights_are_pruned_as_one():
    model = Tied()
    trace = sf.trace(model, picture(), 0.5, **SETTINGS)
    assert list(trace.layers) == ["encoder", "decoder"]
    assert torch.equal(trace.layers["encoder"].weight, trace.layers["decoder"].weight)
    with trace.applied(model):
        assert model.encoder.weight is model.decoder.weight
    assert model.encoder.weight is model.decoder.weight
    copied = trace.pruned_copy(model)
    assert copied.encoder.weight is copied.decoder.weight


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ({"encoder": 0.5, "decoder": 0.6}, "'encoder' and 'decoder' share one weight.*0.5 and 0.6"),
        ({"encoder": 0.5}, "'encoder' and 'decoder' share one weight.*only"),
        ({"decoder": 0.5}, "'decoder' and 'encoder' share one weight.*only"),
    ],
)
def test_tied_weights_need_one_target(sparsity, message):
    with pytest.raises(sf.InvalidInputError, match=message):
        sf.trace(Tied(), picture(), sparsity, **SETTINGS)


def test_weights_tied_to_an_unprunable_module_stay_dense():
    trace = sf.trace(Tied(embedding=True), picture(), {"first": 0.5}, **SETTINGS)
    assert "embedding" in trace.dense
    with pytest.raises(sf.InvalidInputError, match="no layer is left to prune.*'encoder'.*embedding"):
        sf.trace(Tied(embedding=True), picture(), 0.5, **SETTINGS)
    with pytest.raises(sf.InvalidInputError, match="'encoder' shares its weight with 'embedding'"):
        sf.trace(Tied(embedding=True), picture(), {"encoder": 0.5, "decoder": 0.5}, **SETTINGS)


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused = network(), nn.Linear(4, 4)
        self.transposed = nn.ConvTranspose2d(3, 3, 1)

    def forward(self, input: Tensor) -> Tensor:
        return self.body(self.transposed(input))


def test_layers_that_are_never_called_or_unsupported_stay_dense_and_are_reported():
    with pytest.warns(UserWarning, match=r"1 layer is never called and so stays dense: 'unused'"):
        trace = sf.trace(WithUnused(), picture(), 0.5, **SETTINGS)
    assert trace.dense["unused"] == "never called in the forward pass"
    assert trace.dense["transposed"] == "ConvTranspose2d is not pruned"
    assert trace.dense["body.0"] == "first layer"


@pytest.mark.parametrize(
    ("sparsity", "layers", "message"),
    [
        ({"unused": 0.5}, None, "'unused' is never called in the forward pass"),
        (0.5, ["unused"], "'unused' is never called in the forward pass"),
        ({"transposed": 0.5}, None, "'transposed' is a ConvTranspose2d: only Linear and Conv2d"),
        ({"body.44": 0.5}, None, r"'body\.44' matches no prunable.*'body\.4'"),
        (0.5, ["boby"], "'boby' matches no prunable.*'body'"),
        (0.5, "body", r"pass \['body'\]"),
        (1.5, None, "must lie within"),
        (None, None, "sparsity must be a number"),
        ({}, None, "names no layer"),
        (0.5, [], "names no layer"),
        (0.5, [2], "sequence of names, got"),
        ({2: 0.5}, None, "maps names of layers"),
        (lambda _: "much", None, "sparsity must be a number"),
        (math.nan, None, "got nan"),
        ({"body": -1}, None, "sparsity of 'body'"),
    ],
)
def test_plans_that_do_not_fit_the_model(sparsity, layers, message):
    with pytest.raises(sf.InvalidInputError, match=message):
        sf.trace(WithUnused(), picture(), sparsity, layers=layers, **SETTINGS)


def test_empty_outputs_of_the_last_layer_are_warned_of():
    with pytest.warns(
        UserWarning, match=r"layer '9': \d+ of 10 outputs have no weight left at sparsity 0.95"
    ) as caught:
        sf.trace(network(), picture(), {"9": 0.95}, **SETTINGS)
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize(
    ("room", "lists"),
    [(0, [["a"], ["b"], ["c"], ["d"]]), (20, [["a", "b"], ["c"], ["d"]]), (200, [["a", "b", "c", "d"]])],
)
def test_layers_are_solved_together_while_their_hessians_are_small(room, lists):
    shapes = {"a": (1, 2), "b": (4, 2), "c": (1, 9), "d": (1, 1)}
    sums = {
        name: GramSum(groups, columns, torch.float32, torch.device("cpu"), native=True)
        for name, (groups, columns) in shapes.items()
    }
    assert tracer._solved_together(sums, room) == lists


# Same seed, same bits


def test_same_seed_same_bits():
    model = network()
    first, second, other = (sf.trace(model, picture(), 0.5, seed=seed, **SETTINGS) for seed in (1, 1, 2))
    assert_same_bits(first, second)
    assert any(not torch.equal(layer.weight, other.layers[name].weight) for name, layer in first.layers.items())


def test_batch_size_changes_rounding_only():
    model = network(torch.float64)
    whole = sf.trace(model, picture(), 0.5, **SETTINGS)
    for batch_size in (1, 3, 7):
        parts = sf.trace(model, picture(), 0.5, batch_size=batch_size, **SETTINGS)
        for name, layer in whole.layers.items():
            assert torch.equal(layer.mask, parts.layers[name].mask)
            torch.testing.assert_close(layer.weight, parts.layers[name].weight, rtol=0, atol=1e-6)


def test_native_equals_reference():
    model = network(torch.float64)
    views = torch.rand(
        SETTINGS["num_augmentations"], 3, 12, 14, dtype=torch.float64
    )  # rendered they differ by rounding
    settings = {**SETTINGS, "augment": lambda *_: views, "batch_size": len(views)}
    native, plain = (
        sf.trace(model, picture(), 0.5, backend=backend, **settings) for backend in ("native", "reference")
    )
    for name, layer in native.layers.items():
        assert torch.equal(layer.mask, plain.layers[name].mask)
        torch.testing.assert_close(layer.weight, plain.layers[name].weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("images_in_flight", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("room", [0, 300, tracer._SOLVED_TOGETHER])  # how many layers are solved side by side
def test_trace_many_equals_trace_one_by_one(images_in_flight, room, monkeypatch):
    monkeypatch.setattr(tracer, "_SOLVED_TOGETHER", room)
    model, images = network(), [picture(seed) for seed in range(5)]
    traces = list(sf.trace_many(model, iter(images), 0.5, images_in_flight=images_in_flight, **SETTINGS))
    assert len(traces) == 5
    for image, trace in zip(images, traces, strict=True):
        alone = sf.trace(model, image, 0.5, **SETTINGS)
        assert_same_bits(trace, alone)
        assert (trace.dense, trace.settings) == (alone.dense, alone.settings)


@pytest.mark.parametrize("images_in_flight", [None, 1, 2, 3])
def test_images_are_drawn_as_they_are_needed(images_in_flight):
    drawn = []

    def images() -> Iterator[Tensor]:
        for seed in range(7):
            drawn.append(seed)
            yield picture(seed)

    traces = sf.trace_many(network(), images(), 0.5, images_in_flight=images_in_flight, **SETTINGS)
    at_a_time = images_in_flight or 1
    assert not drawn
    for done, _ in enumerate(traces):
        assert len(drawn) == min(7, (done // at_a_time + 1) * at_a_time)
    assert len(drawn) == 7


@pytest.mark.parametrize("images_in_flight", [1, 2, 5])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_trace_many_names_the_image(images_in_flight, position):
    images = [picture(seed) for seed in range(4)]
    images[position] = images[position] * math.nan
    traces = sf.trace_many(network(), images, 0.5, images_in_flight=images_in_flight, **SETTINGS)
    for image in images[:position]:
        assert_same_bits(next(traces), sf.trace(network(), image, 0.5, **SETTINGS))
    with pytest.raises(sf.InvalidInputError, match=f"^image {position}: .*NaN"):
        next(traces)


@pytest.mark.parametrize("images_in_flight", [1, 2, 5])
def test_trace_many_names_the_image_whose_layers_cannot_be_pruned(images_in_flight):
    class Glaring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, input: Tensor) -> Tensor:
            features = self.body[:9](input)
            return self.body[9](features * 1e30 if input.shape[-1] == 20 else features)  # squares overflow

    model, targets = Glaring(), {"body.9": 0.5}
    images = [picture(0, size) for size in [(12, 14), (12, 15), (12, 20), (12, 16)]]
    traces = sf.trace_many(model, images, targets, images_in_flight=images_in_flight, **SETTINGS)
    for image in images[:2]:
        assert_same_bits(next(traces), sf.trace(model, image, targets, **SETTINGS))
    with pytest.raises(sf.InvalidInputError, match=r"^image 2: layer 'body\.9': the Hessian holds NaN or infinite"):
        next(traces)


@pytest.mark.parametrize("images_in_flight", [1, 3])
def test_errors_of_the_model_and_of_the_iterable_come_through(images_in_flight):
    class Picky(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            if input.shape[-1] == 20:
                raise RuntimeError("too wide")
            return input

    model, sizes = nn.Sequential(Picky(), network()), [(12, 14), (12, 15), (12, 20), (12, 16)]
    traces = sf.trace_many(
        model, [picture(0, size) for size in sizes], 0.5, images_in_flight=images_in_flight, **SETTINGS
    )
    assert len([next(traces), next(traces)]) == 2
    with pytest.raises(RuntimeError, match="^too wide$"):
        next(traces)

    def images() -> Iterator[Tensor]:
        yield picture(0)
        yield picture(1)
        raise sf.InvalidInputError("no file")

    traces = sf.trace_many(network(), images(), 0.5, images_in_flight=images_in_flight, **SETTINGS)
    assert len([next(traces), next(traces)]) == 2
    with pytest.raises(sf.InvalidInputError, match="^no file$"):
        next(traces)


def short_of_memory(run: Callable[..., Any], calls: set[int]) -> Callable[..., Any]:
    """The function, but that the calls of these numbers, from 0 on, find no memory."""
    count = -1

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return run(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("stage", "calls", "steps"),
    [
        ("_dense_pass", {0}, [(4, 2)]),
        ("_dense_pass", {2}, [(4, 2)]),
        ("_dense_pass", {3, 5}, [(4, 2), (2, 1)]),
        ("_dense_pass", {5}, [(4, 2)]),  # after the first four are done
        ("solve_layers", {0}, [(4, 2)]),
        ("solve_layers", {0, 1}, [(4, 2), (2, 1)]),
        ("solve_layers", {1}, [(2, 1)]),  # of the last two
    ],
)
def test_fewer_images_are_in_flight_where_memory_runs_out(stage, calls, steps, monkeypatch):
    model, images = network(), [picture(seed) for seed in range(6)]
    expected = [sf.trace(model, image, 0.5, **SETTINGS) for image in images]
    monkeypatch.setattr(tracer, stage, short_of_memory(getattr(tracer, stage), calls))
    with pytest.warns(UserWarning, match="in flight") as caught:
        traces = list(sf.trace_many(model, iter(images), 0.5, images_in_flight=4, **SETTINGS))
    assert [str(warning.message) for warning in caught] == [
        f"cpu has no memory for {before} images in flight: going on with {after}" for before, after in steps
    ]
    assert {warning.filename for warning in caught} == {__file__}
    assert len(traces) == len(expected)
    for trace, alone in zip(traces, expected, strict=True):
        assert_same_bits(trace, alone)


@pytest.mark.filterwarnings("ignore:cpu has no memory for . images in flight")
@pytest.mark.parametrize("images_in_flight", [1, 4])
@pytest.mark.parametrize(("stage", "done"), [("_dense_pass", 0), ("solve_layers", 0), ("solve_layers", 1)])
def test_an_image_that_does_not_fit_by_itself_is_named(images_in_flight, stage, done, monkeypatch):
    model, images = network(), [picture(seed) for seed in range(done * images_in_flight + 3)]
    monkeypatch.setattr(tracer, stage, short_of_memory(getattr(tracer, stage), set(range(done, 100))))
    traces = sf.trace_many(model, images, 0.5, images_in_flight=images_in_flight, **SETTINGS)
    for _ in range(done * images_in_flight):
        next(traces)
    message = (
        f"^image {done * images_in_flight}: cpu has no memory for this image alone: .* smaller batch_size or fewer"
    )
    with pytest.raises(sf.InvalidInputError, match=message) as caught:
        next(traces)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_errors_of_operators_that_ran_out_of_memory_are_known_by_the_allocators_count(monkeypatch):
    stats = {"num_ooms": 3}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: stats)
    device = torch.device("cuda:1")
    with pytest.raises(RuntimeError, match="^another fault$") as caught, memory_errors(device):
        raise RuntimeError("another fault")
    assert type(caught.value) is RuntimeError
    with pytest.raises(torch.OutOfMemoryError, match="a call failed") as caught, memory_errors(device):
        stats["num_ooms"] += 1
        raise RuntimeError("a call failed")
    assert type(caught.value.__cause__) is RuntimeError
    with pytest.raises(ValueError, match="no matter"), memory_errors(device):
        stats["num_ooms"] += 1
        raise ValueError("no matter")


def test_no_other_layout_is_tried_where_memory_runs_out():
    calls = []

    class Large(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            calls.append(len(input))
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        sf.trace(nn.Sequential(Large(), network()), picture(), 0.5, **SETTINGS)
    assert calls == [8]


@pytest.mark.parametrize("images_in_flight", [0, -1, 2.0, True, "2"])
def test_images_in_flight_are_counted(images_in_flight):
    with pytest.raises(sf.InvalidInputError, match="^images_in_flight must be a whole number of at least 1"):
        sf.trace_many(network(), [], 0.5, images_in_flight=images_in_flight, **SETTINGS)


def test_settings_of_many_traces_are_refused_at_once():
    with pytest.raises(sf.InvalidInputError, match="^num_augmentations must be"):
        sf.trace_many(network(), [], 0.5, **(SETTINGS | {"num_augmentations": 0}))
    with pytest.raises(TypeError, match=r"^trace_many\(\) got an unexpected keyword argument 'num_views'"):
        sf.trace_many(network(), [], 0.5, num_views=3)


@pytest.mark.parametrize("images", [Image.new("RGB", (9, 9)), torch.zeros(3, 9, 9), "photo.jpg", Path("photo.jpg")])
def test_one_image_is_no_iterable_of_images(images):
    with pytest.raises(
        sf.InvalidInputError, match=r"^images must be an iterable of images, got one .*: pass \[image\]"
    ):
        sf.trace_many(network(), images, 0.5, **SETTINGS)


@pytest.mark.parametrize("images", [None, 5])
def test_images_are_iterable(images):
    with pytest.raises(sf.InvalidInputError, match=f"^images must be an iterable of images, got {images}"):
        sf.trace_many(network(), images, 0.5, **SETTINGS)


def test_a_batch_of_pixels_is_as_many_images():
    batch = torch.stack([picture(), picture().flip(2)])
    found = list(sf.trace_many(network(), batch, 0.5, **SETTINGS))
    for trace, image in zip(found, batch, strict=True):
        alone = sf.trace(network(), image, 0.5, **SETTINGS)
        assert_same_bits(trace, alone)


def test_memory_of_an_image_in_flight():
    layers = [nn.Linear(10, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6)]
    numbers = 10**2 + 36**2 + 6 * 9**2
    assert tracer.bytes_in_flight(layers, 4) == 4 * 4 * numbers  # Hessians, and three times as much
    assert tracer.bytes_in_flight(layers, 8) == 4 * 8 * numbers
    assert [tracer.images_that_fit(free, 100) for free in (0, 249, 250, 1250, 10**6)] == [1, 1, 2, 10, 16]
    assert tracer.images_that_fit(0, 0) == 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("augment", 1.0), ("augment", math.nan), ("preprocess", math.inf)], "^augment gave NaN or infinite values"),
        ([("augment", 1.0), ("preprocess", math.inf)], "^preprocess gave NaN or infinite values"),
    ],
)
def test_what_is_looked_at_after_the_pass_is_refused_by_the_first(entries, message):
    with pytest.raises(sf.InvalidInputError, match=message):
        tracer._check_finite([(source, torch.tensor(value)) for source, value in entries])


# The model comes back


class Interrupt(nn.Module):
    """Raises at the second batch of 4 views: in the middle of a trace."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += len(input) == 4
        if self.calls == 2:
            raise self.error
        return input


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_model_is_unchanged_when_tracing_is_interrupted(error):
    model = nn.Sequential(network(), Interrupt(error))
    model.train()
    model[0][5].eval()
    model[0][9].weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(type(error)):
        sf.trace(model, picture(), 0.5, batch_size=4, **SETTINGS)
    assert_unchanged(model, before)
    torch.testing.assert_close(torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)), torch.full((1, 1), 2.0))


@pytest.mark.parametrize("training", [True, False])
def test_model_is_unchanged_by_tracing(training):
    model = network().train(training)
    model[1].train(not training)
    before = snapshot(model)
    sf.trace(model, picture(), 0.5, **SETTINGS)
    assert_unchanged(model, before)


def test_tracing_runs_in_evaluation_mode():
    seen = []

    class Spy(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(self.training)
            return input

    model = nn.Sequential(Spy(), network()).train()
    sf.trace(model, picture(), 0.5, **SETTINGS)
    assert set(seen) == {False}
    assert model[0].training


def test_threads_trace_one_model_in_training_mode():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    expected = sf.trace(model, picture(), 0.5, **SETTINGS)
    with ThreadPoolExecutor(4) as threads:
        traces = list(threads.map(lambda _: sf.trace(model, picture(), 0.5, **SETTINGS), range(16)))
    for trace in traces:
        assert_same_bits(expected, trace)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_mode_of_a_compiled_model(training):
    model = network().train(training)
    model[1].train(not training)
    compiled = torch.compile(model)  # whose flag is that of the model
    flags = [module.training for module in compiled.modules()]
    with evaluation_mode(compiled):
        assert not any(module.training for module in compiled.modules())
    assert [module.training for module in compiled.modules()] == flags


def test_evaluation_mode_lasts_until_the_last_leaves():
    model = network().train()
    model[4].eval()
    flags = [module.training for module in model.modules()]
    first, second = evaluation_mode(model), evaluation_mode(model[4])
    third = evaluation_mode(model)
    first.__enter__()
    second.__enter__()
    third.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    third.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == flags


# Models of other kinds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    trace = sf.trace(network(dtype), picture(), 0.5, **SETTINGS)
    assert all(layer.weight.dtype == dtype for layer in trace.layers.values())


def test_channels_last_models():
    plain = sf.trace(network(torch.float64), picture(), 0.5, **SETTINGS)
    model = network(torch.float64).to(memory_format=torch.channels_last)
    trace = sf.trace(model, picture(), 0.5, **SETTINGS)
    for name, layer in trace.layers.items():
        assert torch.equal(layer.mask, plain.layers[name].mask)
    assert trace.layers["3"].weight.is_contiguous(memory_format=torch.channels_last)


def test_device_traces_a_copy():
    model = network()
    trace = sf.trace(model, picture(), 0.5, device="cpu", **SETTINGS)
    assert_same_bits(trace, sf.trace(model, picture(), 0.5, **SETTINGS))
    with pytest.raises(sf.InvalidInputError, match="device 'cuda:99'"):
        sf.trace(model, picture(), 0.5, device="cuda:99", **SETTINGS)


def test_models_that_cannot_be_traced():
    with torch.device("meta"):
        weightless = network()
    cases = {
        "no prunable layers: Linear and Conv2d are pruned, it has Embedding": nn.Sequential(nn.Embedding(3, 3)),
        "it has no weights at all": nn.Sequential(nn.ReLU()),
        "on the meta device": weightless,
        "'0' has no weight yet": nn.Sequential(nn.LazyConv2d(3, 3), nn.Flatten(), nn.LazyLinear(2)),
        "model is a function": lambda x: x,
    }
    for message, model in cases.items():
        with pytest.raises(sf.InvalidInputError, match=message):
            sf.trace(model, picture(), 0.5, layers=["0"] if "yet" in message else None, **SETTINGS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_scripted_models_are_refused():
    with pytest.raises(sf.InvalidInputError, match="model._orig_mod"):
        sf.trace(torch.compile(network()), picture(), 0.5, **SETTINGS)
    with pytest.raises(sf.InvalidInputError, match="scripted"):
        sf.trace(torch.jit.script(network()), picture(), 0.5, **SETTINGS)


def compile_in_place(model: nn.Sequential) -> str:
    model[4].compile()
    return "module '4'"


def compile_submodule(model: nn.Sequential) -> str:
    model[4] = torch.compile(model[4])
    return "module '4'"


def compile_forward(model: nn.Sequential) -> str:
    model.forward = torch.compile(model.forward)
    return "model"


@pytest.mark.parametrize("compile_part", [compile_in_place, compile_submodule, compile_forward])
def test_models_with_compiled_parts_are_refused(compile_part):
    model = network()
    with pytest.raises(sf.InvalidInputError, match=f"{compile_part(model)} is compiled"):
        sf.trace(model, picture(), 0.5, **SETTINGS)


def test_a_copy_of_a_module_compiled_in_place_is_traced():
    model = network()
    expected = sf.trace(model, picture(), 0.5, **SETTINGS)
    model.compile()
    assert_same_bits(expected, sf.trace(copy.deepcopy(model), picture(), 0.5, **SETTINGS))


def test_preprocessing_must_be_known():
    with pytest.raises(sf.InvalidInputError, match="Sequential does not say how its inputs are normalised"):
        sf.trace(network(), picture(), 0.5)
    loaded = sf.LoadedModel("tiny", network(), cifar.PREPROCESS, None, "random")
    by_itself = sf.trace(loaded, picture(), 0.5, num_augmentations=4)
    given = sf.trace(loaded.module, picture(), 0.5, num_augmentations=4, preprocess=cifar.PREPROCESS)
    assert_same_bits(by_itself, given)


def test_timm_models_bring_their_preprocessing():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3)
    trace = sf.trace(model, picture(), 0.5, num_augmentations=2)
    assert len(trace.layers) > 5


@NARROW
def test_transformers_are_traced_and_their_attention_projections_reported():
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)
    with pytest.warns(UserWarning, match="never called"):
        trace = sf.trace(model, picture(0, (32, 32)), 0.5, **SETTINGS)
    assert "encoder.layers.encoder_layer_0.mlp.0" in trace.layers
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert trace.dense[attention] == "MultiheadAttention.in_proj_weight is not pruned"
    assert "never called" in trace.dense[f"{attention}.out_proj"]
    assert "" not in trace.dense
    with pytest.warns(UserWarning, match="never called"):
        by_block = sf.trace(model, picture(0, (32, 32)), {"encoder": 0.5}, **SETTINGS)
    assert list(by_block.layers) == [name for name in trace.layers if name.startswith("encoder.")]


# Images, augmentations and settings


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "the sequence is empty"),
        (picture() * math.nan, "NaN or infinite"),
        (picture() + math.inf, "NaN or infinite"),
        ((picture() * 255).byte(), "uint8"),
        (picture()[0], r"shape \[12, 14\]"),
        (picture()[None], "batch of one"),
        (picture() * 3 - 1, "normalised already"),
        ([picture(), "photo.jpg"], r"image 1: .*load_image\('photo.jpg'\)"),
        ("photo.jpg", r"load_image\('photo.jpg'\)"),
        (np.zeros((4, 4, 3)), "fromarray"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(sf.InvalidInputError, match=message):
        sf.trace(network(), image, 0.5, **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_augmentations": 0}, "num_augmentations must be a whole number of at least 1"),
        ({"num_augmentations": 2.5}, "num_augmentations must be a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"block_size": 0}, "block_size must be a whole number of at least 1"),
        ({"refit": "no"}, "refit must be True or False"),
        (
            {"hessian_dtype": torch.float16},
            "hessian_dtype must be torch.bfloat16, torch.float32, torch.float64, 'tf32' or None",
        ),
        ({"positions_per_column": 0}, "positions_per_column must be a positive number"),
        ({"positions_per_column": 10**400}, "positions_per_column must be a positive number"),
        ({"positions_per_column": "16"}, "positions_per_column must be a positive number"),
        ({"damping": -1}, "damping"),
        ({"solver": "slow"}, "solver='slow'"),
        ({"solver": "exact", "block_layout": "rows"}, "block_layout='rows'"),
        ({"block_layout": "channels"}, "block_layout='channels' is for solver='exact'"),
        ({"mask_rule": "none"}, "mask_rule='none'"),
        ({"backend": "gpu"}, "backend='gpu'"),
        ({"seed": -(2**70)}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"augment": 5}, "augment must be"),
        ({"preprocess": 5}, "preprocess must be"),
        ({"device": 1.5}, "device '1.5'"),
        ({"device": "meta"}, "device 'meta'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(sf.InvalidInputError, match=message):
        sf.trace(network(), picture(), 0.5, **(SETTINGS | settings))


def test_own_augmentation():
    calls = []

    def shifts(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
        calls.append(count)
        return torch.stack([image.roll(int(n), 2) for n in torch.randint(0, 5, (count,), generator=generator)])

    trace = sf.trace(network(), picture(), 0.5, augment=shifts, batch_size=3, **SETTINGS)
    assert calls == [3, 3, 2]
    assert len(trace.layers) == 3
    sized = sf.trace(network(), picture(), 0.5, augment=sf.Augmentation(size=7), **SETTINGS)
    assert len(sized.layers) == 3


@pytest.mark.parametrize(
    "augment",
    [
        lambda *_: None,
        lambda image, *_: image,
        lambda image, *_: image[None][:0],
        lambda image, *_: image[None] * math.nan,
    ],
)
def test_bad_augmentations(augment):
    with pytest.raises(sf.InvalidInputError, match="augment"):
        sf.trace(network(), picture(), 0.5, augment=augment, **SETTINGS)


def test_activations_that_overflow_name_the_layer():
    model = network()
    with torch.no_grad():
        model[4].weight.fill_(3e38)
    with pytest.raises(sf.InvalidInputError, match="layer '9': the Hessian holds NaN or infinite"):
        sf.trace(model, picture(), {"9": 0.5}, **SETTINGS)


def test_photographs_are_accepted_as_pil_images():
    pixels = (picture(0, (40, 40)).movedim(0, -1) * 255).byte().numpy()
    trace = sf.trace(network(), Image.fromarray(pixels), 0.5, preprocess=cifar.PREPROCESS, num_augmentations=4)
    assert trace.settings["num_augmentations"] == 4


def test_progress_goes_to_stderr(capsys):
    sf.trace(network(), picture(), 0.5, progress=True, **SETTINGS)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "dense pass" in captured.err
    sf.trace(network(), picture(), 0.5, **SETTINGS)
    assert capsys.readouterr().err == ""


def test_no_more_than_one_batch_of_views_is_held():
    sizes = []

    class Spy(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            sizes.append(len(input))
            return input

    sf.trace(nn.Sequential(Spy(), network()), [picture(1), picture(2)], 0.5, batch_size=3, **SETTINGS)
    assert sizes == [1, 1, 3, 3, 2, 3, 3, 2]  # one view shows which batch norms may be folded


@pytest.mark.skipif(not cifar.FOLDER.is_dir(), reason=f"needs the CIFAR-10 networks in {cifar.FOLDER}")
def test_a_trace_keeps_an_answer_the_network_is_sure_of_and_loses_the_others():
    # The experiment of docs/experiments.md, on a few of the images that it is easiest for.
    model = cifar.load_resnet(56)
    pixels, labels = cifar.load_images()
    inputs = cifar.PREPROCESS(pixels)
    with torch.inference_mode():
        confidences, answers = model(inputs).softmax(1).max(1)
    assert (answers == labels).double().mean() > 0.8
    sure = (confidences > 0.99).nonzero()[:, 0]
    kept, accuracies = [], []
    for index in sure[:: len(sure) // 6][:6].tolist():
        trace = sf.trace(
            model,
            pixels[index],
            0.7,
            num_augmentations=128,
            augment=trace_specificity.VIEWS["nearby"],
            refit=True,
            preprocess=cifar.PREPROCESS,
        )
        assert len(trace.layers) == len(prunable_layers(model)) - 1
        with trace.applied(model), torch.inference_mode():
            kept.append(bool(model(inputs[index, None]).argmax() == answers[index]))
            accuracies.append((model(inputs[::5]).argmax(1) == labels[::5]).double().mean().item())
    assert sum(kept) >= len(kept) - 1
    assert sum(accuracies) / len(accuracies) < 0.75
