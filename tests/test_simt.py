"""The CUDA kernels, run on the CPU through csrc/simt/simt.h, against the plain PyTorch reference in float64.

`make simt` builds the module. Run under sanitizers by CMake (SPADE_FAST_SANITIZE), which names its own module in the
environment variable SPADE_FAST_SIMT_MODULE.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from geometries import images_and_geometry
from hypothesis import given, settings
from torch import Tensor

from spade_fast import augmentation, ops, reference

BUILT = sorted((Path(__file__).parents[1] / "build/simt").glob("spade_fast_simt*.so"))
MODULE = os.environ.get("SPADE_FAST_SIMT_MODULE") or (str(BUILT[0]) if BUILT else None)
pytestmark = pytest.mark.skipif(MODULE is None, reason="the emulated CUDA kernels are not built (make simt)")

#: Ascending, descending and two shuffled orders of threads and blocks.
ORDERS = [0, 1, 7, 12345]
FLOAT_BITS = {"float64": torch.float64, "float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


def load() -> ModuleType:
    assert MODULE is not None
    spec = importlib.util.spec_from_file_location("spade_fast_simt", MODULE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simt = load() if MODULE else ModuleType("spade_fast_simt")


@pytest.fixture(autouse=True)
def _ascending_order():
    yield
    if MODULE:
        simt.set_thread_order(0)


def rounded(images: Tensor, precision: str) -> Tensor:
    """What a kernel of this precision multiplies, in float64."""
    if precision == "tf32":
        bits = (images.float().view(torch.int32) + 0x1000) & ~0x1FFF
        return bits.view(torch.float32).double()
    return images.to(FLOAT_BITS[precision]).double()


def emulated_gram(images: Tensor, geometry: ops.Geometry, precision: str = "float64", batches: int = 1) -> Tensor:
    channels, height, width = images.shape[1:]
    convolution = simt.Convolution(channels, height, width, *geometry)
    assert convolution.sums_shape == ops.conv2d_sums_shape((channels, height, width), geometry)
    sums = np.zeros(convolution.sums_shape, dtype=np.float64 if precision == "float64" else np.float32)
    for batch in images.chunk(batches):
        maps = batch.permute(0, 2, 3, 1).contiguous().to(FLOAT_BITS[precision])
        array = maps.view(torch.int16) if precision == "bfloat16" else maps
        convolution.add(sums, array.numpy(), precision)
    return torch.from_numpy(convolution.gram(sums))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    scale = expected.abs().max().clamp(min=1e-300)
    assert ((actual - expected).abs().max() / scale).item() <= tolerance
    assert torch.equal(actual, actual.mT)


# kernel, stride, padding, dilation, groups; channels, height, width
GEOMETRIES = {
    "1x1": (((1, 1), (1, 1), (0, 0), (1, 1), 1), (6, 9, 8)),
    "1x1 strided": (((1, 1), (2, 2), (0, 0), (1, 1), 1), (8, 9, 8)),
    "1x1 padded": (((1, 1), (2, 1), (1, 2), (1, 1), 1), (8, 5, 5)),
    "1x1, two tiles": (((1, 1), (1, 1), (0, 0), (1, 1), 1), (132, 4, 4)),
    "patches": (((3, 3), (1, 1), (1, 1), (1, 1), 1), (3, 9, 8)),
    "stem": (((7, 7), (2, 2), (3, 3), (1, 1), 1), (3, 12, 12)),
    "shifted": (((3, 3), (1, 1), (1, 1), (1, 1), 1), (64, 6, 5)),
    "shifted, two tiles": (((3, 3), (1, 1), (1, 1), (1, 1), 1), (68, 5, 5)),
    "shifted, odd channels": (((3, 3), (1, 1), (1, 1), (1, 1), 1), (66, 5, 5)),
    "shifted, strided": (((3, 3), (2, 2), (1, 1), (1, 1), 1), (80, 7, 8)),
    "shifted, dilated": (((3, 3), (1, 1), (2, 2), (2, 2), 1), (64, 7, 7)),
    "shifted, more products than one launch holds": (((5, 5), (1, 1), (2, 2), (1, 1), 1), (64, 6, 6)),
    "shifted, grouped": (((3, 3), (1, 1), (1, 1), (1, 1), 2), (128, 4, 4)),
    "padding wider than the kernel": (((2, 2), (1, 1), (3, 3), (1, 1), 1), (64, 3, 3)),
    "oblong patches": (((5, 2), (3, 1), (2, 1), (1, 3), 1), (2, 9, 9)),
    "depthwise": (((3, 3), (1, 1), (1, 1), (1, 1), 40), (40, 7, 9)),
    "depthwise, strided": (((5, 5), (2, 2), (2, 2), (1, 1), 6), (6, 9, 9)),
    "depthwise, more sums than one launch holds": (((9, 9), (1, 1), (4, 4), (1, 1), 3), (3, 10, 11)),
}


#: Those whose channels fill vectors of 16 bytes.
BFLOAT16 = {
    *("1x1 strided", "shifted", "shifted, strided", "shifted, dilated", "shifted, grouped"),
    *("shifted, more products than one launch holds", "padding wider than the kernel"),
    *("depthwise", "depthwise, strided", "depthwise, more sums than one launch holds"),
}


def case(name: str, images: int = 3) -> tuple[Tensor, ops.Geometry]:
    geometry, shape = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, *shape, dtype=torch.float64, generator=generator), ops.Geometry(*geometry)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gram_equals_unfold_and_matmul(name):
    images, geometry = case(name)
    assert_close(emulated_gram(images, geometry, batches=2), reference.conv2d_gram(images, geometry))


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_gram_of_rounded_inputs(name, precision):
    images, geometry = case(name)
    if precision == "bfloat16" and name not in BFLOAT16:
        pytest.skip("such maps are converted to float32 and summed as tf32")
    expected = reference.conv2d_gram(rounded(images, precision), geometry)
    assert_close(emulated_gram(images, geometry, precision).double(), expected, 2e-6)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_gram_on_large_tiles(precision):
    images = torch.randn(2, 136, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    geometry = ops.Geometry((3, 3), padding=(1, 1))
    expected = reference.conv2d_gram(rounded(images, precision), geometry)
    assert_close(emulated_gram(images, geometry, precision).double(), expected, 2e-6)
    images = torch.randn(3, 128, 3, 1, generator=torch.Generator().manual_seed(1)).double()
    expected = reference.conv2d_gram(rounded(images, precision), ops.Geometry())
    assert_close(emulated_gram(images, ops.Geometry(), precision).double(), expected, 2e-6)


@pytest.mark.parametrize("channels", [1, 32])
def test_tf32_keeps_nan_and_infinity(channels):
    for bits, same in ((0x7FFFFFFF, torch.isnan), (-1, torch.isnan), (0x7F800000, torch.isinf)):
        value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        convolution, sums = (
            simt.Convolution(channels, 1, 1, *ops.Geometry()),
            np.zeros((1, channels, channels), np.float32),
        )
        convolution.add(sums, value.expand(1, 1, 1, channels).contiguous().numpy(), "tf32")
        assert same(torch.from_numpy(sums)).all()


def test_gram_in_many_chunks():
    images = torch.randn(40, 8, 15, 15, generator=torch.Generator().manual_seed(2)).double()  # 9,000 positions
    for geometry in (ops.Geometry(), ops.Geometry((3, 3), padding=(1, 1), groups=8)):
        assert_close(emulated_gram(images, geometry), reference.conv2d_gram(images, geometry))


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_strips_along_the_border_in_many_chunks(precision):
    # Each strip has 44 * 24 positions: more than are worth a chunk.
    images = torch.randn(44, 24, 26, 26, generator=torch.Generator().manual_seed(2)).double()
    geometry = ops.Geometry((3, 3), padding=(1, 1))
    assert len(ops.conv2d_sums_shape((24, 26, 26), geometry)) == 4
    expected = reference.conv2d_gram(rounded(images, precision), geometry)
    assert_close(emulated_gram(images, geometry, precision).double(), expected, 1e-5)


@settings(deadline=None, max_examples=60)
@given(images_and_geometry(longest_kernel=5, longest_stride=3, longest_dilation=2, most_images=2))
def test_gram_on_any_geometry(drawn):
    assert_close(emulated_gram(*drawn), reference.conv2d_gram(*drawn))


@pytest.mark.parametrize("name", ["1x1, two tiles", "stem", "shifted, strided", "depthwise"])
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_the_order_of_threads_changes_no_bit_of_a_gram(name, precision):
    images, geometry = case(name)
    grams = []
    for order in ORDERS:
        simt.set_thread_order(order)
        grams.append(emulated_gram(images, geometry, precision))
    assert all(torch.equal(grams[0], gram) for gram in grams[1:])


# Factors


def hessians(sizes: list[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, size + 5, dtype=torch.float64, generator=generator) for size in sizes]
    return [(x @ x.T).to(dtype) for x in inputs]


def emulated_factors(matrices: list[Tensor], damping: float = 0.01) -> tuple[list[Tensor], list[float]]:
    factors, errors = simt.factor([matrix.numpy() for matrix in matrices], damping)
    return [torch.from_numpy(factor) for factor in factors], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[1], [64], [9, 63, 64, 65, 1], [150, 200, 9, 200, 128]])
def test_factors_of_many_sizes(sizes, dtype):
    matrices = hessians(sizes, dtype)
    factors, errors = emulated_factors(matrices)
    native, native_errors = ops.factor_hessians([matrix[None] for matrix in matrices], 0.01)
    for i, matrix in enumerate(matrices):
        exact = matrix.double()
        exact = exact + 0.01 * exact.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
        tolerance = 30 * len(matrix) * torch.finfo(dtype).eps
        assert (factors[i].double().T @ factors[i].double() - exact).abs().max() <= tolerance * exact.abs().max()
        assert torch.equal(factors[i], factors[i].tril())
        assert errors[i] < 1
        if dtype == torch.float64:
            torch.testing.assert_close(factors[i], native[i][0], rtol=0, atol=1e-10 * exact.abs().max().item() ** 0.5)
            assert errors[i] == pytest.approx(native_errors[i].item(), abs=0.5)


def test_a_wrong_factor_would_be_seen():
    # The error is measured on what was factored: along the vector of ones H is 1 off in its first row.
    matrix = hessians([70], torch.float64)[0]
    matrix[0, 1] += 1  # above the diagonal, which is not factored
    _, errors = emulated_factors([matrix])
    unit = 70 * np.finfo(np.float64).eps * (matrix.abs().sum(0) + 0.01 * matrix.diagonal().mean()).max().item()
    assert errors[0] == pytest.approx(1 / unit, rel=0.01)


def test_matrices_without_a_factor_leave_the_others_alone():
    good = hessians([130], torch.float64)[0]
    late = hessians([100], torch.float64)[0]
    late[20, 20] = -1.0  # the first block to be finished is fine, the next is not
    infinite, missing = hessians([70], torch.float64)[0], hessians([70], torch.float64)[0]
    infinite[3, 3] = torch.inf
    missing[40, 2] = torch.nan
    _, errors = emulated_factors([-torch.eye(5, dtype=torch.float64), good, late, infinite, missing])
    assert [errors[i] for i in (0, 2, 3, 4)] == [np.inf] * 4
    assert errors[1] < 1


@pytest.mark.parametrize("columns", [5, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pivot_of_rounding_noise_is_no_pivot(columns, dtype):
    noise = 10 * columns**0.5 * torch.finfo(dtype).eps
    matrices = []
    for pivot in (1.0, 0.8 * noise, 1.2 * noise):
        matrix = torch.eye(columns, dtype=torch.float64)
        matrix[0, 1] = matrix[1, 0] = (1 - pivot) ** 0.5
        matrices.append(matrix.to(dtype))
    _, errors = emulated_factors(matrices, damping=0.0)
    assert np.isfinite(errors).tolist() == [True, False, True]


def test_the_order_of_threads_changes_no_bit_of_a_factor():
    matrices, found = hessians([150, 70, 9], torch.float32), []
    for order in ORDERS:
        simt.set_thread_order(order)
        found.append(emulated_factors(matrices))
    for factors, errors in found[1:]:
        assert errors == found[0][1]
        assert all(torch.equal(a, b) for a, b in zip(factors, found[0][0], strict=True))


# Pruning


def emulated_prune(
    weights: list[Tensor], factors: list[Tensor], sparsities: list[float], blocks: list[int], published: bool = False
) -> list[tuple[Tensor, Tensor, float]]:
    turned = [weight.mT.contiguous().clone().numpy() for weight in weights]
    masks, losses = simt.prune(
        turned, [factor.contiguous().numpy() for factor in factors], sparsities, blocks, published
    )
    return [
        (torch.from_numpy(weight).mT, torch.from_numpy(mask).mT, loss)
        for weight, mask, loss in zip(turned, masks, losses, strict=True)
    ]


def problem(groups: int, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, Hessian and its reversed factor."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(groups, rows, columns, dtype=torch.float64, generator=generator)
    inputs = torch.randn(groups, columns, 3 * columns, dtype=torch.float64, generator=generator)
    hessian = inputs @ inputs.mT / columns
    lower = torch.linalg.cholesky(hessian.flip(1, 2)).mT.flip(1, 2)
    # What lies above the diagonal is no business of the kernels.
    lower = lower.masked_fill(torch.ones(columns, columns).triu(1).bool(), torch.nan)
    return weight.to(dtype), hessian.to(dtype), lower.to(dtype)


SHAPES = [
    (1, 40, 150, 1),
    (1, 16, 135, 9),
    (3, 5, 36, 9),
    (24, 1, 9, 9),
    (1, 9, 101, 7),
    (1, 6, 200, 150),
    (2, 3, 4, 64),
    (2, 70, 70, 5),
    (1, 1100, 3, 1),
    (1, 520, 70, 1),  # tall layers have narrower panels
    (1, 1030, 40, 1),
    (2, 300, 70, 9),
]


@pytest.mark.parametrize(("groups", "rows", "columns", "block_size"), SHAPES)
@pytest.mark.parametrize(("sparsity", "published"), [(0.0, False), (0.3, True), (0.95, False), (1.0, False)])
def test_prune_equals_the_published_procedure(groups, rows, columns, block_size, sparsity, published):
    weight, hessian, lower = problem(groups, rows, columns)
    expected = reference.prune_columns(weight, reference.factor(hessian), sparsity, block_size, published)
    ((sparse, mask, loss),) = emulated_prune([weight], [lower], [sparsity], [block_size], published)
    assert torch.equal(mask, expected[1])
    torch.testing.assert_close(sparse, expected[0], rtol=0, atol=1e-10)
    assert loss == pytest.approx(expected[2].item(), rel=1e-10, abs=1e-10)


def test_many_layers_at_once_give_what_each_gives_alone():
    # One of them has more scores in a block than fit into shared memory.
    shapes = [*SHAPES[:5], (1, 700, 12, 12)]
    layers = [problem(*shape[:3], dtype=torch.float64) for shape in shapes]
    weights, factors = [layer[0] for layer in layers], [layer[2] for layer in layers]
    blocks, sparsities = [shape[3] for shape in shapes], [0.5, 0.9, 0.3, 0.5, 0.7, 0.8]
    together = emulated_prune(weights, factors, sparsities, blocks)
    for i in range(len(shapes)):
        (alone,) = emulated_prune([weights[i]], [factors[i]], [sparsities[i]], [blocks[i]])
        native = ops.prune_columns(weights[i], factors[i].contiguous(), sparsities[i], blocks[i], False)
        assert torch.equal(together[i][0], alone[0])
        assert torch.equal(together[i][1], alone[1])
        assert together[i][2] == alone[2]
        assert torch.equal(together[i][1], native[1])
        torch.testing.assert_close(together[i][0], native[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("values", ["many ties", "all equal", "zeros", "wide range", "overflowing"])
@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.999])
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
        ((sparse, mask, _),) = emulated_prune([weight], [eye], [sparsity], [block_size], published)
        plain = reference.prune_columns(weight.double(), eye.double(), sparsity, block_size, published)
        assert torch.equal(mask, plain[1])
        assert torch.equal(sparse, plain[0].float())


@pytest.mark.parametrize("block_size", [1, 9])
def test_float32_reaches_the_objective_of_the_cpu(block_size):
    weight, hessian, lower = problem(1, 64, 270, torch.float32)
    ((sparse, mask, _),) = emulated_prune([weight], [lower], [0.7], [block_size])
    native = ops.prune_columns(weight, lower.contiguous(), 0.7, block_size, False)

    def objective(result: Tensor) -> float:
        change = (weight - result).double()
        return float(((change @ hessian.double()) * change).sum())

    assert objective(sparse) == pytest.approx(objective(native[0]), rel=1e-3)
    assert (mask == native[1]).double().mean() > 0.99


def test_the_order_of_threads_changes_no_bit_of_a_sparse_weight():
    weight, _, lower = problem(1, 70, 90, torch.float32)
    weight[0, :, 4] = 0.5  # ties
    found = []
    for order in ORDERS:
        simt.set_thread_order(order)
        found += emulated_prune([weight], [lower], [0.6], [3])
    for sparse, mask, loss in found[1:]:
        assert torch.equal(sparse, found[0][0])
        assert torch.equal(mask, found[0][1])
        assert loss == found[0][2]


# Elimination


def emulated_orders(
    weights: list[Tensor], inverses: list[Tensor], blocks: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    orders, losses = simt.eliminate(
        [weight.contiguous().numpy() for weight in weights],
        [inverse.contiguous().numpy() for inverse in inverses],
        blocks,
    )
    return [torch.from_numpy(order) for order in orders], [torch.from_numpy(loss) for loss in losses]


def inverse_problem(groups: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weight and inverse Hessian, of which the kernels read the lower triangle alone."""
    weight, hessian, _ = problem(groups, rows, columns)
    inverse = torch.linalg.inv(hessian)
    return weight, (inverse + inverse.mT) / 2


def assert_same_orders(found: tuple[list[Tensor], list[Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    for order, loss, (wanted_order, wanted_loss) in zip(*found, expected, strict=True):
        assert order.dtype == torch.int32
        assert torch.equal(order, wanted_order)
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=1e-13, equal_nan=True)


ELIMINATIONS = [
    (1, 1, 1, 1),
    (1, 3, 5, 1),
    (2, 3, 70, 1),
    (1, 2, 300, 1),  # several folds
    (1, 2, 36, 4),
    (1, 3, 9, 9),
    (2, 2, 135, 9),  # the last tile is not full
    (1, 2, 351, 9),
    (1, 2, 100, 25),  # wider than the rows that are made at once
    (1, 1, 500, 25),  # vectors are kept for longer
    (1, 2, 147, 49),
    (1, 1, 260, 130),  # a block wider than the usual number of vectors
    (24, 1, 9, 9),
]


@pytest.mark.parametrize(("groups", "rows", "columns", "block_size"), ELIMINATIONS)
def test_elimination_equals_the_published_procedure(groups, rows, columns, block_size):
    weight, inverse = inverse_problem(groups, rows, columns)
    found = emulated_orders([weight], [inverse.tril()], [block_size])
    assert_same_orders(found, [reference.elimination_order(weight, inverse, block_size)])


def test_rows_of_many_layers_at_once_are_as_in_each_alone():
    layers = [inverse_problem(*shape[:3]) for shape in ELIMINATIONS]
    weights, inverses = [layer[0] for layer in layers], [layer[1] for layer in layers]
    blocks = [shape[3] for shape in ELIMINATIONS]
    orders, losses = emulated_orders(weights, inverses, blocks)
    for i, block_size in enumerate(blocks):
        (order,), (loss,) = emulated_orders([weights[i]], [inverses[i]], [block_size])
        assert torch.equal(orders[i], order)
        assert torch.equal(losses[i], loss)


@pytest.mark.parametrize("block_size", [1, 3, 12])
def test_blocks_that_cost_the_same_go_from_the_lowest_on(block_size):
    # With H = I nothing propagates: every score is exact.
    weight = torch.randint(-1, 2, (1, 4, 120), generator=torch.Generator().manual_seed(0)).double()
    weight[0, 0], weight[0, 1] = 0, 1
    inverse = torch.eye(120, dtype=torch.float64)[None]
    scores = weight.view(1, 4, -1, block_size).pow(2).sum(3)
    (order,), (loss,) = emulated_orders([weight], [inverse], [block_size])
    assert torch.equal(order, scores.sort(stable=True).indices.int())
    torch.testing.assert_close(loss, scores.sort(stable=True).values / 2)
    assert torch.equal(order[0, 0], torch.arange(120 // block_size).int())
    assert_same_orders(([order], [loss]), [reference.elimination_order(weight, inverse, block_size)])


@pytest.mark.parametrize("block_size", [1, 2])
def test_columns_that_are_the_same(block_size):
    # Of two equal columns the first goes, for nothing: the other one takes over its weight.
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 100, dtype=torch.float64, generator=generator).repeat_interleave(2, dim=0)
    if block_size == 2:
        inputs = inputs.view(10, 2, 2, 100).transpose(1, 2).reshape(40, 100)
    hessian = inputs @ inputs.T / 100 + 1e-3 * torch.eye(40, dtype=torch.float64)
    weight = torch.randn(1, 3, 40, dtype=torch.float64, generator=generator)
    inverse = torch.linalg.inv(hessian)[None]
    inverse = (inverse + inverse.mT) / 2
    found = emulated_orders([weight], [inverse], [block_size])
    expected = reference.elimination_order(weight, inverse, block_size)
    assert torch.equal(found[0][0], expected[0])
    torch.testing.assert_close(found[1][0], expected[1], rtol=1e-8, atol=1e-12)


def test_rows_end_where_a_pivot_is_no_pivot():
    good, inverse = inverse_problem(2, 2, 90)
    flawed = inverse.clone()
    flawed[1, 40, 40] = -0.1  # of the second group alone
    orders, losses = emulated_orders([good, good], [flawed, inverse], [1, 9])
    expected = [reference.elimination_order(good, flawed, 1), reference.elimination_order(good, inverse, 9)]
    assert_same_orders((orders, losses), expected)
    assert (orders[0][0] >= 0).all()
    assert (orders[0][1] == -1).all()
    assert losses[0][1].isnan().all()
    assert losses[1].isfinite().all()


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_pivot_of_rounding_noise_ends_a_row(block_size, unit):
    # Once the first block has gone, and the last has taken its place, there is little left of that.
    noise = 10 * 9**0.5 * torch.finfo(torch.float64).eps
    found = []
    for pivot in (0.5 * noise, 3 * noise):
        inverse = torch.eye(9, dtype=torch.float64)
        inverse[0, 0] = unit
        last = 9 - block_size
        inverse[0, last] = inverse[last, 0] = ((1 - pivot) * unit) ** 0.5
        weight = torch.full((1, 1, 9), 10.0, dtype=torch.float64)
        weight[..., :block_size] = 0
        weight[..., last:] = 0
        weight[..., last] = 1e-5
        (order,), (loss,) = emulated_orders([weight], [inverse[None]], [block_size])
        assert order[0, 0, 0] == 0
        assert torch.equal(order < 0, loss.isnan())
        assert torch.equal(order, reference.elimination_order(weight, inverse[None], block_size)[0])
        found.append((order >= 0).all().item())
    assert found == [False, True]


@pytest.mark.parametrize("block_size", [1, 5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_go_last_and_are_told(block_size, value):
    weight, inverse = inverse_problem(1, 3, 40)
    weight[0, 1, 17] = value
    (order,), (loss,) = emulated_orders([weight], [inverse], [block_size])
    assert_same_orders(([order], [loss]), [reference.elimination_order(weight, inverse, block_size)])
    assert (order[0, 1] == -1).sum() == 1
    assert order[0, 1, -1] == -1
    assert (order[0, ::2] >= 0).all()
    weight[0, 1] = value
    (order,), (loss,) = emulated_orders([weight], [inverse], [block_size])
    assert (order[0, 1] == -1).all()
    assert loss[0, 1].isnan().all()


@pytest.mark.parametrize(("rows", "columns", "block_size"), [(3, 200, 1), (2, 270, 9)])
def test_float32_orders_cost_what_the_exact_ones_do(rows, columns, block_size):
    weight, inverse = inverse_problem(1, rows, columns)
    _, (loss,) = emulated_orders([weight.float()], [inverse.float()], [block_size])
    _, expected = reference.elimination_order(weight, inverse, block_size)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double().sum(2), expected.sum(2), rtol=1e-3, atol=0)


def test_the_order_of_threads_changes_no_bit_of_a_loss():
    shapes, found = [(1, 3, 130, 1), (1, 3, 90, 9), (1, 2, 50, 25)], []
    layers = [inverse_problem(*shape[:3]) for shape in shapes]
    for order in ORDERS:
        simt.set_thread_order(order)
        orders, losses = emulated_orders(
            [layer[0].float() for layer in layers], [layer[1].float() for layer in layers], [1, 9, 25]
        )
        found.append([*orders, *losses])
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


# Views


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_views_equal_the_matrix_products(dtype):
    image = torch.rand(3, 19, 23, dtype=dtype, generator=torch.Generator().manual_seed(0))
    views = augmentation.Augmentation(size=(7, 11)).sample((19, 23), 5, torch.Generator().manual_seed(0))
    none = torch.zeros_like(views.flip)
    rows = augmentation._resize_bands(views.top, views.height, none, 7, 19, image)
    columns = augmentation._resize_bands(views.left, views.width, views.flip, 11, 23, image)
    colours = torch.stack([views.brightness_factor, views.hue_shift, torch.ones(5)], 1).to(dtype)
    expected = augmentation._render(image, rows, columns, colours)
    rendered = simt.render(*(tensor.contiguous().numpy() for tensor in (image, *rows, *columns, colours)))
    torch.testing.assert_close(
        torch.from_numpy(rendered), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
    )


def test_bands_outside_the_image_are_moved_inside():
    image, weights = np.random.default_rng(0).random((3, 4, 5)), np.full((1, 2, 3), 0.5)
    colours = np.array([[1.0, 0.0, 1.0]])
    wild = simt.render(image, np.array([[-7, 1, 99]]), weights, np.array([[-1, 2, 1 << 60]]), weights, colours)
    tame = simt.render(image, np.array([[0, 1, 2]]), weights, np.array([[0, 2, 3]]), weights, colours)
    assert np.array_equal(wild, tame)
