"""CUDA operators and traces against those of the CPU, which other modules hold against the float64 reference.

Needs a CUDA device and an extension that was built for it. `SPADE_FAST_TEST_DEVICE=cpu` puts the CPU in its place, so
that all tests but those that call CUDA itself run anywhere: a slip in a comparison then shows without a GPU.

`test_small_cases` runs every kernel on a few numbers: benchmarks/gpu_check.sh runs it under compute-sanitizer.
"""

from __future__ import annotations

import gc
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from subjects import photographs, quarters
from torch import Tensor, nn

import spade_fast as sf
from spade_fast import ops, reference
from spade_fast.solver import Problem, Target, lower_factors, solve_layers

DEVICE = torch.device(os.environ.get("SPADE_FAST_TEST_DEVICE", "cuda"))
CPU = torch.device("cpu")


def obstacle() -> str | None:
    """Why nothing here can run, None where it can."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return None if DEVICE.type in ops.native_devices() else f"the extension is not built for {DEVICE.type}"


pytestmark = pytest.mark.skipif(obstacle() is not None, reason=obstacle() or "")
calls_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="calls CUDA itself")

Geometry = ops.Geometry


@pytest.fixture(autouse=True)
def cuda_still_works() -> Iterator[None]:
    """After an illegal access no call of CUDA succeeds in this process: it ends, and pytest-xdist starts another."""
    yield
    if DEVICE.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            pytest.exit(f"CUDA is broken: {error}", returncode=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest expected magnitude; actual may be anywhere, in any float dtype."""
    assert actual.shape == expected.shape
    difference = (actual.cpu().double() - expected.double()).abs()
    assert difference.max().item() <= tolerance * max(expected.abs().max().item(), 1e-300)


def test_differences_are_seen():
    expected = torch.tensor([1.0, -100.0], dtype=torch.float64)
    assert_close(expected + 1e-11, expected, 1e-12)
    for wrong in (expected + 1e-9, expected * torch.nan, expected[:1]):
        with pytest.raises(AssertionError):
            assert_close(wrong, expected, 1e-12)


# Gram sums


class Maps(NamedTuple):
    """Inputs of one convolution."""

    geometry: Geometry
    channels: int
    images: int = 3
    size: tuple[int, int] = (9, 8)


SAME = Geometry((3, 3), padding=(1, 1))
STRIDED = Geometry((3, 3), (2, 2), (1, 1))
#: Every form of sums; channels that fill vectors of 16 bytes or not, and tiles of 64 or 128 or not.
MAPS = {
    "1x1, 3 channels": Maps(Geometry(), 3),
    "1x1, 16 channels": Maps(Geometry(), 16),
    "1x1, 64 channels, many positions": Maps(Geometry(), 64, 20, (17, 16)),
    "1x1, 66 channels": Maps(Geometry(), 66),
    "1x1, 128 channels, many positions": Maps(Geometry(), 128, 10, (17, 16)),
    "1x1, 130 channels": Maps(Geometry(), 130),
    "1x1, 136 channels": Maps(Geometry(), 136),
    "1x1, strided": Maps(Geometry(stride=(2, 2)), 64),
    "1x1, padded": Maps(Geometry(padding=(1, 2)), 16),
    "1x1, grouped": Maps(Geometry(groups=4), 64),
    "patches": Maps(SAME, 3),
    "patches, many positions": Maps(SAME, 3, 20, (17, 16)),
    "patches, strided": Maps(Geometry((7, 7), (2, 2), (3, 3)), 3, 2, (17, 16)),
    "patches, grouped": Maps(Geometry((3, 3), padding=(1, 1), groups=2), 6),
    "shifted, 16 channels": Maps(SAME, 16),
    "shifted, 64 channels, many positions": Maps(SAME, 64, 20, (17, 16)),
    "shifted, 66 channels": Maps(SAME, 66),
    "shifted, 128 channels": Maps(SAME, 128, 2),
    "shifted, 130 channels": Maps(SAME, 130, 2),
    "shifted, 136 channels": Maps(SAME, 136, 2),
    "shifted, 24 channels, strips of many positions": Maps(SAME, 24, 44, (26, 26)),
    "shifted, unpadded": Maps(Geometry((3, 3)), 32),
    "shifted, strided": Maps(STRIDED, 64, 20, (17, 16)),
    "shifted, strided, 66 channels": Maps(STRIDED, 66),
    "shifted, dilated": Maps(Geometry((3, 3), padding=(2, 2), dilation=(2, 2)), 32),
    "shifted, oblong": Maps(Geometry((5, 2), (3, 1), (2, 1), (1, 3)), 32),
    "shifted, 5x5": Maps(Geometry((5, 5), padding=(2, 2)), 16),
    "shifted, grouped": Maps(Geometry((3, 3), padding=(1, 1), groups=4), 64),
    "shifted, grouped, 18 channels each": Maps(Geometry((3, 3), padding=(1, 1), groups=2), 36),
    "padding wider than the kernel": Maps(Geometry((2, 2), padding=(3, 3)), 32),
    "kernel larger than the maps": Maps(Geometry((3, 3), padding=(1, 1)), 32, 3, (1, 2)),
    "depthwise 3x3": Maps(Geometry((3, 3), padding=(1, 1), groups=40), 40),
    "depthwise 3x3, strided, many rows": Maps(Geometry((3, 3), (2, 2), (1, 1), groups=33), 33, 40, (17, 16)),
    "depthwise 5x5": Maps(Geometry((5, 5), padding=(2, 2), groups=40), 40),
    "depthwise 5x5, strided": Maps(Geometry((5, 5), (2, 2), (2, 2), groups=40), 40),
}
#: dtype of the inputs, and whether they are rounded to TF32.
PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
}
LAYOUTS = ["contiguous", "channels_last", "misaligned", "channels of more", "every second column"]


def random_maps(maps: Maps, integers: bool = False) -> Tensor:
    """[images, channels, height, width], float64 on the CPU."""
    shape, generator = (maps.images, maps.channels, *maps.size), seeded(maps.channels)
    if integers:
        return torch.randint(-4, 5, shape, generator=generator).double()
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def laid_out(images: Tensor, layout: str) -> Tensor:
    """The same values, otherwise in memory."""
    if layout == "channels_last":
        return images.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = images.shape
    if layout == "misaligned":  # channels last, from the second number of an allocation on
        memory = images.new_empty(images.numel() + 1)[1:]
        return memory.view(n, height, width, channels).permute(0, 3, 1, 2).copy_(images)
    if layout == "channels of more":  # channels last, in the middle of wider maps
        more = torch.cat([images[:, :1] + 1, images, images[:, :2] + 1], dim=1)
        return more.contiguous(memory_format=torch.channels_last)[:, 1:-2]
    if layout == "every second column":
        return torch.stack([images, images + 1], dim=-1).flatten(3)[..., ::2]
    return images.contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_values(layout):
    images = random_maps(Maps(SAME, 5))
    found = laid_out(images, layout)
    assert torch.equal(found, images)
    assert found.is_contiguous() == (layout == "contiguous")


def gram_of(images: Tensor, geometry: Geometry, tf32: bool = False, batches: int = 1) -> Tensor:
    """The Gram matrix by the native operators, where the images are."""
    size = (images.shape[1], images.shape[2], images.shape[3])
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    sums = torch.zeros(ops.conv2d_sums_shape(size, geometry), dtype=dtype, device=images.device)
    for batch in images.chunk(batches):
        ops.add_conv2d_sums_(sums, batch, geometry, tf32)
    return ops.conv2d_gram(sums, size, geometry)


@cache
def gram_of_integers(name: str) -> Tensor:
    return reference.conv2d_gram(random_maps(MAPS[name], integers=True), MAPS[name].geometry)


def test_each_form_of_sums_is_there():
    shapes = {name: ops.conv2d_sums_shape((maps.channels, *maps.size), maps.geometry) for name, maps in MAPS.items()}
    for name, shape in shapes.items():
        form = name.split(",")[0].split()[0]
        if form in ("1x1", "patches", "shifted", "depthwise"):
            assert len(shape) == {"1x1": 3, "patches": 3, "shifted": 4, "depthwise": 2}[form], name
    assert max(shape[1] for shape in shapes.values() if len(shape) == 4) > 100  # more than one launch holds


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAPS)
def test_gram_of_small_integers_is_exact(name, layout, precision):
    # Every precision holds such products and sums, in any order: one that is missing or taken twice shows.
    (dtype, tf32), maps = PRECISIONS[precision], MAPS[name]
    images = laid_out(random_maps(maps, integers=True).to(DEVICE, dtype), layout)
    found = gram_of(images, maps.geometry, tf32, batches=2)
    assert found.device == images.device
    assert torch.equal(found.cpu().double(), gram_of_integers(name))
    assert torch.equal(found, found.mT)


def rounded(images: Tensor, precision: str) -> Tensor:
    """float64 values as this precision holds them."""
    if precision != "tf32":
        return images.to(PRECISIONS[precision][0]).double()
    mantissa, exponent = images.float().double().frexp()
    return torch.ldexp((mantissa.abs() * 2**11 + 0.5).floor() * mantissa.sign(), exponent - 11)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MAPS)
def test_gram_of_what_the_precision_holds(name, precision):
    (dtype, tf32), maps = PRECISIONS[precision], MAPS[name]
    images = random_maps(maps)
    expected = reference.conv2d_gram(rounded(images, precision), maps.geometry)
    found = gram_of(images.to(DEVICE, dtype), maps.geometry, tf32)
    assert_close(found, expected, 1e-12 if dtype == torch.float64 else 2e-5)
    assert torch.equal(found, found.mT)
    # So does the CPU, and so does the reference on this device.
    assert_close(gram_of(images.to(dtype), maps.geometry, tf32), expected, 1e-12 if dtype == torch.float64 else 2e-5)
    if precision == "float64":
        assert_close(reference.conv2d_gram(images.to(DEVICE), maps.geometry), expected, 1e-12)


@pytest.mark.parametrize(
    ("channels", "geometry", "side"),
    [(2, Geometry(), 1), (64, Geometry(), 1), (64, Geometry((3, 3), groups=64), 3)],
    ids=["single numbers", "vectors", "depthwise"],
)
def test_tf32_rounds_ties_away_from_zero(channels, geometry, side):
    bit = 2.0**-10
    for value, expected in [(1 + bit / 2, 1 + bit), (-1 - bit / 2, -1 - bit), (1 + bit / 2 - 2.0**-20, 1.0)]:
        found = gram_of(torch.full((1, channels, side, side), value, device=DEVICE), geometry, tf32=True)
        assert torch.equal(found, torch.full_like(found, expected**2))


@pytest.mark.parametrize("kernel", [7, 9, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_depthwise_kernels(kernel, dtype):
    geometry = Geometry((kernel, kernel), padding=(kernel // 2,) * 2, groups=33)
    images = torch.randint(-4, 5, (2, 33, 13, 12), generator=seeded()).to(dtype)
    expected = reference.conv2d_gram(images, geometry)
    assert torch.equal(gram_of(images.to(DEVICE), geometry).cpu(), expected)


@pytest.mark.parametrize("columns", [1, 7, 513, 1100])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_inputs_are_a_1x1_convolution(columns, transposed, dtype):
    rows = torch.randint(-4, 5, (1100, columns), generator=seeded()).to(DEVICE, dtype)
    rows = rows.T.contiguous().T if transposed else rows
    assert torch.equal(gram_of(rows[:, :, None, None], Geometry(), batches=3)[0], rows.T @ rows)


@pytest.mark.parametrize("name", ["1x1, 64 channels, many positions", "patches", "shifted, strided", "depthwise 3x3"])
def test_nothing_adds_nothing(name):
    maps = MAPS[name]
    shape = ops.conv2d_sums_shape((maps.channels, *maps.size), maps.geometry)
    sums = torch.ones(shape, device=DEVICE)
    ops.add_conv2d_sums_(sums, torch.zeros(0, maps.channels, *maps.size, device=DEVICE), maps.geometry)
    assert torch.equal(sums, torch.ones_like(sums))


# Factors

SIZES = (1, 9, 63, 64, 65, 130, 300)


def hessian_of(columns: int, groups: int = 1, seed: int = 0) -> Tensor:
    """[groups, columns, columns], float64 on the CPU."""
    inputs = torch.randn(groups, columns, 2 * columns + 3, generator=seeded(columns + seed), dtype=torch.float64)
    return inputs @ inputs.mT / columns


def factor_of(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """M by torch, on the CPU."""
    mean = damping * hessian.diagonal(dim1=1, dim2=2).mean(1)
    damped = hessian + mean[:, None, None] * torch.eye(hessian.shape[1], dtype=hessian.dtype)
    return torch.linalg.cholesky(damped.flip(1, 2)).mT.flip(1, 2)


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_equals_torch_cholesky_from_the_end(columns, dtype):
    hessian = hessian_of(columns, groups=2)
    factor, error = ops.factor_hessian(hessian.to(DEVICE, dtype), 0.01)
    assert_close(factor, factor_of(hessian), 100 * columns * torch.finfo(dtype).eps)
    assert not factor.triu(1).any()
    assert error.dtype == torch.float64
    assert (error < 1).all()


def test_factors_of_many_layers_of_both_dtypes():
    dtypes = [torch.float32, torch.float64]
    sizes = [(columns, groups) for columns in SIZES for groups in (1, 3)] * 3
    hessians = [hessian_of(*size, seed=i).to(dtypes[i % 3 == 0]) for i, size in enumerate(sizes)]
    before = [hessian.clone() for hessian in hessians]
    here = [hessian.to(DEVICE) for hessian in hessians]
    factors, errors = ops.factor_hessians(here, 0.01)
    assert len(factors) == len(errors) == len(hessians)
    for hessian, factor, error in zip(hessians, factors, errors, strict=True):
        assert factor.dtype == hessian.dtype
        assert_close(factor, factor_of(hessian.double()), 100 * hessian.shape[1] * torch.finfo(hessian.dtype).eps)
        assert (error < 1).all()
    assert all(torch.equal(after.cpu(), hessian) for after, hessian in zip(here, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_factor_is_told_for_each_group(dtype):
    good = {columns: hessian_of(columns, groups=3).to(dtype) for columns in (5, 64, 150)}
    hessians = list(good.values())
    for columns, hessian in good.items():
        for row, flaw in [(0, -1.0), (columns - 2, -1.0), (columns // 2, 0.0), (1, math.nan), (2, math.inf)]:
            bad = hessian.clone()
            bad[1, row] = bad[1, :, row] = 0
            bad[1, row, row] = flaw
            hessians.append(bad)
    factors, errors = ops.factor_hessians([hessian.to(DEVICE) for hessian in hessians], 0.0)
    for hessian, factor, error in zip(hessians, factors, errors, strict=True):
        expected = [True, hessian is good[hessian.shape[1]], True]
        assert error.isfinite().tolist() == expected
        assert ops.factor_hessian(hessian, 0.0)[1].isfinite().tolist() == expected
        for group in (0, 2):
            exact = factor_of(hessian[group : group + 1].double(), 0.0)
            assert_close(factor[group : group + 1], exact, 1e4 * hessian.shape[1] * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pivot_of_rounding_noise_is_no_pivot(dtype):
    noise = 10 * 150**0.5 * torch.finfo(dtype).eps
    hessian = torch.eye(150, dtype=torch.float64).repeat(3, 1, 1)
    for i, pivot in ((1, 0.8 * noise), (2, 1.2 * noise)):
        hessian[i, 0, 1] = hessian[i, 1, 0] = (1 - pivot) ** 0.5
    _, error = ops.factor_hessian(hessian.to(DEVICE, dtype), 0.0)
    assert error.isfinite().tolist() == [True, False, True]


def test_backward_error_of_a_factor_is_in_units_of_d_eps_norm():
    hessian = torch.eye(8, device=DEVICE)[None]
    hessian[0, 2, 5] = 0.5  # above the diagonal, so missing from the factor
    _, error = ops.factor_hessian(hessian, 0.0)
    assert error.item() == pytest.approx(0.5 / (8 * torch.finfo(torch.float32).eps * 1.5))


# Pruning

#: Groups, rows, columns, columns that share a threshold; the last ones' scores exceed a block's shared memory.
PROBLEMS = [
    (1, 40, 250, 1),
    (1, 16, 270, 9),
    (3, 5, 36, 9),
    (24, 1, 9, 9),
    (1, 33, 200, 25),
    (2, 20, 192, 64),
    (1, 6, 300, 150),
    (2, 3, 4, 64),
    (1, 1, 1, 1),
    (1, 700, 130, 1),
    (2, 5000, 66, 1),
    (1, 2000, 72, 9),
]


def exact_problem(groups: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weight and factor of small integers, float64: one entry a row propagates, so every number stays small."""
    generator = seeded(columns + rows)
    weight = torch.randint(-8, 9, (groups, rows, columns), generator=generator).double()
    factor = torch.eye(columns, dtype=torch.float64).repeat(groups, 1, 1)
    for column in range(1, columns):
        earlier = torch.randint(0, column, (groups,), generator=generator)
        sign = torch.randint(0, 2, (groups,), generator=generator) * 2 - 1
        factor[torch.arange(groups), column, earlier] = sign.double()
    return weight, factor


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pruning_of_small_integers_is_exact(problem, sparsity, published, dtype):
    *shape, block_size = problem
    weight, factor = (tensor.to(dtype) for tensor in exact_problem(*shape))
    expected = ops.prune_columns(weight, factor, sparsity, block_size, published)
    found = ops.prune_columns(weight.to(DEVICE), factor.to(DEVICE), sparsity, block_size, published)
    for mine, wanted in zip(found, expected, strict=True):
        assert mine.dtype == wanted.dtype
        assert torch.equal(mine.cpu(), wanted)
    if sparsity == 0 and not published:
        assert torch.equal(found[0].cpu(), weight)


def test_small_integers_are_propagated():
    weight, factor = exact_problem(1, 40, 250)
    sparse, mask, _ = ops.prune_columns(weight, factor, 0.3, 1, False)
    assert (sparse != weight * mask).any()
    assert sparse.abs().max() < 1000


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("published", [False, True])
def test_float64_pruning_equals_the_cpu(problem, sparsity, published):
    groups, rows, columns, block_size = problem
    weight = torch.randn(groups, rows, columns, dtype=torch.float64, generator=seeded(columns))
    factor = factor_of(hessian_of(columns, groups))
    expected = ops.prune_columns(weight, factor, sparsity, block_size, published)
    # What lies above the diagonal is ignored.
    factor = factor.masked_fill(torch.ones(columns, columns).triu(1).bool(), torch.nan)
    found = ops.prune_columns(weight.to(DEVICE), factor.to(DEVICE), sparsity, block_size, published)
    assert torch.equal(found[1].cpu(), expected[1])
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(found[2].cpu(), expected[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("values", ["many ties", "all equal", "zeros", "wide range", "overflowing"])
@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_among_many_scores(values, sparsity, published, dtype):
    # With H = I nothing propagates, so every score is exact.
    shape, generator, largest = (2, 700, 6), seeded(1), torch.finfo(dtype).max
    weight = {
        "many ties": torch.randint(-3, 4, shape, generator=generator).to(dtype),
        "all equal": torch.full(shape, -1.5, dtype=dtype),
        "zeros": torch.zeros(shape, dtype=dtype),
        "wide range": torch.randn(shape, generator=generator, dtype=dtype) ** 9,
        "overflowing": (torch.randn(shape, generator=generator, dtype=dtype) * largest).clamp(-largest, largest),
    }[values]
    eye = torch.eye(6, dtype=dtype).repeat(2, 1, 1)
    for block_size in (1, 3):
        expected = ops.prune_columns(weight, eye, sparsity, block_size, published)
        found = ops.prune_columns(weight.to(DEVICE), eye.to(DEVICE), sparsity, block_size, published)
        assert torch.equal(found[1].cpu(), expected[1])
        assert torch.equal(found[0].cpu(), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_minus_zero_are_those_of_zero(dtype):
    factor = -torch.eye(4, dtype=dtype, device=DEVICE)[None]
    weight = torch.zeros(1, 600, 4, dtype=dtype, device=DEVICE)
    _, mask, loss = ops.prune_columns(weight, factor, 0.25, 1, False)
    assert not mask[:, :150].any()
    assert mask[:, 150:].all()
    assert loss == 0


def test_layers_side_by_side_are_as_one_by_one():
    weights, factors, sparsities, blocks = [], [], [], []
    for i, (groups, rows, columns, block_size) in enumerate(PROBLEMS * 2):
        dtype = (torch.float32, torch.float64)[i % 3 == 0]
        weight, factor = exact_problem(groups, rows, columns)
        weights.append(weight.to(DEVICE, dtype))
        factors.append(factor.to(DEVICE, dtype))
        sparsities.append((0.1 * i) % 1)
        blocks.append(block_size)
    before = [weight.clone() for weight in weights]
    sparse, masks, losses = ops.prune_layers(weights, factors, sparsities, blocks, False)
    for i in range(len(weights)):
        alone = ops.prune_columns(weights[i], factors[i], sparsities[i], blocks[i], False)
        assert torch.equal(sparse[i], alone[0])
        assert torch.equal(masks[i], alone[1])
        assert losses[i] == alone[2]
        assert torch.equal(weights[i], before[i])


def objective(weight: Tensor, sparse: Tensor, hessian: Tensor) -> float:
    change = (weight - sparse.cpu()).double()
    return torch.einsum("grd,gde,gre->", change, hessian, change).item()


@pytest.mark.parametrize(
    ("rows", "columns", "block_size"), [(64, 576, 9), (256, 64, 1), (128, 512, 1)], ids=["3x3", "wide", "narrow"]
)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_float32_pruning_reaches_the_objective_of_the_cpu(rows, columns, block_size, sparsity, record_property):
    hessian, weight = hessian_of(columns), torch.randn(1, rows, columns, generator=seeded())
    factor = factor_of(hessian, 0.0).float()
    expected = ops.prune_columns(weight, factor, sparsity, block_size, False)
    found = ops.prune_columns(weight.to(DEVICE), factor.to(DEVICE), sparsity, block_size, False)
    wanted, reached = (objective(weight, solution[0], hessian) for solution in (expected, found))
    assert reached == pytest.approx(wanted, rel=1e-3)
    assert found[2].item() == pytest.approx(reached / 2, rel=1e-3)
    mine, theirs = found[1].cpu(), expected[1]
    record_property("mask overlap", ((mine & theirs).sum() / (mine | theirs).sum()).item())


def test_solving_many_layers_of_which_one_has_a_dead_input():
    problems = []
    for i, (groups, rows, columns, block_size) in enumerate(PROBLEMS[:8]):
        weight = torch.randn(groups * rows, columns, generator=seeded(i), dtype=torch.float64)
        hessian = hessian_of(columns, groups)
        if i == 1:
            hessian[:, 3] = hessian[:, :, 3] = 0
        problems.append(Problem(weight, hessian, (Target(0.1 * i, block_size),), str(i)))
    here = [replace(each, weight=each.weight.to(DEVICE), hessian=each.hessian.to(DEVICE)) for each in problems]
    expected = solve_layers(problems, backend="native")
    for backend in ("native", "reference"):
        for (found,), (wanted,) in zip(solve_layers(here, backend=backend), expected, strict=True):
            assert found.weight.device.type == DEVICE.type
            assert torch.equal(found.mask.cpu(), wanted.mask)
            torch.testing.assert_close(found.weight.cpu(), wanted.weight, rtol=0, atol=1e-10)
            assert found.loss == pytest.approx(wanted.loss, rel=1e-9)
            assert (found.damping, found.fallback) == (wanted.damping, wanted.fallback)


def test_what_float32_cannot_factor_is_redone_in_float64():
    # H = L L^T of small integers: exact in float32, and close to singular.
    lower = torch.randint(-9, 10, (8, 8), generator=seeded()).tril(-1).double() + torch.eye(8)
    hessian, weight = (lower @ lower.T).to(DEVICE), torch.randn(4, 8, generator=seeded()).to(DEVICE)
    assert lower_factors([hessian.float()[None]], 0.0) == [None]
    solution = sf.solve(weight, hessian.float(), 0.5, damping=0, backend="native")
    exact = sf.solve(weight.cpu().double(), hessian.cpu(), 0.5, damping=0, backend="native")
    assert solution.fallback == "float64"
    assert torch.equal(solution.mask.cpu(), exact.mask)


# Elimination

#: Groups, rows, columns, columns of a block.
ELIMINATIONS = [
    (1, 3, 1, 1),
    (1, 5, 300, 1),
    (2, 300, 70, 1),  # more rows than are at work at a time
    (1, 2, 900, 1),
    (1, 40, 135, 9),
    (1, 2, 1152, 9),  # vectors are kept for longer
    (24, 1, 9, 9),
    (1, 3, 300, 25),
    (1, 2, 98, 49),
    (1, 1, 2048, 1024),
]


def elimination_of(groups: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weight and inverse Hessian, float64 on the CPU."""
    weight = torch.randn(groups, rows, columns, generator=seeded(columns), dtype=torch.float64)
    inverse = torch.linalg.inv(hessian_of(columns, groups))
    return weight, (inverse + inverse.mT) / 2


@pytest.mark.parametrize("shape", ELIMINATIONS, ids=str)
def test_float64_elimination_equals_the_cpu(shape):
    *sizes, block_size = shape
    weight, inverse = elimination_of(*sizes)
    (order,), (loss,) = ops.elimination_orders([weight], [inverse], [block_size])
    (found,), (found_loss,) = ops.elimination_orders([weight.to(DEVICE)], [inverse.to(DEVICE)], [block_size])
    assert (found.dtype, found_loss.dtype) == (torch.int32, torch.float64)
    assert torch.equal(found.cpu(), order)
    torch.testing.assert_close(found_loss.cpu(), loss, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 150, 1), (2, 2, 90, 9), (1, 2, 100, 25)], ids=str)
def test_elimination_equals_the_published_procedure(shape):
    *sizes, block_size = shape
    weight, inverse = elimination_of(*sizes)
    expected = reference.elimination_order(weight, inverse, block_size)
    (order,), (loss,) = ops.elimination_orders([weight.to(DEVICE)], [inverse.to(DEVICE)], [block_size])
    assert torch.equal(order.cpu(), expected[0])
    torch.testing.assert_close(loss.cpu(), expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_cost_the_same_go_from_the_lowest_on(block_size, dtype):
    # With H = I nothing propagates, so every score is exact.
    weight = torch.randint(-1, 2, (1, 500, 120), generator=seeded()).to(DEVICE, dtype)
    eye = torch.eye(120, dtype=dtype, device=DEVICE)[None]
    scores = weight.view(1, 500, -1, block_size).pow(2).sum(3).sort(stable=True)
    (order,), (loss,) = ops.elimination_orders([weight], [eye], [block_size])
    assert torch.equal(order, scores.indices.int())
    assert torch.equal(loss, scores.values / 2)


@pytest.mark.parametrize("shape", [(1, 20, 600, 1), (1, 10, 576, 9)], ids=str)
def test_float32_orders_cost_what_the_exact_ones_do(shape):
    *sizes, block_size = shape
    weight, inverse = elimination_of(*sizes)
    _, (expected,) = ops.elimination_orders([weight], [inverse], [block_size])
    _, (loss,) = ops.elimination_orders([weight.to(DEVICE).float()], [inverse.to(DEVICE).float()], [block_size])
    torch.testing.assert_close(loss.cpu().double().sum(2), expected.sum(2), rtol=1e-3, atol=0)


def test_rows_of_many_layers_are_as_in_each_alone():
    weights, inverses, blocks = [], [], []
    for i, (*sizes, block_size) in enumerate(ELIMINATIONS[:-1] * 2):
        dtype = (torch.float32, torch.float64)[i % 3 == 0]
        weight, inverse = elimination_of(*sizes)
        weights.append(weight.to(DEVICE, dtype))
        inverses.append(inverse.to(DEVICE, dtype))
        blocks.append(block_size)
    orders, losses = ops.elimination_orders(weights, inverses, blocks)
    for i, block_size in enumerate(blocks):
        (order,), (loss,) = ops.elimination_orders([weights[i]], [inverses[i]], [block_size])
        assert torch.equal(orders[i], order)
        assert torch.equal(losses[i], loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_end_where_they_cannot_go_on(dtype):
    weight, inverse = elimination_of(2, 3, 90)
    inverse[1, 40, 40] = -0.1
    weight[0, 1, 17] = math.nan
    weight, inverse = weight.to(DEVICE, dtype), inverse.to(DEVICE, dtype)
    (order,), (loss,) = ops.elimination_orders([weight], [inverse], [1])
    assert torch.equal(order < 0, loss.isnan())
    assert (order[1] == -1).all()  # a negative loss is the least
    assert order[0, 1].argmin() == 89  # what is not a number is left to the end
    assert (order[0, ::2] >= 0).all()


def test_nothing_is_eliminated_of_nothing():
    weights = [torch.zeros(1, 0, 8, device=DEVICE), torch.zeros(0, 3, 4, device=DEVICE)]
    inverses = [torch.eye(8, device=DEVICE)[None], torch.zeros(0, 4, 4, device=DEVICE)]
    orders, losses = ops.elimination_orders(weights, inverses, [2, 1])
    assert [order.shape for order in orders] == [loss.shape for loss in losses] == [(1, 0, 4), (0, 3, 4)]


@calls_cuda
def test_blocks_wider_than_the_gpu_holds_are_refused():
    weight, eye = torch.zeros(1, 1, 1025, device=DEVICE), torch.eye(1025, device=DEVICE)[None]
    with pytest.raises(RuntimeError, match="block_size may be at most 1024 on a GPU, got 1025"):
        ops.elimination_orders([weight], [eye], [1025])


# Views


def views_arguments(dtype: torch.dtype) -> list[Tensor]:
    """Six views of 16 x 20 pixels, of an image of 30 x 41."""
    generator, starts, weights = seeded(), [], []
    for pixels, taps, size in ((30, 4, 16), (41, 7, 20)):
        starts.append(torch.randint(0, pixels - taps + 1, (6, size), generator=generator))
        weights.append(torch.rand(6, taps, size, generator=generator, dtype=dtype) * 2 / taps)
    colours = torch.rand(6, 3, generator=generator, dtype=dtype) * torch.tensor([1.5, 6, 1.5]) - torch.tensor([0, 3, 0])
    image = torch.rand(3, 30, 41, generator=generator, dtype=dtype)
    return [image, starts[0], weights[0], starts[1], weights[1], colours.to(dtype)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("strided", [False, True])
def test_views_equal_the_cpu(dtype, tolerance, strided):
    arguments = views_arguments(dtype)
    expected = ops.render_views(*arguments)
    here = [argument.to(DEVICE) for argument in arguments]
    if strided:
        here[0] = here[0].mT.contiguous().mT
    torch.testing.assert_close(ops.render_views(*here).cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_augmentation_equals_the_cpu_and_the_reference(dtype, tolerance):
    augmentation, image = sf.Augmentation(size=(33, 40)), torch.rand(3, 57, 91, generator=seeded(), dtype=dtype)
    views = augmentation.sample((57, 91), 40, seeded())
    expected = augmentation.render(image, views, backend="native")
    for backend in ("native", "reference"):
        found = augmentation.render(image.to(DEVICE), views, backend=backend)
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)


def test_no_views():
    image, *bands, colours = views_arguments(torch.float32)
    found = ops.render_views(image.to(DEVICE), *(band[:0].to(DEVICE) for band in bands), colours[:0].to(DEVICE))
    assert found.shape == (0, 3, 16, 20)


@calls_cuda
def test_bands_that_leave_the_image_are_moved_inside():
    # The CPU refuses them. To look at them here, the host would have to wait.
    arguments = [argument.to(DEVICE) for argument in views_arguments(torch.float32)]
    inside = [argument.clone() for argument in arguments]
    for place, last in ((1, 30 - 4), (3, 41 - 7)):
        for view, start in enumerate((-1, -(2**63), last + 1, 2**63 - 1)):
            arguments[place][view] = start
            inside[place][view] = min(max(start, 0), last)
    assert torch.equal(ops.render_views(*arguments), ops.render_views(*inside))


# What holds for all operators


class Case(NamedTuple):
    """An operator on a few numbers: what to call, with tensors on the CPU that are moved first, and how exact it is."""

    run: Callable[..., Sequence[Tensor]]
    inputs: Sequence[Tensor]
    tolerance: float = 0.0

    def on(self, device: torch.device) -> list[Tensor]:
        return list(self.run(*(tensor.to(device) for tensor in self.inputs)))


def gram_case(name: str, precision: str, layout: str = "channels_last") -> Case:
    (dtype, tf32), maps = PRECISIONS[precision], MAPS[name]

    def run(images: Tensor) -> list[Tensor]:
        return [gram_of(laid_out(images, layout), maps.geometry, tf32, batches=2)]

    return Case(run, [random_maps(maps, integers=True).to(dtype)])


def factor_case(dtypes: Sequence[torch.dtype], singular: bool = False) -> Case:
    def run(*hessians: Tensor) -> list[Tensor]:
        factors, errors = ops.factor_hessians(hessians, 0.01)
        good = [error < 1 for error in errors]
        return good if singular else [*factors, *good]

    hessians = [hessian_of(columns, 2).to(dtype) for columns in (1, 65, 130, 200) for dtype in dtypes]
    if singular:
        hessians[1][1] *= -1
    return Case(run, hessians, 1e-3 if torch.float32 in dtypes else 1e-10)


def prune_case(dtypes: Sequence[torch.dtype], published: bool = False) -> Case:
    problems = [(2, 5000, 66, 1), (1, 16, 270, 9), (2, 20, 192, 64), (24, 1, 9, 9), (1, 6, 300, 150)]

    def run(*tensors: Tensor) -> list[Tensor]:
        weights, factors = tensors[::2], tensors[1::2]
        blocks = [block_size for *_, block_size in problems for _ in dtypes]
        sparse, masks, losses = ops.prune_layers(weights, factors, [0.4] * len(blocks), blocks, published)
        return [*sparse, *masks, losses]

    tensors = [
        tensor.to(dtype) for *shape, _ in problems for dtype in dtypes for tensor in exact_problem(*shape)
    ]  # fmt: skip
    return Case(run, tensors)


def elimination_case(dtypes: Sequence[torch.dtype]) -> Case:
    shapes = [(2, 3, 130, 1), (1, 16, 135, 9), (1, 2, 100, 25), (24, 1, 9, 9)]

    def run(*tensors: Tensor) -> list[Tensor]:
        blocks = [block_size for *_, block_size in shapes for _ in dtypes]
        orders, losses = ops.elimination_orders(tensors[::2], tensors[1::2], blocks)
        sums = [loss.sum(2) for loss in losses]  # float32 may choose otherwise
        return sums if torch.float32 in dtypes else [*(order.double() for order in orders), *losses]

    tensors = [
        tensor.to(dtype) for *sizes, _ in shapes for dtype in dtypes for tensor in elimination_of(*sizes)
    ]  # fmt: skip
    return Case(run, tensors, 1e-3 if torch.float32 in dtypes else 1e-10)


def views_case(dtype: torch.dtype) -> Case:
    return Case(lambda *arguments: [ops.render_views(*arguments)], views_arguments(dtype), 1e-5)


BOTH = (torch.float32, torch.float64)
CASES: dict[str, Callable[[], Case]] = {
    **{
        f"gram, {name}, {precision}": partial(gram_case, name, precision)
        for name, precisions in {
            "1x1, 3 channels": ["float64", "float32", "tf32"],
            "1x1, 64 channels, many positions": list(PRECISIONS),
            "1x1, 66 channels": ["float32", "tf32", "bfloat16"],
            "1x1, 128 channels, many positions": list(PRECISIONS),
            "1x1, padded": ["float32"],
            "patches, many positions": list(PRECISIONS),
            "shifted, 16 channels": list(PRECISIONS),
            "shifted, 130 channels": ["float32", "tf32"],
            "shifted, strided": list(PRECISIONS),
            "shifted, 5x5": ["float32", "tf32"],
            "shifted, grouped": ["float32", "tf32"],
            "kernel larger than the maps": ["float32"],
            "depthwise 3x3, strided, many rows": list(PRECISIONS),
            "depthwise 5x5": ["float64", "float32"],
        }.items()
        for precision in precisions
    },
    "gram, misaligned": partial(gram_case, "shifted, 16 channels", "float32", "misaligned"),
    "gram, every second column": partial(gram_case, "shifted, strided", "tf32", "every second column"),
    "factors, float32": partial(factor_case, [torch.float32]),
    "factors, float64": partial(factor_case, [torch.float64]),
    "factors, both dtypes": partial(factor_case, BOTH),
    "factors, one singular": partial(factor_case, BOTH, singular=True),
    "pruning": partial(prune_case, BOTH),
    "pruning, published rule": partial(prune_case, BOTH, published=True),
    "elimination, float64": partial(elimination_case, [torch.float64]),
    "elimination, both dtypes": partial(elimination_case, BOTH),
    "views, float32": partial(views_case, torch.float32),
    "views, float64": partial(views_case, torch.float64),
}


@pytest.mark.parametrize("name", CASES)
def test_small_cases(name):
    case = CASES[name]()
    for found, expected in zip(case.on(DEVICE), case.on(CPU), strict=True):
        assert found.device.type == DEVICE.type
        if expected.dtype == torch.bool or not case.tolerance:
            assert torch.equal(found.cpu(), expected)
        else:
            assert_close(found, expected, case.tolerance)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_twice(name):
    # With what was freed in between, memory has other addresses and holds other numbers.
    first = CASES[name]().on(DEVICE)
    scraps = [torch.full((1 << i,), torch.nan, device=DEVICE) for i in range(8, 20)]
    del scraps[::2]
    assert all(torch.equal(*each) for each in zip(first, CASES[name]().on(DEVICE), strict=True))


_CYCLES = 200_000_000  # of a kernel that only waits: some tenth of a second


@calls_cuda
@pytest.mark.parametrize("name", CASES)
def test_work_is_queued_on_the_current_stream(name):
    case = CASES[name]()
    expected, sources = case.on(DEVICE), [tensor.to(DEVICE) for tensor in case.inputs]
    inputs = [torch.zeros_like(tensor) for tensor in sources]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_CYCLES)
        for tensor, source in zip(inputs, sources, strict=True):
            tensor.copy_(source)  # until then whoever looks sees zeros
        found = case.run(*inputs)
    stream.synchronize()
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))


@calls_cuda
@pytest.mark.parametrize(
    "name",
    ["gram, shifted, strided, tf32", "factors, float32", "pruning", "elimination, both dtypes", "views, float32"],
)
def test_the_host_does_not_wait_for_the_device(name):
    case = CASES[name]()
    inputs = [tensor.to(DEVICE) for tensor in case.inputs]
    case.run(*inputs)  # loads the kernels, and takes the memory
    torch.cuda.synchronize()
    torch.cuda._sleep(_CYCLES)
    case.run(*inputs)
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


@calls_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", CASES)
def test_a_device_that_is_not_the_current_one(name):
    case, other = CASES[name](), torch.device("cuda", 1)
    with torch.cuda.device(0):
        found = case.on(other)
        assert torch.cuda.current_device() == 0
    assert all(tensor.device == other for tensor in found)
    assert all(torch.equal(*each) for each in zip(found, case.on(other), strict=True))


def elsewhere() -> list[torch.device]:
    return [CPU, *(torch.device("cuda", i) for i in range(1, torch.cuda.device_count()))]


@calls_cuda
@pytest.mark.parametrize("other", elsewhere(), ids=str)
def test_tensors_on_two_devices_are_refused(other):
    here, eye = torch.device("cuda", 0), torch.eye(4)[None]
    weight, views = torch.randn(1, 3, 4), views_arguments(torch.float32)

    def add(*devices: torch.device) -> None:
        sums, images = torch.zeros(1, 4, 4, device=devices[0]), torch.zeros(2, 4, 3, 3, device=devices[1])
        ops.add_conv2d_sums_(sums, images, Geometry())

    def factor(*devices: torch.device) -> None:
        ops.factor_hessians([eye.to(device) for device in devices], 0.01)

    def prune(*devices: torch.device) -> None:
        ops.prune_columns(weight.to(devices[0]), eye.to(devices[1]), 0.5, 1, False)

    def prune_second(*devices: torch.device) -> None:
        weights, factors = ([tensor.to(device) for device in devices] for tensor in (weight, eye))
        ops.prune_layers(weights, factors, [0.5] * 2, [1] * 2, False)

    def eliminate(*devices: torch.device) -> None:
        ops.elimination_orders([weight.to(devices[0])], [eye.to(devices[1])], [1])

    calls: list[Callable[..., None]] = [add, factor, prune, prune_second, eliminate]
    for place in range(1, len(views)):

        def render(*devices: torch.device, place: int = place) -> None:
            ops.render_views(*(tensor.to(devices[i == place]) for i, tensor in enumerate(views)))

        calls.append(render)
    for call in calls:
        with pytest.raises(RuntimeError, match="must be on cuda:0, as the first tensor is"):
            call(here, other)
        with pytest.raises(RuntimeError):
            call(other, here)
    torch.cuda.synchronize()  # nothing was queued that fails


@pytest.mark.parametrize("dtype", BOTH)
def test_opcheck(dtype):
    operators, check = torch.ops.spade_fast, torch.library.opcheck
    images = torch.randn(2, 16, 5, 5, dtype=dtype, device=DEVICE)
    for groups, kernel in ((1, 3), (1, 1), (16, 3)):
        geometry = ([kernel, kernel], [1, 1], [1, 1], [1, 1], groups)
        sums = torch.zeros(operators.conv2d_sums_shape([16, 5, 5], *geometry), dtype=dtype, device=DEVICE)
        check(operators.add_conv2d_sums_.default, (sums, images, *geometry))
        check(operators.conv2d_gram.default, (sums, [16, 5, 5], *geometry))
        if dtype == torch.float32:
            check(operators.add_conv2d_sums_.default, (sums, images, *geometry, True))
            check(operators.add_conv2d_sums_.default, (sums, images.bfloat16(), *geometry))
    factor = torch.eye(6, dtype=dtype, device=DEVICE).repeat(2, 1, 1)
    weights = [torch.randn(2, rows, 6, dtype=dtype, device=DEVICE) for rows in (3, 1)]
    check(operators.factor_hessian.default, (factor, 0.01))
    check(operators.factor_hessians.default, ([factor, factor[:1, :2, :2]], 0.01))
    for published in (False, True):
        check(operators.prune_columns.default, (weights[0], factor, 0.5, 2, published))
    check(operators.prune_layers.default, (weights, [factor, factor], [0.5, 0.2], [2, 1], False))
    check(operators.elimination_orders.default, (weights, [factor, factor], [2, 1]))
    check(operators.render_views.default, [argument.to(DEVICE) for argument in views_arguments(dtype)])


def test_strided_weights_and_hessians():
    weight, factor = (tensor.to(DEVICE) for tensor in exact_problem(2, 30, 70))
    hessian = (factor.mT @ factor)[:, ::2, ::2]
    plain = ops.prune_columns(weight, factor, 0.5, 1, False)
    strided = ops.prune_columns(weight.mT.contiguous().mT, factor.mT.contiguous().mT, 0.5, 1, False)
    assert all(torch.equal(*each) for each in zip(strided, plain, strict=True))
    assert torch.equal(ops.factor_hessian(hessian, 0.1)[0], ops.factor_hessian(hessian.contiguous(), 0.1)[0])


# Traces

PICTURES = [torch.rand(3, 22, 26, generator=seeded(i)) for i in range(5)]
SETTINGS: dict[str, Any] = {"preprocess": nn.Identity(), "num_augmentations": 16, "batch_size": 8}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A layer of every kind; on the CPU."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(32, 24, (5, 3), padding=(2, 1), groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    ).to(dtype).eval()  # fmt: skip


def exact_views(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The default distribution, rendered in float64."""
    return sf.Augmentation(size=(20, 24))(image.double(), count, generator)


def assert_same_bits(found: sf.Trace, expected: sf.Trace) -> None:
    assert list(found.layers) == list(expected.layers)
    for name, layer in expected.layers.items():
        assert torch.equal(found.layers[name].weight, layer.weight), name
        assert found.layers[name].loss == layer.loss, name


@pytest.mark.parametrize(
    "sparsity",
    [0.5, {"0": 0.3, "3": 0.8, "10": 0.9, "13": 0.4}, sf.ErrorBudget(0.1)],
    ids=["all", "some", "error budget"],
)
@pytest.mark.parametrize("refit", [False, True])
def test_float64_trace_equals_that_of_the_cpu(sparsity, refit):
    settings = {**SETTINGS, "augment": exact_views, "backend": "native", "refit": refit}
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = sf.trace(model, PICTURES[0], sparsity, **settings)
    found = sf.trace(model, PICTURES[0], sparsity, device=DEVICE, **settings)
    assert list(found.layers) == list(expected.layers) != []
    for name, wanted in expected.layers.items():
        layer, columns = found.layers[name], wanted.weight.shape[1:].numel()
        assert torch.equal(layer.mask.cpu(), wanted.mask), name
        # Convolutions are rounded otherwise here, by some d eps, and so are Hessians. Damping bounds their condition
        # number by d / 0.01, and weights, and losses, move by no more than both together.
        tolerance = 10 * columns * torch.finfo(torch.float64).eps * columns / 0.01
        assert_close(layer.weight, wanted.weight, tolerance)
        assert layer.loss == pytest.approx(wanted.loss, rel=tolerance), name
        assert (layer.damping, layer.fallback) == (wanted.damping, wanted.fallback)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_trace_runs_natively_without_being_asked():
    assert ops.resolve_backend("auto", DEVICE) == "native"
    assert sf.trace(network(), PICTURES[0], 0.5, device=DEVICE, **SETTINGS).settings["backend"] == "native"


@pytest.mark.parametrize("hessian_dtype", [None, torch.float64, torch.bfloat16, "tf32"])
def test_float32_trace_is_as_good_as_that_of_the_cpu(hessian_dtype, record_property):
    # torch's convolutions on CUDA round to TF32 unless told otherwise, so that masks differ.
    settings = {**SETTINGS, "hessian_dtype": hessian_dtype}
    expected = sf.trace(network(torch.float32), PICTURES[0], 0.5, **SETTINGS)
    found = sf.trace(network(torch.float32), PICTURES[0], 0.5, device=DEVICE, **settings)
    for name, wanted in expected.layers.items():
        assert found.layers[name].loss == pytest.approx(wanted.loss, rel=0.05), name
        assert found.layers[name].sparsity == wanted.sparsity
    overlaps = found.overlap(expected)
    record_property("mask overlap", min(overlaps.values()))
    assert min(overlaps.values()) > 0.8


def test_trace_gives_the_same_bits_twice():
    model = network(torch.float32).to(DEVICE)
    first, second = (sf.trace(model, PICTURES[0], 0.5, **SETTINGS) for _ in range(2))
    assert_same_bits(second, first)


@pytest.mark.parametrize("sparsity", [0.5, sf.ErrorBudget(0.1)], ids=["0.5", "error budget"])
@pytest.mark.parametrize("images_in_flight", [1, 2, 4, None])
def test_images_in_flight_change_no_bit(images_in_flight, sparsity):
    model = network(torch.float32).to(DEVICE)
    alone = [sf.trace(model, picture, sparsity, **SETTINGS) for picture in PICTURES]
    together = list(sf.trace_many(model, PICTURES, sparsity, images_in_flight=images_in_flight, **SETTINGS))
    for found, expected in zip(together, alone, strict=True):
        assert_same_bits(found, expected)


def test_a_run_makes_the_same_store_however_many_images_are_in_flight(tmp_path):
    for module in ("pyarrow", "captum"):
        pytest.importorskip(module)
    (tmp_path / "images").mkdir()
    photographs(tmp_path / "images", 6)
    stores = []
    for count in (1, 3):
        out = tmp_path / str(count)
        more = {"methods": ("saliency", "lrp"), "metrics": ("insertion",), "steps": 4, "num_augmentations": 4}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*have no weight left")
            assert (
                sf.run(quarters(), tmp_path / "images", out, 0.5, device=DEVICE.type, in_flight=count, **more).made == 6
            )
        stores.append({file.name: file.read_bytes() for file in out.rglob("*") if file.is_file()})
    assert stores[0] == stores[1]
    if DEVICE.type == "cuda":
        found = sf.Store(tmp_path / "1")["00.png"].record["environment"]["device"]
        assert found == torch.cuda.get_device_name(DEVICE)


@calls_cuda
def test_a_trace_on_another_stream():
    model = network(torch.float32).to(DEVICE)
    expected = sf.trace(model, PICTURES[0], 0.5, **SETTINGS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_CYCLES)
        found = sf.trace(model, PICTURES[0], 0.5, **SETTINGS)
    stream.synchronize()
    assert_same_bits(found, expected)


@calls_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_trace_on_a_device_that_is_not_the_current_one():
    settings = {**SETTINGS, "augment": exact_views}
    found = sf.trace(network(), PICTURES[0], 0.5, device="cuda:1", **settings)
    expected = sf.trace(network(), PICTURES[0], 0.5, device="cuda:0", **settings)
    for name, layer in expected.layers.items():
        assert found.layers[name].weight.device == torch.device("cuda", 1)
        assert torch.equal(found.layers[name].weight.cpu(), layer.weight.cpu())


# Memory that runs out


@contextmanager
def memory_left(mebibytes: int) -> Iterator[None]:
    """Of the device's memory, torch may take so much more than it holds now."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (mebibytes << 20)) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def memory_hungry(pictures: Sequence[Tensor], images_in_flight: int | None = None) -> list[sf.Trace]:
    """Traces of one layer whose Hessian has 16 MiB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2028, 4)).to(DEVICE)
    settings = {**SETTINGS, "layers": ["1"], "augment": sf.Augmentation(size=26), "images_in_flight": images_in_flight}
    return list(sf.trace_many(model, pictures, 0.5, **settings))


def test_memory_is_enough_for_one():
    assert len(memory_hungry(PICTURES[:2])) == 2


@calls_cuda
def test_fewer_images_are_in_flight_where_memory_runs_out():
    expected = memory_hungry(PICTURES * 2, images_in_flight=1)
    with memory_left(200), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = memory_hungry(PICTURES * 2, images_in_flight=10)
    assert any("no memory for 10 images in flight" in str(warning.message) for warning in caught)
    for mine, wanted in zip(found, expected, strict=True):
        assert_same_bits(mine, wanted)


@calls_cuda
def test_an_image_that_memory_cannot_hold_is_refused():
    memory_hungry(PICTURES[:1])  # torch's libraries take their own share first
    with memory_left(24), pytest.raises(sf.InvalidInputError, match="image 0: cuda.* has no memory for this image"):
        memory_hungry(PICTURES[:1])
    assert memory_hungry(PICTURES[:1])
