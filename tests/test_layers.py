"""What the recorder sees: the inputs of a weight, wherever and however often it is applied."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spade_fast as sf
from spade_fast import ops, reference
from spade_fast.layers import (
    GramSum,
    InputRecorder,
    _round_to_tf32,
    is_depthwise,
    mask_block_size,
    prunable_layers,
    sample_patches,
    unsupported_layers,
)


def unfolded_hessian(images: Tensor, kernel: int, **geometry: int) -> Tensor:
    columns = F.unfold(images, kernel, **geometry).transpose(0, 1).flatten(1)
    return 2 / columns.shape[1] * columns @ columns.T


def test_hessian_of_a_linear_layer_counts_tokens():
    tokens = torch.randn(4, 7, 5, dtype=torch.float64)
    hessian = sf.hessian(nn.Linear(5, 2).double(), tokens)
    rows = tokens.reshape(-1, 5)
    torch.testing.assert_close(hessian, (2 / 28 * rows.T @ rows)[None])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_hessian_of_a_convolution(backend):
    images = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2).double()
    hessian = sf.hessian(layer, images, backend=backend)
    torch.testing.assert_close(hessian[0], unfolded_hessian(images, 3, stride=2, padding=1, dilation=2))
    # Half of tr(W H W^T) is the mean squared output, so H has the scale that losses are stated in.
    weight = layer.weight.flatten(1)
    outputs = layer(images) - layer.bias[:, None, None]
    torch.testing.assert_close((weight @ hessian[0] @ weight.T).trace() / 2, (outputs**2).sum(1).mean())


def test_hessian_of_a_single_image_without_batch():
    image = torch.randn(3, 6, 6)
    layer = nn.Conv2d(3, 2, 3)
    torch.testing.assert_close(sf.hessian(layer, image), sf.hessian(layer, image[None]))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_and_valid_padding(kernel, dilation):
    images = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    for padding in ("same", "valid"):
        layer = nn.Conv2d(3, 2, kernel, padding=padding, dilation=dilation).double()
        weight = layer.weight.flatten(1)
        energy = ((layer(images) - layer.bias[:, None, None]) ** 2).sum(1).mean()
        torch.testing.assert_close((weight @ sf.hessian(layer, images)[0] @ weight.T).trace() / 2, energy)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_other_padding_modes_are_seen_as_they_are(mode):
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    layer = nn.Conv2d(3, 2, 3, padding=1, padding_mode=mode).double()
    padded = F.pad(images, (1, 1, 1, 1), mode=mode)
    torch.testing.assert_close(sf.hessian(layer, images)[0], unfolded_hessian(padded, 3))


def test_padding_added_by_a_subclass_is_seen():
    layers = pytest.importorskip("timm.layers")
    images = torch.randn(2, 3, 7, 7)
    layer = layers.Conv2dSame(3, 2, 3, stride=2)
    torch.testing.assert_close(sf.hessian(layer, images)[0], unfolded_hessian(F.pad(images, (1, 1, 1, 1)), 3, stride=2))


@pytest.mark.parametrize(
    ("layer", "inputs", "message"),
    [
        (nn.ReLU(), torch.ones(2, 2), "got ReLU"),
        (nn.ConvTranspose2d(1, 1, 1), torch.ones(1, 1, 2, 2), "got ConvTranspose2d"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), torch.ones(2, 2), "plain weight"),
        (nn.Linear(2, 2), torch.ones(0, 2), r"non-empty .* \[0, 2\]"),
        (nn.Linear(2, 2), torch.ones(2, 2).int(), "floating point"),
        (nn.Linear(2, 2), torch.tensor([[1.0, float("nan")]]), "NaN or infinite"),
        (nn.Linear(4, 2), [1.0], "must be a non-empty floating point tensor, got list"),
        (
            nn.Linear(4, 2),
            torch.ones(3, 4).half(),
            r"Linear cannot be run on torch.float16 \[3, 4\] on cpu \(RuntimeError: ",
        ),
        (nn.Conv2d(3, 2, 1), torch.ones(1, 4, 5, 5), r"Conv2d cannot be run on torch.float32 \[1, 4, 5, 5\] on cpu"),
        (nn.Linear(4, 2), torch.ones(3, 4).to_sparse(), "not sparse, and not on the meta device"),
        (nn.Linear(4, 2), torch.ones(3, 4, device="meta"), "not sparse, and not on the meta device"),
        (nn.Linear(4, 2, device="meta"), torch.ones(3, 4), "not sparse, and not on the meta device"),
        (nn.Conv2d(3, 4, (1, 5), dilation=(1, 2**62)), torch.ones(2, 3, 8, 8), "Conv2d cannot be run on"),
    ],
)
def test_hessian_refusals(layer, inputs, message):
    with pytest.raises(sf.InvalidInputError, match=message):
        sf.hessian(layer, inputs)


def test_a_weight_that_is_computed_on_the_way_cannot_be_seen():
    class Standardized(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight - self.weight.mean())

    with pytest.raises(sf.InvalidInputError, match="Standardized does not apply its weight"):
        sf.hessian(Standardized(2, 2), torch.ones(3, 2))


def record(model: nn.Module, inputs: Tensor, **settings: list[str]) -> InputRecorder:
    weights = {name: layer.weight for name, layer in prunable_layers(model).items()}
    recorder = InputRecorder(weights, **settings)
    with torch.inference_mode(), recorder:
        model(inputs)
    return recorder


def test_a_module_called_twice_sums_its_inputs():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4).double()

        def forward(self, input: Tensor) -> Tensor:
            return self.shared(self.shared(input))

    model, inputs = Twice(), torch.randn(6, 4, dtype=torch.float64)
    rows = torch.cat([inputs, model.shared(inputs).detach()])
    total = record(model, inputs).sums["shared"]
    assert total.samples == 12
    torch.testing.assert_close(total.gram()[0], rows.T @ rows)


def test_maps_of_several_sizes_add_up():
    layer = nn.Conv2d(3, 2, 3, padding=1).double()
    maps = [torch.randn(2, 3, *size, dtype=torch.float64) for size in ((5, 5), (7, 4), (5, 5))]
    recorder = InputRecorder({"layer": layer.weight})
    with torch.no_grad(), recorder:
        for inputs in maps:
            layer(inputs)
    positions = [len(inputs) * inputs.shape[2] * inputs.shape[3] for inputs in maps]
    expected = sum(unfolded_hessian(F.pad(x, (1, 1, 1, 1)), 3) * n for x, n in zip(maps, positions, strict=True))
    torch.testing.assert_close(recorder.sums["layer"].into_hessian()[0], expected / sum(positions))


def test_tall_narrow_inputs_are_not_gathered_without_bound():
    total = GramSum(1, 96, torch.float32, torch.device("cpu"), native=True)
    geometry = ops.Geometry((3, 1))
    for _ in range(9):
        total.add(torch.ones(16, 32, 2000, 1), geometry)
        assert sum(images.numel() for images in total._gathered) < 2**22
    torch.testing.assert_close(total.gram(), torch.full((1, 96, 96), 9 * 16 * 1998.0))


def rounded_by_hand(values: Tensor) -> Tensor:
    """float64 of what has ten bits of mantissa behind the first, ties away from zero."""
    mantissas, exponents = values.double().frexp()  # 0.5 to 1
    return torch.ldexp((mantissas.abs() * 2**11 + 0.5).floor() / 2**11 * mantissas.sign(), exponents)


def test_tf32_by_hand():
    step = 2.0**-10
    values = torch.tensor([1, 1 + step / 2, 1 + step / 2.1, -1 - step / 2, 1 + 1.5 * step, 0, torch.inf, 3e-40])
    expected = torch.tensor([1, 1 + step, 1, -1 - step, 1 + 2 * step, 0, torch.inf, 3e-40])
    assert torch.equal(_round_to_tf32(values)[:-1], expected[:-1])
    assert _round_to_tf32(values)[-1] == pytest.approx(3e-40, abs=2.0**-137)  # ten bits are left of no small number
    noise = torch.randn(1000)
    assert torch.equal(_round_to_tf32(noise).double(), rounded_by_hand(noise))


def test_rounding_to_tf32_keeps_what_is_no_number():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32)  # the first is what GPUs write
    assert _round_to_tf32(bits.view(torch.float32)).isnan().all()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("batch", [1, 5])  # gathered first, or not
@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        (ops.Geometry(), (40, 18, 18)),
        (ops.Geometry((3, 3), padding=(1, 1)), (9, 60, 60)),
        (ops.Geometry((3, 3), (2, 2), groups=6), (6, 120, 120)),
    ],
)
def test_tf32_rounds_inputs_and_sums_them_in_float32(native, batch, geometry, size):
    # Ties, which all grow: were half of them to shrink, sums would be smaller by 3e-4 of themselves.
    images = 1 + (2 * torch.randint(2**10, (5, *size)) + 1) / 2**11
    columns = geometry.columns(size[0])
    total = GramSum(geometry.groups, columns, torch.float32, torch.device("cpu"), native, tf32=True)
    for part in images.split(batch):
        total.add(part, geometry)
    assert total.gram().dtype == torch.float32
    expected = reference.conv2d_gram(rounded_by_hand(images), geometry)
    torch.testing.assert_close(total.gram().double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("batch", [1, 64])  # gathered first, or not
def test_maps_in_bfloat16_are_summed_without_a_copy(batch, monkeypatch):
    seen = []
    add = ops.add_conv2d_sums_

    def watched(sums: Tensor, images: Tensor, *rest: object) -> None:
        seen.append((sums.dtype, images.dtype))
        add(sums, images, *rest)

    monkeypatch.setattr(ops, "add_conv2d_sums_", watched)
    geometry, images = ops.Geometry((3, 3)), torch.randn(64, 4, 12, 12).bfloat16()
    total, wide = (GramSum(1, 36, torch.float32, torch.device("cpu"), native=True) for _ in range(2))
    for part in images.split(batch):
        total.add(part, geometry)
        wide.add(part.float(), geometry)
    gram = total.gram()
    assert set(seen) == {(torch.float32, torch.bfloat16), (torch.float32, torch.float32)}
    assert torch.equal(gram, wide.gram())
    plain = GramSum(1, 36, torch.float32, torch.device("cpu"), native=False)
    plain.add(images, geometry)
    torch.testing.assert_close(gram, plain.gram(), rtol=1e-4, atol=1e-2)


def test_maps_in_bfloat16_may_be_summed_in_float64():
    images = torch.randn(3, 4, 5, 5).bfloat16()
    total = GramSum(1, 4, torch.float64, torch.device("cpu"), native=True)
    total.add(images, ops.Geometry())
    torch.testing.assert_close(total.gram(), reference.conv2d_gram(images.double(), ops.Geometry()))


def test_inputs_that_the_model_writes_over_later_count_as_they_were():
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3).double()

        def forward(self, input: Tensor) -> Tensor:
            output = self.conv(input)
            input.zero_()
            return output

    model, inputs = Overwriting(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(
        record(model, inputs.clone()).sums["conv"].into_hessian()[0], unfolded_hessian(inputs, 3)
    )


def test_functional_calls_are_seen_and_other_weights_are_not():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.plain = nn.Parameter(torch.ones(3, 3))

        def forward(self, input: Tensor) -> Tensor:
            return F.linear(F.linear(input=input, weight=self.plain), bias=None, weight=self.layer.weight)

    recorder = record(Functional(), torch.ones(2, 3))
    assert list(recorder.sums) == ["layer"]
    assert torch.equal(recorder.sums["layer"].gram(), torch.full((1, 3, 3), 18.0))


def test_the_first_layer_is_the_first_called_not_the_first_listed():
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early = nn.Linear(3, 2), nn.Linear(3, 3)

        def forward(self, input: Tensor) -> Tensor:
            return self.late(self.early(input))

    recorder = record(Reversed(), torch.ones(2, 3), unless_first=["early", "late"])
    assert recorder.left_out == "early"
    assert list(recorder.sums) == ["late"]
    named = record(Reversed(), torch.ones(2, 3), unless_first=["late"])
    assert named.left_out is None
    assert list(named.sums) == ["early", "late"]


def test_a_first_layer_whose_weight_is_not_watched_is_still_the_first():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    recorder = record(model, torch.ones(2, 3), unless_first=["1"])
    assert recorder.left_out is None
    assert list(recorder.sums) == ["1"]


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5, 5)])
def test_batches_add_up(shape):
    layer = (nn.Linear(4, 3) if len(shape) == 2 else nn.Conv2d(4, 3, 3)).double()
    inputs = torch.randn(shape, dtype=torch.float64)
    recorder = InputRecorder({"layer": layer.weight})
    with torch.no_grad(), recorder:
        for batch in inputs.split([1, 2, 3]):
            layer(batch)
    torch.testing.assert_close(recorder.sums["layer"].into_hessian(), sf.hessian(layer, inputs))


def test_autocast_does_not_reach_the_sums():
    model, inputs = nn.Sequential(nn.Linear(8, 8)), torch.randn(50, 8)
    plain = record(model, inputs).sums["0"].gram()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(record(model, inputs).sums["0"].gram(), plain)


def test_one_weight_under_two_groupings_is_refused():
    class Regrouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 1)

        def forward(self, input: Tensor) -> Tensor:
            return self.conv(input) + F.conv2d(torch.cat([input, input], 1), self.conv.weight, groups=2)

    with pytest.raises(sf.InvalidInputError, match="'conv' is called with 2 groups"):
        record(Regrouped(), torch.ones(1, 2, 2, 2))


def test_a_call_that_fails_by_itself_fails_as_without_recorder():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        record(model, torch.ones(2, 5))


def test_kinds_of_layers():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 2),
            "conv": nn.Conv2d(2, 4, (3, 2)),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "transposed": nn.ConvTranspose2d(2, 2, 3),
            "embedding": nn.Embedding(3, 2),
            "norm": nn.BatchNorm2d(2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        }
    )
    assert list(prunable_layers(model)) == ["linear", "conv", "depthwise"]
    assert unsupported_layers(model) == {
        "transposed": "ConvTranspose2d",
        "embedding": "Embedding",
        "normed": "ParametrizedLinear with a computed weight",
    }
    assert [is_depthwise(layer) for layer in prunable_layers(model).values()] == [False, False, True]
    assert mask_block_size(model["linear"].weight) == 1
    assert mask_block_size(model["conv"].weight) == 6


def test_blocks_widen_until_they_can_reach_their_target():
    assert mask_block_size(torch.empty(10, 8), 0.9) == 1  # keeps 1 of 10
    assert mask_block_size(torch.empty(10, 8), 0.95) == 2  # 9.5 of 10 would round to all; keeps 1 of 20
    assert mask_block_size(torch.empty(2, 8), 0.8) == 5  # 1.6 of 2 would round to all; keeps 2 of 10
    assert mask_block_size(torch.empty(3, 8), 0.25) == 4  # 0.75 of 3 would round to a third; takes 3 of 12
    assert mask_block_size(torch.empty(1, 8, 3, 3), 0.95) == 18
    assert mask_block_size(torch.empty(1, 2), 0.99) == 2  # no wider than the layer
    assert mask_block_size(torch.empty(10, 8), 1.0) == 1


def test_quantized_layers_are_reported():
    quantized = torch.ao.nn.quantized.dynamic.Linear(4, 2)
    assert unsupported_layers(nn.Sequential(quantized)) == {"0": "quantized Linear"}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sampled_patches_are_columns_of_unfold_each_at_most_once(groups, layout):
    geometry = ops.Geometry((3, 2), (2, 1), (1, 0), (1, 2), groups)
    images = torch.randn(3, 4, 7, 6).contiguous(memory_format=layout)
    unfolded = torch.nn.functional.unfold(images, (3, 2), (1, 2), (1, 0), (2, 1)).transpose(1, 2).flatten(0, 1)
    patches, flat = sample_patches(images, geometry, 20, torch.Generator().manual_seed(0))
    assert patches.shape == (20, 24, 1, 1)
    assert flat == ops.Geometry(groups=groups)
    matches = (patches.flatten(1)[:, None] == unfolded[None]).all(2)
    assert (matches.sum(1) == 1).all()
    assert (matches.sum(0) <= 1).all()
    # The Gram matrix of all positions is that of the patches, in the same order of columns.
    every, one_by_one = sample_patches(images, geometry, len(unfolded) - 1, torch.Generator().manual_seed(0))
    total = reference.conv2d_gram(images, geometry)
    (left_out,) = [row for row in unfolded if not (every.flatten(1) == row).all(1).any()]
    rest = left_out.view(groups, -1)
    torch.testing.assert_close(reference.conv2d_gram(every, one_by_one), total - rest[:, :, None] * rest[:, None, :])


def test_positions_are_equally_likely():
    # Ten images of one pixel, which tells which of them it is.
    images, generator = torch.arange(10.0)[:, None, None, None], torch.Generator().manual_seed(0)
    rounds = 4000
    taken = torch.zeros(10)
    for _ in range(rounds):
        patches, _ = sample_patches(images, ops.Geometry(), 7, generator)
        taken[patches.flatten().long()] += 1
    assert taken.sum() == 7 * rounds
    assert (taken / rounds - 0.7).abs().max() < 5 * (0.7 * 0.3 / rounds) ** 0.5


def test_positions_are_spread_evenly():
    images, generator = torch.arange(10.0)[:, None, None, None], torch.Generator().manual_seed(0)
    for _ in range(100):
        patches, _ = sample_patches(images, ops.Geometry(), 5, generator)
        taken = patches.flatten().sort().values
        gaps = torch.cat([taken, taken[:1] + 10]).diff()  # one of each two numbers, the last followed by the first
        assert gaps.min() >= 1
        assert gaps.max() <= 3


def test_few_positions_are_all_taken():
    images, geometry = torch.randn(2, 3, 4, 4), ops.Geometry((3, 3), padding=(1, 1))
    patches, same = sample_patches(images, geometry, 32, torch.Generator())
    assert patches is images
    assert same is geometry
