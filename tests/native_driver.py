"""Drives every operator of one native library over random shapes: python tests/native_driver.py LIBRARY [CASES]

Run by tests/test_ops.py for every instruction set of the machine, and by CMake's tests under sanitizers. It loads the
library by itself, so that one built apart from the package can be driven.
"""

from __future__ import annotations

import random
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


def unfolded_gram(images: Tensor, kernel: list[int], strides: list[list[int]], groups: int) -> Tensor:
    """[groups, d, d] by unfold and matmul; `strides` holds stride, padding and dilation."""
    stride, padding, dilation = strides
    grams = []
    for channels in images.chunk(groups, dim=1):
        columns = F.unfold(channels, kernel, dilation, padding, stride).transpose(0, 1).flatten(1)
        grams.append(columns @ columns.T)
    return torch.stack(grams)


def draw_dtype(draw: random.Random) -> torch.dtype:
    return draw.choice(list(TOLERANCES))


def draw_images(draw: random.Random, least: list[int]) -> tuple[Tensor, int]:
    """Inputs of random size and layout, and how many groups their channels fall into."""
    groups = draw.choice([1, 1, 2, 3, 20])
    channels = groups * draw.choice([1, 1, 2, 3, 8, 17, 40] if groups < 20 else [1, 2])
    sides = [draw.randint(max(1, low), max(1, low) + draw.choice([0, 1, 5, 11])) for low in least]
    images = torch.randn(draw.choice([0, 1, 2, 7]), channels, *sides, dtype=draw_dtype(draw))
    layout = draw.choice(["contiguous", "channels_last", "sliced"])
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        images = torch.stack([images, images + 1], dim=-1).flatten(3)[..., ::2]
    return images, groups


def check_gram(draw: random.Random) -> None:
    """One geometry: kernel to 7, stride to 4, dilation to 3, padding to 3, in several batches."""
    operators = torch.ops.spade_fast
    kernel, stride, dilation = ([draw.randint(1, high) for _ in range(2)] for high in (7, 4, 3))
    padding = [draw.randint(0, 3) for _ in range(2)]
    reach = [dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis] for axis in range(2)]
    images, groups = draw_images(draw, reach)
    size, geometry = list(images.shape[1:]), (kernel, stride, padding, dilation, groups)
    sums = torch.zeros(operators.conv2d_sums_shape(size, *geometry), dtype=images.dtype)
    for batch in images.split(3):
        operators.add_conv2d_sums_(sums, batch, *geometry)
    gram = operators.conv2d_gram(sums, size, *geometry)
    if len(images):
        expected = unfolded_gram(images.double(), kernel, [stride, padding, dilation], groups)
    else:
        expected = torch.zeros_like(gram)
    error = (gram - expected).abs().max() / expected.double().abs().max().clamp(min=1e-300)
    assert error <= TOLERANCES[images.dtype], f"error {error:.1e} for {list(images.shape)}, {geometry}"
    assert torch.equal(gram, gram.mT), f"not symmetric for {list(images.shape)}, {geometry}"


def check_prune_columns(draw: random.Random) -> None:
    """The loss is that of the weights that come back, and each block loses its count."""
    groups, rows, columns = draw.choice([1, 1, 3]), draw.choice([1, 2, 30, 600]), draw.choice([1, 9, 100, 200])
    block_size, sparsity = draw.choice([1, 9, 500]), draw.choice([0.0, 0.3, 0.9, 1.0])
    dtype = draw_dtype(draw)
    weight = torch.randn(groups, rows, columns, dtype=dtype)
    factor = torch.randn(groups, columns, columns, dtype=dtype).tril() / columns
    factor.diagonal(dim1=1, dim2=2).abs_().add_(1)
    sparse, mask, loss = torch.ops.spade_fast.prune_columns(weight, factor, sparsity, block_size, False)
    change = factor.double() @ (weight.double() - sparse.double()).mT
    assert abs(loss - change.square().sum() / 2) <= TOLERANCES[dtype] * columns * (loss + 1)
    for block in mask.split(block_size, dim=2):
        assert (~block).sum() == int(block.numel() * sparsity + 0.5)


def check_factor(draw: random.Random) -> None:
    """M^T M is the damped matrix."""
    groups, columns = draw.choice([1, 3]), draw.choice([1, 2, 9, 95, 96, 97, 130, 193, 250, 353])
    dtype = draw_dtype(draw)
    inputs = torch.randn(groups, columns, columns + 5, dtype=dtype)
    hessian = inputs @ inputs.mT
    factor, error = torch.ops.spade_fast.factor_hessian(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(columns)
    assert (error < 1).all()
    assert (factor.double().mT @ factor.double() - damped).abs().max() <= TOLERANCES[dtype] * damped.abs().max()


def check_side_by_side(draw: random.Random) -> None:
    """Many layers give what each gives alone."""
    columns = [draw.choice([1, 2, 9, 97, 130]) for _ in range(draw.randint(1, 6))]
    inputs = [torch.randn(1, d, d + 5, dtype=torch.float64) for d in columns]
    weights = [torch.randn(1, draw.choice([1, 600]), d, dtype=torch.float64) for d in columns]
    factors, _ = torch.ops.spade_fast.factor_hessians([x @ x.mT for x in inputs], 0.01)
    sparsities, blocks = [draw.random() for _ in columns], [draw.randint(1, 12) for _ in columns]
    found = torch.ops.spade_fast.prune_layers(weights, factors, sparsities, blocks, False)
    for i in range(len(columns)):
        alone = torch.ops.spade_fast.prune_columns(weights[i], factors[i], sparsities[i], blocks[i], False)
        assert torch.equal(found[1][i], alone[1])
        assert (found[0][i] - alone[0]).abs().max() <= TOLERANCES[torch.float64] * (1 + alone[0].abs().max())


def check_greed(weight: Tensor, inverse: Tensor, order: list[int], size: int, dtype: torch.dtype) -> None:
    """Of a few steps of a row: no other block would have cost less."""
    for step in {0, len(order) // 2, len(order) - 1}:
        gone = [block * size + i for block in order[:step] for i in range(size)]
        costs = {}
        for block in order[step:]:
            columns = [*gone, *range(block * size, (block + 1) * size)]
            lost = weight[columns]
            costs[block] = (lost @ torch.linalg.solve(inverse[columns][:, columns], lost)).item() / 2
        assert costs[order[step]] <= min(costs.values()) * (1 + 100 * TOLERANCES[dtype])


def check_elimination(draw: random.Random) -> None:
    """Every block goes once, and all of them cost what the whole row does; many layers give what each gives alone."""
    dtype, layers = draw_dtype(draw), []
    for _ in range(draw.randint(1, 3)):
        size = draw.choice([1, 1, 4, 9, 25, 70])
        columns = size * draw.choice([1, 2, 7, 15] if size > 1 else [1, 9, 70, 200])
        inputs = torch.randn(draw.choice([1, 2]), columns, 2 * columns + 5, dtype=torch.float64)
        hessian = inputs @ inputs.mT / columns
        weight = torch.randn(len(inputs), draw.choice([1, 5]), columns, dtype=dtype)
        layers.append((weight, hessian.inverse().to(dtype), size, hessian))
    weights, inverses, sizes, hessians = map(list, zip(*layers, strict=True))
    orders, losses = torch.ops.spade_fast.elimination_orders(weights, inverses, sizes)
    for i, (weight, hessian) in enumerate(zip(weights, hessians, strict=True)):
        whole = ((weight.double() @ hessian) * weight.double()).sum(2) / 2
        assert torch.equal(orders[i].sort(2).values, torch.arange(orders[i].shape[2]).expand_as(orders[i]).int())
        assert ((losses[i].double().sum(2) - whole).abs() <= 100 * TOLERANCES[dtype] * whole).all()
        check_greed(weight[0, 0].double(), hessian[0].inverse(), orders[i][0, 0].tolist(), sizes[i], dtype)
        alone, _ = torch.ops.spade_fast.elimination_orders(weights[i : i + 1], inverses[i : i + 1], sizes[i : i + 1])
        assert torch.equal(alone[0], orders[i])


def check_subsets(draw: random.Random) -> None:
    """Solutions on subsets of the columns."""
    groups, systems, columns = draw.choice([1, 3]), draw.choice([0, 1, 6]), draw.choice([1, 9, 95, 130, 220])
    dtype = draw_dtype(draw)
    inputs = torch.randn(groups, columns, 2 * columns + 5, dtype=dtype)
    matrix, right = inputs @ inputs.mT / columns, torch.randn(groups, systems, columns, dtype=dtype)
    subsets = torch.rand(groups, systems, columns) < draw.random()
    found = torch.ops.spade_fast.solve_subsets(matrix, subsets, right)
    assert not found[~subsets].any()
    residual = (found @ matrix - right)[subsets]
    if len(residual):
        assert residual.abs().max() <= 10 * TOLERANCES[dtype] * columns * (1 + found.abs().max())


def check_render(draw: random.Random) -> None:
    """Bands are sums, and colours those of the HSV circle."""
    views, height, width = draw.choice([0, 1, 3]), draw.choice([1, 7, 40]), draw.choice([1, 5, 33, 70])
    dtype = draw_dtype(draw)
    sizes, starts, weights, dense = draw.choice([(1, 1), (5, 18), (16, 64)]), [], [], []
    for pixels, size in zip((height, width), sizes, strict=True):
        taps = draw.randint(1, pixels)
        starts.append(torch.randint(0, pixels - taps + 1, (views, size)))
        weights.append(torch.rand(views, taps, size, dtype=dtype) / taps)
        places = starts[-1][:, :, None] + torch.arange(taps)
        dense.append(torch.zeros(views, size, pixels, dtype=dtype).scatter_(2, places, weights[-1].transpose(1, 2)))
    image = torch.rand(3, height, width, dtype=dtype)
    turn = torch.randint(-7, 8, (views,)).double() / 6  # of the hue by sixths: to the next corner of the colour cube
    colours = torch.stack([torch.ones(views), turn, torch.full((views,), 1.5)], 1).to(dtype)
    rendered = torch.ops.spade_fast.render_views(image, starts[0], weights[0], starts[1], weights[1], colours)
    for view in range(views):
        pixels = dense[0][view] @ image @ dense[1][view].T
        sixths = round(6 * turn[view].item()) % 6
        if sixths % 2:  # to the complement of the channel two thirds of a turn away
            pixels = pixels.amax(0) + pixels.amin(0) - pixels
            sixths += 3
        pixels = (pixels.roll(sixths // 2, 0) * 1.5).clamp(0, 1)
        assert (rendered[view] - pixels).abs().max() <= TOLERANCES[dtype]


def main(library: str, cases: str = "100") -> None:
    """Load the library and run so many cases of each operator."""
    torch.ops.load_library(library)
    torch.manual_seed(0)
    draw = random.Random(0)
    for _ in range(int(cases)):
        check_gram(draw)
        check_factor(draw)
        check_prune_columns(draw)
        check_side_by_side(draw)
        check_elimination(draw)
        check_subsets(draw)
        check_render(draw)
    print(f"{cases} cases of each operator agree")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
