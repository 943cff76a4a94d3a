"""Native operators against the plain PyTorch reference, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


def conv_grams(images: Tensor, geometry: tuple) -> tuple[Tensor, Tensor]:
    """The native and the reference Gram matrix of a batch."""
    kernel, *rest, groups = geometry
    d = images.shape[1] // groups * kernel[0] * kernel[1]
    native, plain = (torch.zeros(groups, d, d, dtype=images.dtype) for _ in range(2))
    ops.conv2d_gram_(native, images, kernel, *rest, groups)
    reference.conv2d_gram_(plain, images, kernel, *rest, groups)
    return native, plain


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    scale = expected.abs().max().clamp(min=1e-300)
    assert ((actual - expected).abs().max() / scale).item() <= tolerance


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv_gram_equals_unfold_and_matmul(name, layout):
    *geometry, channels = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, channels, 9, 8, dtype=torch.float64, generator=generator)
    if layout == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        images = torch.stack([images, images], dim=-1).flatten(3)[..., ::2]
        assert not images.is_contiguous()
    native, plain = conv_grams(images, tuple(geometry))
    assert_close(native, plain)
    assert torch.equal(native, native.mT)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_conv_gram_on_any_geometry(data):
    draw = data.draw
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    kernel, stride, padding, dilation = pair(1, 5), pair(1, 4), pair(0, 3), pair(1, 3)
    groups = draw(st.integers(1, 3))
    sides = [draw(st.integers(max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]), 14)) for i in range(2)]
    channels = groups * draw(st.integers(1, 3))
    images = torch.randn(draw(st.integers(1, 3)), channels, *sides, dtype=torch.float64)
    assert_close(*conv_grams(images, (kernel, stride, padding, dilation, groups)))


def test_conv_gram_over_many_chunks_of_patches():
    # 64 channels * 9 taps * 8 bytes * 9,800 positions = 45 MB of patches, more than one buffer holds.
    images = torch.randn(2, 64, 70, 70, dtype=torch.float64)
    native, plain = conv_grams(images, ((3, 3), (1, 1), (1, 1), (1, 1), 1))
    assert_close(native, plain)


def test_conv_gram_wider_than_one_panel():
    images = torch.randn(2, 130, 5, 5, dtype=torch.float64)  # 1,170 columns
    native, plain = conv_grams(images, ((3, 3), (1, 1), (1, 1), (1, 1), 1))
    assert_close(native, plain)
    assert torch.equal(native, native.mT)


@pytest.mark.parametrize("columns", [1, 7, 513, 1100])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_gram_adds_to_what_is_there(columns, transposed):
    rows = torch.randn(columns, 40, dtype=torch.float64).T if transposed else torch.randn(40, columns).double()
    gram = torch.zeros(1, columns, columns, dtype=torch.float64)
    ops.linear_gram_(gram, rows[:15])
    ops.linear_gram_(gram, rows[15:])
    assert_close(gram[0], rows.T @ rows)
    assert torch.equal(gram, gram.mT)


def test_float32_gram_is_as_accurate_as_plain_float32():
    images = torch.randn(4, 32, 20, 20)
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    exact, _ = conv_grams(images.double(), geometry)
    native, plain = conv_grams(images, geometry)
    assert (native - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6


def test_gram_of_nothing_is_nothing():
    gram = torch.ones(1, 4, 4)
    ops.linear_gram_(gram, torch.zeros(0, 4))
    ops.conv2d_gram_(gram, torch.zeros(0, 4, 5, 5), (1, 1), (1, 1), (0, 0), (1, 1), 1)
    assert torch.equal(gram, torch.ones(1, 4, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.linear_gram_(torch.zeros(1, 4, 4), torch.zeros(3, 5)), r"\[1, 5, 5\].*got \[1, 4, 4\]"),
        (lambda: ops.linear_gram_(torch.zeros(1, 4, 4), torch.zeros(3, 4).double()), "both be float32"),
        (lambda: ops.linear_gram_(torch.zeros(1, 4, 4).half(), torch.zeros(3, 4).half()), "both be float32"),
        (lambda: ops.linear_gram_(torch.zeros(1, 4, 4), torch.zeros(4)), r"\[samples, columns\], got \[4\]"),
        (
            lambda: ops.conv2d_gram_(torch.zeros(1, 4, 4), torch.zeros(1, 3, 5, 5), (1, 1), (1, 1), (0, 0), (1, 1), 2),
            "groups = 2 must divide the 3 channels",
        ),
        (
            lambda: ops.conv2d_gram_(torch.zeros(1, 9, 9), torch.zeros(1, 1, 2, 5), (3, 3), (1, 1), (0, 0), (1, 1), 1),
            "does not fit into 2 pixels",
        ),
        (
            lambda: ops.conv2d_gram_(torch.zeros(1, 1, 1), torch.zeros(1, 1, 2, 5), (1, 1), (0, 1), (0, 0), (1, 1), 1),
            "must be positive",
        ),
        (
            lambda: ops.prune_columns(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2), 0.5, 1, False),
            r"factor must be a \[1, 3, 3\].*got \[1, 2, 2\]",
        ),
        (lambda: ops.prune_columns(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 1.5, 1, False), "0..1, got 1.5"),
        (lambda: ops.prune_columns(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 0.5, 0, False), "at least 1, got 0"),
        (lambda: ops.prune_columns(torch.zeros(2, 2), torch.zeros(1, 2, 2), 0.5, 1, False), r"got \[2, 2\]"),
    ],
)
def test_refusals_show_the_values(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    images = torch.randn(2, 4, 5, 5, dtype=dtype)
    operators = torch.ops.spade_fast
    torch.library.opcheck(operators.linear_gram_.default, (torch.zeros(1, 4, 4, dtype=dtype), images[0, :, 0, :4]))
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 2)
    torch.library.opcheck(operators.conv2d_gram_.default, (torch.zeros(2, 18, 18, dtype=dtype), images, *geometry))
    factor = torch.eye(6, dtype=dtype).repeat(2, 1, 1)
    for published in (False, True):
        arguments = (torch.randn(2, 3, 6, dtype=dtype), factor, 0.5, 2, published)
        torch.library.opcheck(operators.prune_columns.default, arguments)


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
