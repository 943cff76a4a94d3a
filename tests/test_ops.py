"""Native operators against the plain PyTorch reference, in float64."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from geometries import images_and_geometry
from hypothesis import given, settings
from torch import Tensor

from spade_fast import ops, reference

pytestmark = pytest.mark.skipif("cpu" not in ops.native_devices(), reason="the extension is not built")

# kernel, stride, padding, dilation (vertical, horizontal each), groups, channels
GEOMETRIES = {
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1), 1, 6),
    "1x1 strided": ((1, 1), (2, 2), (0, 0), (1, 1), 1, 6),
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1), 1, 4),
    "3x3 unpadded": ((3, 3), (1, 1), (0, 0), (1, 1), 1, 4),
    "strided": ((3, 3), (2, 2), (1, 1), (1, 1), 1, 4),
    "dilated": ((3, 3), (1, 1), (2, 2), (2, 2), 1, 4),
    "oblong": ((5, 2), (3, 1), (2, 1), (1, 3), 1, 2),
    "grouped": ((3, 3), (1, 1), (1, 1), (1, 1), 2, 6),
    "depthwise": ((3, 3), (2, 2), (1, 1), (1, 1), 6, 6),
    "padding wider than the kernel": ((2, 2), (1, 1), (3, 3), (1, 1), 1, 3),
}


def native_gram(images: Tensor, geometry: ops.Geometry, batches: int = 1) -> Tensor:
    size = (images.shape[1], images.shape[2], images.shape[3])
    sums = torch.zeros(ops.conv2d_sums_shape(size, geometry), dtype=images.dtype)
    for batch in images.chunk(batches):
        ops.add_conv2d_sums_(sums, batch, geometry)
    return ops.conv2d_gram(sums, size, geometry)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    scale = expected.abs().max().clamp(min=1e-300)
    assert ((actual - expected).abs().max() / scale).item() <= tolerance


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv_gram_equals_unfold_and_matmul(name, layout):
    *geometry, channels = GEOMETRIES[name]
    geometry = ops.Geometry(*geometry)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, channels, 9, 8, dtype=torch.float64, generator=generator)
    if layout == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        images = torch.stack([images, images], dim=-1).flatten(3)[..., ::2]
        assert not images.is_contiguous()
    native = native_gram(images, geometry, batches=2)
    assert_close(native, reference.conv2d_gram(images, geometry))
    assert torch.equal(native, native.mT)


@settings(deadline=None, max_examples=150)
@given(images_and_geometry(longest_kernel=7, longest_stride=4, longest_dilation=3, most_images=3))
def test_conv_gram_on_any_geometry(drawn):
    assert_close(native_gram(*drawn), reference.conv2d_gram(*drawn))


# One shape for every way in which sums are kept: whole patches, shifted maps, one number a group.
FORMS = {
    "whole patches": (ops.Geometry((3, 3), padding=(1, 1)), 3, 3),
    "shifted maps": (ops.Geometry((3, 3), padding=(1, 1)), 32, 4),
    "depthwise": (ops.Geometry((3, 3), padding=(1, 1), groups=32), 32, 2),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_of_sums_over_many_chunks(name):
    geometry, channels, dimensions = FORMS[name]
    assert len(ops.conv2d_sums_shape((channels, 90, 90), geometry)) == dimensions
    images = torch.randn(19, channels, 90, 90, dtype=torch.float64)  # more than is packed at a time
    native = native_gram(images, geometry)
    assert_close(native, reference.conv2d_gram(images, geometry))
    assert torch.equal(native, native.mT)


@pytest.mark.parametrize("name", FORMS)
def test_the_number_of_threads_changes_no_bit(name):
    geometry, channels, _ = FORMS[name]
    images = torch.randn(5, channels, 20, 21)
    threads = torch.get_num_threads()
    try:
        grams = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grams.append(native_gram(images, geometry))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grams[0], grams[1])
    assert torch.equal(grams[0], grams[2])


def test_stride_1_keeps_thirteen_products_and_strips():
    # Of 5 x 5 offsets half, by symmetry: 9 pieces of the unshifted, 3 of the 4 along an axis, 1 of the 8 others.
    assert ops.conv2d_sums_shape((64, 56, 56), ops.Geometry((3, 3), padding=(1, 1))) == [1, 9 + 4 * 3 + 8, 64, 64]


@pytest.mark.parametrize("channels", [2**10, 2**24, 2**31 - 1])
def test_the_form_of_sums_is_chosen_alike_for_any_number_of_channels(channels):
    geometry = ops.Geometry((64, 64), padding=(64, 64))
    assert ops.conv2d_sums_shape((channels, 1, 1), geometry) == [1, 1, channels, channels]


@pytest.mark.parametrize("columns", [1, 7, 513, 1100])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_inputs_are_a_1x1_convolution(columns, transposed):
    rows = torch.randn(columns, 40, dtype=torch.float64).T if transposed else torch.randn(40, columns).double()
    gram = native_gram(rows[:, :, None, None], ops.Geometry(), batches=3)
    assert_close(gram[0], rows.T @ rows)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("name", FORMS)
def test_float32_gram_is_as_accurate_as_plain_float32(name):
    geometry, channels, _ = FORMS[name]
    images = torch.randn(4, channels, 20, 20)
    exact = reference.conv2d_gram(images.double(), geometry)
    native, plain = native_gram(images, geometry), reference.conv2d_gram(images, geometry)
    assert (native - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("name", FORMS)
def test_inputs_of_less_precision_are_rounded_once(name):
    geometry, channels, _ = FORMS[name]
    images = torch.randn(2, channels, 9, 9, generator=torch.Generator().manual_seed(0))
    size = (channels, 9, 9)
    tf32 = ((images.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    for rounded, maps, allow in ((tf32, images, True), (images.bfloat16().float(), images.bfloat16(), False)):
        assert not torch.equal(rounded, images)
        sums = torch.zeros(ops.conv2d_sums_shape(size, geometry))
        before = maps.clone()
        ops.add_conv2d_sums_(sums, maps, geometry, allow)
        assert torch.equal(maps, before)
        assert torch.equal(ops.conv2d_gram(sums, size, geometry), native_gram(rounded, geometry))


def test_tf32_ties_go_away_from_zero():
    step = 2.0**-10  # between neighbouring numbers of TF32 from 1 on
    for value, rounded in ((1 + step / 2, 1 + step), (-1 - step / 2, -1 - step), (1 + 0.49 * step, 1.0)):
        sums = torch.zeros(1, 1, 1)
        ops.add_conv2d_sums_(sums, torch.full((1, 1, 1, 1), value), ops.Geometry(), tf32=True)
        assert sums.item() == torch.tensor(rounded).square().item()


def test_tf32_keeps_nan_and_infinity():
    for bits, same in (
        (0x7FFFFFFF, torch.isnan),
        (-1, torch.isnan),
        (0x7F800000, torch.isinf),
        (0x7F7FFFFF, torch.isinf),
    ):
        value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        sums = torch.zeros(1, 1, 1)
        ops.add_conv2d_sums_(sums, value.view(1, 1, 1, 1), ops.Geometry(), tf32=True)
        assert same(sums).all()


def test_nothing_adds_nothing():
    sums = torch.ones(1, 4, 4)
    ops.add_conv2d_sums_(sums, torch.zeros(0, 4, 5, 5), ops.Geometry())
    assert torch.equal(sums, torch.ones(1, 4, 4))


@pytest.mark.parametrize("capability", ops._C.cpu_capabilities.split() if ops._C else [])
def test_every_instruction_set_of_this_machine(capability):
    environment = {**os.environ, "SPADE_FAST_CPU_CAPABILITY": capability}
    command = [sys.executable, Path(__file__).with_name("native_driver.py"), ops._C.__file__, "40"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "40 cases of each operator agree\n", done.stderr
    command = [sys.executable, "-c", "from spade_fast import ops; print(ops._C.cpu_capability)"]
    assert subprocess.check_output(command, env=environment, text=True) == f"{capability}\n"


def test_an_unknown_instruction_set_is_refused():
    environment = {**os.environ, "SPADE_FAST_CPU_CAPABILITY": "avx1024"}
    command = [sys.executable, "-c", "import spade_fast"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        "ImportError: SPADE_FAST_CPU_CAPABILITY is 'avx1024': unset it, or choose what this machine can" in done.stderr
    )


def add(sums: Tensor, input: Tensor, **geometry: Any) -> None:
    ops.add_conv2d_sums_(sums, input, ops.Geometry(**geometry))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add(torch.zeros(1, 4, 4), torch.zeros(3, 5, 1, 1)), r"\[1, 5, 5\].*got Float \[1, 4, 4\]"),
        (lambda: add(torch.zeros(1, 4, 4), torch.zeros(3, 4, 1, 1).double()), "both be float32"),
        (lambda: add(torch.zeros(1, 4, 4).half(), torch.zeros(3, 4, 1, 1).half()), "must be float32 or float64"),
        (
            lambda: add(torch.zeros(1, 4, 4).double(), torch.zeros(3, 4, 1, 1).bfloat16()),
            "bfloat16 and the sums float32",
        ),
        (
            lambda: ops.add_conv2d_sums_(
                torch.zeros(1, 4, 4).double(), torch.zeros(3, 4, 1, 1).double(), ops.Geometry(), True
            ),
            "tf32 rounds float32 inputs: with float64 sums it must be off",
        ),
        (
            lambda: add(torch.zeros(1, 4, 4).mT, torch.zeros(3, 4, 1, 1)),
            r"contiguous \[1, 4, 4\] tensor, got Float \[1, 4, 4\], not contiguous",
        ),
        (lambda: add(torch.zeros(1, 4, 4), torch.zeros(4)), r"\[images, channels, height, width\], got \[4\]"),
        (lambda: add(torch.zeros(1, 4, 4), torch.zeros(1, 3, 5, 5), groups=2), "groups = 2 must divide the 3 channels"),
        (lambda: add(torch.zeros(1), torch.zeros(1, 1, 2, 5), kernel_size=(3, 3)), "does not fit into 2 pixels"),
        (lambda: add(torch.zeros(1), torch.zeros(1, 1, 2, 5), stride=(0, 1)), "must be positive"),
        (
            lambda: ops.conv2d_sums_shape((1, 2), ops.Geometry()),
            r"size must be \[channels, height, width\], got \[1, 2\]",
        ),
        (lambda: ops.conv2d_sums_shape((1, 2, -1), ops.Geometry()), r"must lie within 0..2147483647, got \[1, 2, -1\]"),
        (lambda: ops.conv2d_sums_shape((1, 2**31, 1), ops.Geometry()), "must lie within 0..2147483647"),
        (
            lambda: ops.conv2d_sums_shape((1, 1, 8), ops.Geometry((1, 5), dilation=(1, 2**62))),
            "at most 2147483647, got",
        ),
        (
            lambda: ops.conv2d_sums_shape((1, 8, 8), ops.Geometry(stride=(2**31, 1))),
            "at most 2147483647, got 2147483648",
        ),
        (
            lambda: ops.conv2d_sums_shape((1, 8, 8), ops.Geometry((2**12 + 1, 1), padding=(2**12, 0))),
            "at most 4096 taps",
        ),
        (lambda: ops.conv2d_sums_shape((1, 8, 8), ops.Geometry((65, 64), padding=(64, 64))), "at most 4096 taps"),
        (
            lambda: ops.conv2d_sums_shape((1, 8, 8), ops.Geometry(padding=(2**30, 2**30))),
            "at most 2147483647 outputs, got 2147483656 x 2147483656",
        ),
        (
            lambda: ops.conv2d_sums_shape((1, 8, 8), ops.Geometry((1, 3), dilation=(1, 2**30))),
            "does not fit into 8 pixels",
        ),
        (
            lambda: ops.conv2d_gram(torch.zeros(1, 4, 4), (5, 1, 1), ops.Geometry()),
            r"\[1, 5, 5\].*got Float \[1, 4, 4\]",
        ),
        (lambda: ops.factor_hessian(torch.zeros(1, 2, 3), 0.1), r"\[groups, columns, columns\], got Float \[1, 2, 3\]"),
        (lambda: ops.factor_hessian(torch.eye(3)[None].half(), 0.1), r"float32 or float64 .*got Half \[1, 3, 3\]"),
        (lambda: ops.factor_hessian(torch.eye(3)[None], -0.1), "at least 0, got -0.1"),
        (
            lambda: ops.prune_columns(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2), 0.5, 1, False),
            r"factor must be a \[1, 3, 3\].*got Float \[1, 2, 2\]",
        ),
        (lambda: ops.prune_columns(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 1.5, 1, False), "0..1, got 1.5"),
        (lambda: ops.prune_columns(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 0.5, 0, False), "at least 1, got 0"),
        (lambda: ops.prune_columns(torch.zeros(2, 2), torch.zeros(1, 2, 2), 0.5, 1, False), r"got Float \[2, 2\]"),
        (
            lambda: ops.elimination_orders([torch.zeros(2, 3)], [torch.eye(3)[None]], [1]),
            r"weight .*got Float \[2, 3\]",
        ),
        (
            lambda: ops.elimination_orders([torch.zeros(1, 2, 3)], [torch.eye(3)[None].double()], [1]),
            r"inverse must be a \[1, 3, 3\].*got Double \[1, 3, 3\]",
        ),
        (
            lambda: ops.elimination_orders([torch.zeros(1, 2, 3)], [torch.eye(3)[None]], [2]),
            "divide the 3 columns, got 2",
        ),
        (
            lambda: ops.elimination_orders([torch.zeros(1, 2, 3)], [torch.eye(3)[None]], [0]),
            "divide the 3 columns, got 0",
        ),
        (lambda: ops.elimination_orders([torch.zeros(1, 2, 3)], [], [1]), "for each layer, got 1, 0 and 1"),
        (
            lambda: ops.solve_subsets(torch.eye(3), torch.ones(1, 2, 3).bool(), torch.ones(1, 2, 3)),
            r"matrix must be .*got Float \[3, 3\]",
        ),
        (
            lambda: ops.solve_subsets(torch.eye(3)[None], torch.ones(1, 2, 3), torch.ones(1, 2, 3)),
            r"subsets must be a Bool \[1, 2, 3\] tensor, got Float",
        ),
        (
            lambda: ops.solve_subsets(torch.eye(3)[None], torch.ones(1, 2, 3).bool(), torch.ones(1, 2, 4)),
            r"right_sides must be a \[1, systems, 3\].*got Float \[1, 2, 4\]",
        ),
    ],
)
def test_refusals_show_the_values(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda here, there: ops.prune_columns(here, there, 0.5, 1, False),
        lambda here, there: ops.prune_layers([here, here], [here, there], [0.5, 0.5], [1, 1], False),
        lambda here, there: ops.factor_hessians([here, there], 0.01),
        lambda here, there: ops.elimination_orders([here, here], [here, there], [1, 1]),
        lambda here, there: ops.solve_subsets(here, here > 0, there),
        lambda here, there: ops.add_conv2d_sums_(here, there[..., None], ops.Geometry()),
        lambda here, there: ops.render_views(
            there.expand(3, 4, 4), torch.zeros(1, 4).long(), here, torch.zeros(1, 4).long(), here, torch.ones(1, 3)
        ),
    ],
)
def test_a_tensor_without_values_among_others_is_refused(call):
    here = torch.eye(4)[None]
    with pytest.raises(RuntimeError, match="all tensors must be on one device, got cpu and meta"):
        call(here, here.to("meta"))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("factor_hessian", [torch.ones(3, 3), 0.01], r"must have 3 dimensions, got shapes \[3, 3\]"),
        ("prune_columns", [torch.ones(3), torch.ones(3), 0.5, 1, False], "must have 3 dimensions"),
        ("prune_columns", [torch.ones(1, 2, 3), None, 0.5, 1, False], "a tensor is missing"),
        ("prune_layers", [[torch.ones(2)], [torch.ones(2)], [0.5], [1], False], "must have 3 dimensions"),
        ("elimination_orders", [[torch.ones(1, 2, 3)], [torch.ones(1, 3, 3)], [0]], "block_size must be at least 1"),
        ("conv2d_gram", [torch.ones(1, 3, 3), [3, 5, 5], *ops.Geometry(groups=0)], "groups = 0 must divide"),
        ("conv2d_gram", [torch.ones(1, 3, 3), [3], *ops.Geometry()], "size must be"),
        ("solve_subsets", [torch.ones(1, 3, 3), None, torch.ones(1, 1, 3)], "a tensor is missing"),
    ],
)
def test_tensors_without_values_of_no_shape_are_refused(name, arguments, message):
    def on_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    arguments = [[*map(on_meta, each)] if isinstance(each, list) else on_meta(each) for each in arguments]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.spade_fast, name)(*arguments)


# Column pruning by hand


def test_identity_hessian_prunes_the_smallest_of_each_column():
    weight = torch.tensor([[[4.0, -1, 2, 0], [1, 5, -3, 1], [-2, 2, 1, -3], [3, -4, 0.5, 2]]])
    sparse, mask, loss = ops.prune_columns(weight, torch.eye(4)[None], 0.5, 1, False)
    expected = torch.tensor([[[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 1]]]).bool()
    assert torch.equal(mask, expected)
    assert torch.equal(sparse, weight * expected)
    assert loss.item() == (1 + 4 + 1 + 4 + 1 + 0.25 + 0 + 1) / 2


def test_identity_hessian_with_blocks_shares_one_threshold():
    weight = torch.tensor([[[4.0, -1, 2, 0], [1, 5, -3, 1], [-2, 2, 1, -3], [3, -4, 0.5, 2]]])
    _, mask, _ = ops.prune_columns(weight, torch.eye(4)[None], 0.25, 2, False)
    # Two of each half's eight go: -1 and 1 (row 0 column 1, row 1 column 0); 0 and 0.5.
    expected = torch.tensor([[[1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]]]).bool()
    assert torch.equal(mask, expected)


def test_ties_go_to_the_lowest_row_then_column():
    _, mask, _ = ops.prune_columns(torch.ones(1, 4, 4), torch.eye(4)[None], 0.375, 2, False)
    expected = torch.tensor([[[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]]).bool()
    assert torch.equal(mask, expected)


def test_published_count_takes_one_more_and_all_ties():
    weight = torch.tensor([[[1.0, 1], [2, 1], [3, 1], [4, 2]]])
    _, mask, _ = ops.prune_columns(weight, torch.eye(2)[None], 0.25, 1, True)
    assert mask[0].int().tolist() == [[0, 0], [0, 0], [1, 0], [1, 1]]


def test_error_of_a_pruned_weight_moves_to_the_next_column():
    # H = [[2, 1], [1, 2]]: M_22 = sqrt 2, M_21 = 1 / sqrt 2, M_11 = sqrt 1.5, so a pruned w_1 leaves w_1 / 2 in w_2.
    hessian = torch.tensor([[[2.0, 1], [1, 2]]], dtype=torch.float64)
    factor = torch.tensor([[[1.5**0.5, 0], [0.5**0.5, 2**0.5]]], dtype=torch.float64)
    assert torch.allclose(factor.mT @ factor, hessian)
    weight = torch.tensor([[[1.0, 3], [4, 1], [2, -1.25], [8, -5]]], dtype=torch.float64)
    sparse, mask, loss = ops.prune_columns(weight, factor, 0.5, 1, False)
    # Column 1: 1 and 2 go. Column 2 becomes 3.5, 1, -0.25, -5: the middle two go.
    assert mask[0].int().tolist() == [[0, 1], [1, 0], [0, 0], [1, 1]]
    torch.testing.assert_close(sparse[0], torch.tensor([[0, 3.5], [4, 0], [0, 0], [8, -5]], dtype=torch.float64))
    change = weight - sparse
    torch.testing.assert_close(loss, torch.einsum("grd,gde,gre->", change, hessian, change) / 2)


@pytest.mark.parametrize(
    ("groups", "rows", "columns", "block_size"),
    [(1, 40, 250, 1), (1, 16, 270, 9), (3, 5, 36, 9), (24, 1, 9, 9), (1, 9, 101, 7), (1, 6, 300, 150), (2, 3, 4, 64)],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("published", [False, True])
def test_prune_columns_equals_the_published_procedure(groups, rows, columns, block_size, sparsity, published):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(groups, rows, columns, dtype=torch.float64, generator=generator)
    inputs = torch.randn(groups, columns, 3 * columns, dtype=torch.float64, generator=generator)
    hessian = inputs @ inputs.mT / columns
    lower = torch.linalg.cholesky(hessian.flip(1, 2)).mT.flip(1, 2)
    upper = reference.factor(hessian)
    native = ops.prune_columns(weight, lower, sparsity, block_size, published)
    plain = reference.prune_columns(weight, upper, sparsity, block_size, published)
    assert torch.equal(native[1], plain[1])
    torch.testing.assert_close(native[0], plain[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(native[2], plain[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("values", ["many ties", "all equal", "zeros", "wide range", "overflowing"])
@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("published", [False, True])
def test_selection_among_many_float32_scores(values, sparsity, published):
    # With H = I nothing propagates, so every score is exact and the reference decides alike.
    generator = torch.Generator().manual_seed(1)
    weight = {
        "many ties": torch.randint(-3, 4, (2, 700, 6), generator=generator).float(),
        "all equal": torch.full((2, 700, 6), -1.5),
        "zeros": torch.zeros(2, 700, 6),
        "wide range": torch.randn(2, 700, 6, generator=generator) ** 9,
        "overflowing": torch.randn(2, 700, 6, generator=generator) * 3e38,
    }[values].clamp(-3.4e38, 3.4e38)
    eye = torch.eye(6).repeat(2, 1, 1)
    for block_size in (1, 3):
        native = ops.prune_columns(weight, eye, sparsity, block_size, published)
        plain = reference.prune_columns(weight.double(), eye.double(), sparsity, block_size, published)
        assert torch.equal(native[1], plain[1])
        assert torch.equal(native[0], plain[0].float())


def render_arguments(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two views of 3 x 5 pixels, of an image of 6 x 7."""
    starts = [torch.randint(0, 4, (2, size)) for size in (3, 5)]
    weights = [torch.rand(2, 3, size, dtype=dtype) / 3 for size in (3, 5)]
    image, colours = torch.rand(3, 6, 7, dtype=dtype), torch.rand(2, 3, dtype=dtype)
    return [image, starts[0], weights[0], starts[1], weights[1], colours]


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (
            0,
            lambda image: image[:2],
            "image must be a float32 or float64 tensor .3, height, width., got Float .2, 6, 7.",
        ),
        (0, lambda image: image.half(), "image must be a float32 or float64"),
        (1, lambda starts: starts + 1, "row bands must lie within the 6 pixels of the image, one of 3 begins at 4"),
        (1, lambda starts: starts.int(), "row starts must be a contiguous int64"),
        (1, lambda starts: starts[:1], "row starts must be .* got Long .1, 3."),
        (2, lambda weights: weights[:, :, :2], "row weights must be a contiguous"),
        (2, lambda weights: weights.double(), "row weights must be .* of the image's dtype"),
        (3, lambda starts: starts - 4, "column bands must lie within the 7 pixels of the image"),
        (3, lambda starts: starts.fill_(2**63 - 1), "column bands must lie within"),
        (4, lambda weights: weights[:1], "column weights must be .* got Float .1, 3, 5."),
        (5, lambda colours: colours[:, :2], "colours must be .* got Float .2, 2."),
        (5, lambda colours: colours.double(), "colours must be .* of the image's dtype"),
    ],
)
def test_views_that_would_leave_the_image_are_refused(position, change, message):
    arguments = render_arguments()
    arguments[1].fill_(3)
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=message):
        ops.render_views(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_minus_zero_are_those_of_zero(dtype):
    factor = -torch.eye(4, dtype=dtype)[None]
    _, mask, loss = ops.prune_columns(torch.zeros(1, 600, 4, dtype=dtype), factor, 0.25, 1, False)
    assert torch.equal(mask.sum(1), torch.full((1, 4), 450))
    assert not mask[:, :150].any()
    assert loss == 0


def test_no_gradient_passes_an_operator():
    weight = torch.randn(1, 3, 4, requires_grad=True)
    assert not ops.prune_columns(weight, torch.eye(4)[None], 0.5, 1, False)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    images = torch.randn(2, 4, 5, 5, dtype=dtype)
    operators = torch.ops.spade_fast
    for groups in (1, 4):
        geometry = ([3, 3], [1, 1], [1, 1], [1, 1], groups)
        sums = torch.zeros(operators.conv2d_sums_shape([4, 5, 5], *geometry), dtype=dtype)
        torch.library.opcheck(operators.add_conv2d_sums_.default, (sums, images, *geometry))
        torch.library.opcheck(operators.conv2d_gram.default, (sums, [4, 5, 5], *geometry))
    factor = torch.eye(6, dtype=dtype).repeat(2, 1, 1)
    torch.library.opcheck(operators.factor_hessian.default, (factor, 0.01))
    for published in (False, True):
        arguments = (torch.randn(2, 3, 6, dtype=dtype), factor, 0.5, 2, published)
        torch.library.opcheck(operators.prune_columns.default, arguments)
    torch.library.opcheck(operators.factor_hessians.default, ([factor, factor[:1, :2, :2]], 0.01))
    weights = [torch.randn(2, 3, 6, dtype=dtype), torch.randn(2, 1, 6, dtype=dtype)]
    torch.library.opcheck(operators.prune_layers.default, (weights, [factor, factor], [0.5, 0.2], [2, 1], False))
    torch.library.opcheck(operators.elimination_orders.default, (weights, [factor, factor], [2, 1]))
    subsets = torch.rand(2, 3, 6) < 0.5
    torch.library.opcheck(operators.solve_subsets.default, (factor, subsets, weights[0]))
    torch.library.opcheck(operators.render_views.default, render_arguments(dtype))


@pytest.mark.parametrize("columns", [[5], [3, 150, 7, 1, 40], [20] * 9, [300, 2, 2]])
def test_layers_side_by_side_are_as_one_by_one(columns):
    inputs = [torch.randn(2, d, d + 5, dtype=torch.float64) for d in columns]
    hessians = [x @ x.mT for x in inputs]
    factors, errors = ops.factor_hessians(hessians, 0.01)
    assert len(factors) == len(errors) == len(columns)
    for hessian, factor, error in zip(hessians, factors, errors, strict=True):
        alone, alone_error = ops.factor_hessian(hessian, 0.01)
        assert_close(factor, alone)
        assert error.shape == alone_error.shape
    weights = [torch.randn(2, rows + 1, d, dtype=torch.float64) for rows, d in enumerate(columns)]
    sparsities, blocks = [0.1 * (i + 1) for i in range(len(columns))], [1 + i % 3 for i in range(len(columns))]
    sparse, masks, losses = ops.prune_layers(weights, factors, sparsities, blocks, False)
    for i, (weight, factor) in enumerate(zip(weights, factors, strict=True)):
        alone = ops.prune_columns(weight, factor, sparsities[i], blocks[i], False)
        assert_close(sparse[i], alone[0])
        assert torch.equal(masks[i], alone[1])
        assert losses[i].item() == pytest.approx(alone[2].item(), rel=1e-12)


def test_lists_of_layers_that_do_not_fit_are_refused():
    factor, weight = torch.eye(4)[None], torch.randn(1, 2, 4)
    with pytest.raises(RuntimeError, match="for each layer, got 2, 1, 2 and 2"):
        ops.prune_layers([weight, weight], [factor], [0.5, 0.5], [1, 1], False)
    with pytest.raises(RuntimeError, match=r"factor must be a \[1, 4, 4\]"):
        ops.prune_layers([weight, weight], [factor, factor[:, :3]], [0.5, 0.5], [1, 1], False)
    with pytest.raises(RuntimeError, match=r"hessian must be .* got Float \[4, 4\]"):
        ops.factor_hessians([factor, factor[0]], 0.01)


@pytest.mark.parametrize("columns", [1, 2, 9, 95, 96, 97, 193, 300, 353, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_equals_torch_cholesky_from_the_end(columns, dtype):
    inputs = torch.randn(2, columns, 2 * columns + 3, dtype=dtype)
    hessian = inputs @ inputs.mT / columns
    factor, error = ops.factor_hessian(hessian, 0.01)
    damping = 0.01 * hessian.diagonal(dim1=1, dim2=2).double().mean(1)
    damped = hessian.double() + damping[:, None, None] * torch.eye(columns)
    expected = torch.linalg.cholesky(damped.flip(1, 2)).mT.flip(1, 2)
    scale = 100 * columns * torch.finfo(dtype).eps
    assert_close(factor.double(), expected, scale)
    assert not factor.triu(1).any()
    assert (error < 1).all()


@pytest.mark.parametrize("columns", [5, 150])
@pytest.mark.parametrize("flaw", ["indefinite", "nan", "infinite"])
def test_no_factor_is_told_for_each_group(columns, flaw):
    hessian = torch.eye(columns).repeat(3, 1, 1)
    hessian[1, -2, -2] = {"indefinite": -1.0, "nan": torch.nan, "infinite": torch.inf}[flaw]
    _, error = ops.factor_hessian(hessian, 0.0)
    assert error.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("columns", [5, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pivot_of_rounding_noise_is_no_pivot(columns, dtype):
    _, error = ops.factor_hessian(with_small_pivots(columns, dtype), 0.0)
    assert error.isfinite().tolist() == [True, False, True]


def with_small_pivots(columns: int, dtype: torch.dtype) -> Tensor:
    """Three matrices; the first pivot of the second is noise, that of the third is not, both just so."""
    noise = 10 * columns**0.5 * torch.finfo(dtype).eps
    hessian = torch.eye(columns, dtype=torch.float64).repeat(3, 1, 1)
    for i, pivot in ((1, 0.8 * noise), (2, 1.2 * noise)):
        hessian[i, 0, 1] = hessian[i, 1, 0] = (1 - pivot) ** 0.5
    return hessian.to(dtype)


def test_backward_error_of_a_factor_is_in_units_of_d_eps_norm():
    hessian = torch.eye(8)[None]
    hessian[0, 2, 5] = 0.5  # above the diagonal, so missing from the factor
    _, error = ops.factor_hessian(hessian, 0.0)
    assert error.item() == pytest.approx(0.5 / (8 * torch.finfo(torch.float32).eps * 1.5))


def test_operators_leave_their_inputs_alone():
    weight, factor = torch.randn(1, 4, 6), torch.eye(6)[None]
    before = weight.clone(), factor.clone()
    ops.prune_columns(weight.mT.contiguous().mT, factor, 0.5, 1, False)
    ops.prune_columns(weight, factor, 0.5, 1, False)
    assert torch.equal(weight, before[0])
    assert torch.equal(factor, before[1])


def test_resolve_backend():
    cpu = torch.device("cpu")
    assert ops.resolve_backend("auto", cpu) == ops.resolve_backend("native", cpu) == "native"
    assert ops.resolve_backend("reference", cpu) == "reference"
    with pytest.raises(ValueError, match="'fastest' is unknown: choose one of auto, native, reference"):
        ops.resolve_backend("fastest", cpu)
    with pytest.raises(ValueError, match="no kernels for 'meta'"):
        ops.resolve_backend("native", torch.device("meta"))
    with pytest.warns(UserWarning, match="no kernels for 'meta'.*much slower"):
        assert ops.resolve_backend("auto", torch.device("meta")) == "reference"


def test_missing_extension_is_never_silent(monkeypatch):
    monkeypatch.setattr(ops, "_C", None)
    with pytest.raises(ValueError, match="extension is not built"):
        ops.resolve_backend("native", torch.device("cpu"))
    with pytest.warns(UserWarning, match="extension is not built"):
        assert ops.resolve_backend("auto", torch.device("cpu")) == "reference"
