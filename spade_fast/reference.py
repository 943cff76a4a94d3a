"""The published procedure in plain PyTorch: the oracle of the tests, the baseline of the benchmarks.

It runs in float32 or float64 on any device that has both, and follows the paper and its published code step by step.
:func:`prune_layer` is the whole of it for one layer: a running Hessian of unfolded inputs, the inverse Hessian's
Cholesky factor, one pass over the columns. The other functions are what ``backend="reference"`` runs in place of the
native operators. Slow by design.

Sources: SPADE (Soltani Moakhar et al., ICML 2024) section 3 and appendix, "FastSPADE"; SparseGPT (Frantar and
Alistarh, ICML 2023) section 3 and algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.errors import InvalidInputError
from spade_fast.ops import Geometry

# Of which the exact solver keeps inverses at a time, as published.
_ROWS_AT_ONCE = 32


def conv2d_gram(input: Tensor, geometry: Geometry) -> Tensor:
    """Plain form of :func:`spade_fast.ops.conv2d_gram` for one batch: unfold, then multiply, group by group."""
    grams = []
    for channels in input.chunk(geometry.groups, dim=1):
        patches = F.unfold(channels, geometry.kernel_size, geometry.dilation, geometry.padding, geometry.stride)
        columns = patches.transpose(0, 1).flatten(1)  # [d, images * positions]
        grams.append(columns @ columns.T)
    return torch.stack(grams)


def prune_layer(
    weight: Tensor,
    batches: Iterable[Tensor],
    sparsity: float,
    *,
    block_size: int = 1,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """FastSPADE on one layer as published, from its inputs (SPADE section 3; SparseGPT algorithm 1).

    Shares nothing with :func:`spade_fast.hessian` and :func:`spade_fast.solve`, so that they can be held against it.
    Three things differ there on purpose: the count that is pruned (here one more than asked for), the damping where
    an input is dead (here 1 enters the mean for it), and what happens without a Cholesky factor (here an error).

    Parameters
    ----------
    weight
        [rows, d].
    batches
        Inputs [d, samples] of the layer, unfolded for a convolution, batch by batch.
    sparsity, block_size
        As in :func:`prune_columns`.
    damping
        Added to the Hessian's diagonal, as a share of its mean.

    Returns
    -------
    weight, mask, loss
        [rows, d], [rows, d], and a float64 scalar.
    """
    hessian = torch.zeros(weight.shape[1], weight.shape[1], dtype=weight.dtype, device=weight.device)
    samples = 0
    for batch in batches:
        hessian *= samples / (samples + batch.shape[1])
        samples += batch.shape[1]
        scaled = math.sqrt(2 / samples) * batch
        hessian += scaled @ scaled.T
    weight = weight.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    upper = factor(hessian[None])
    if upper is None:
        raise InvalidInputError("the damped Hessian is not positive definite: raise the damping")
    sparse, mask, loss = prune_columns(weight[None], upper, sparsity, block_size, published_count=True)
    return sparse[0], mask[0], loss


def factor(hessian: Tensor) -> Tensor | None:
    """Upper triangular U [G, d, d] with H^-1 = U^T U: Cholesky, inverse, Cholesky (SparseGPT algorithm 1).

    None where `hessian` [G, d, d] or its computed inverse is not positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(hessian)
    if info.any():
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if info.any() or not upper.isfinite().all() else upper


def elimination_order(weight: Tensor, inverse: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Plain form of :func:`spade_fast.ops.elimination_orders` for one layer, as published: an inverse for every row.

    Rewrites each of these [d, d] inverses at every step (OBC, Frantar et al. 2022, algorithm 1 and section 4).

    Parameters
    ----------
    weight
        [G, r, d].
    inverse
        [G, d, d].
    block_size
        Columns that are pruned at once; divides d.

    Returns
    -------
    order, losses
        As there.
    """
    orders, losses = [], []
    for rows, of_group in zip(weight, inverse, strict=True):
        for some in rows.split(_ROWS_AT_ONCE):
            order, loss = _eliminate(some.clone(), of_group, block_size)
            orders.append(order)
            losses.append(loss)
    shape = (*weight.shape[:2], weight.shape[2] // block_size)
    return torch.cat(orders).view(shape), torch.cat(losses).view(shape)


def _eliminate(weight: Tensor, inverse: Tensor, size: int) -> tuple[Tensor, Tensor]:
    count, columns = weight.shape
    blocks = columns // size
    inverses = inverse.repeat(count, 1, 1)  # [count, d, d]
    least = least_pivot(columns, weight.dtype) * inverse.diagonal().view(blocks, size)
    order = torch.full((count, blocks), -1, dtype=torch.int32, device=weight.device)
    losses = torch.full_like(order, math.nan, dtype=weight.dtype)
    gone = torch.zeros(count, blocks, dtype=torch.bool, device=weight.device)
    failed = torch.zeros(count, dtype=torch.bool, device=weight.device)
    each = torch.arange(count, device=weight.device)
    for step in range(blocks):
        if size == 1:
            pivots = inverses.diagonal(dim1=1, dim2=2)
            scores = weight**2 / pivots
        else:
            of_blocks = inverses.view(count, blocks, size, blocks, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
            lower, info = torch.linalg.cholesky_ex(of_blocks)  # [count, blocks, size, size]
            lower.masked_fill_((info > 0)[:, :, None, None], math.nan)
            halves = torch.linalg.solve_triangular(lower, weight.view(count, blocks, size, 1), upper=False)
            scores = (halves**2).sum((2, 3))
        scores.masked_fill_(gone, math.inf)
        chosen = scores.nan_to_num(nan=math.inf, posinf=math.inf).argmin(1)  # the first of equal ones
        loss = scores[each, chosen] / 2
        if size == 1:
            rows = inverses[each, chosen]
            pivot = pivots[each, chosen].clone()
            failed |= ~(pivot > least[chosen, 0])
            weight -= rows * (weight[each, chosen] / pivot)[:, None]
            rows /= pivot.sqrt()[:, None]
            inverses -= torch.bmm(rows[:, :, None], rows[:, None, :])
        else:
            rows = inverses.view(count, blocks, size, columns)[each, chosen]  # [count, size, d]
            pivot = lower[each, chosen]
            failed |= ~(pivot.diagonal(dim1=1, dim2=2) ** 2 > least[chosen]).all(1)
            rows = torch.linalg.solve_triangular(pivot, rows, upper=False)
            weight -= (halves[each, chosen].mT @ rows)[:, 0]
            inverses -= torch.bmm(rows.mT, rows)
        failed |= ~loss.isfinite()
        order[:, step] = chosen.int().masked_fill(failed, -1)
        losses[:, step] = loss.masked_fill(failed, math.nan)
        gone[each, chosen] = True
        # What is gone stays alone, and costs nothing.
        columns_gone = gone.repeat_interleave(size, dim=1)
        weight.masked_fill_(columns_gone, 0)
        inverses.diagonal(dim1=1, dim2=2).masked_fill_(columns_gone, 1)
    return order, losses


def least_pivot(columns: int, dtype: torch.dtype) -> float:
    """The least share of a diagonal entry that is no rounding noise after subtractions from it: csrc/pivot_noise.h."""
    return 10 * math.sqrt(columns) * torch.finfo(dtype).eps


def count_to_prune(candidates: int, sparsity: float) -> int:
    """round-half-up(candidates * sparsity)."""
    return math.floor(candidates * sparsity + 0.5)


def blocks_to_prune(blocks: int, sparsity: float, published_count: bool) -> int:
    """How many of the blocks of all rows the exact solver prunes; the published rule rounds up."""
    return math.ceil(blocks * sparsity) if published_count else count_to_prune(blocks, sparsity)


def prune_columns(
    weight: Tensor, upper: Tensor, sparsity: float, block_size: int, published_count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain form of :func:`spade_fast.ops.prune_columns`, from the inverse Hessian's factor.

    Parameters
    ----------
    weight
        [G, r, d].
    upper
        [G, d, d], from :func:`factor`.
    sparsity, block_size, published_count
        As there. The published rule fails at sparsity 1, where its threshold lies past the last score; here it
        then prunes everything.

    Returns
    -------
    weight, mask, loss
        As there.
    """
    remaining = weight.clone()  # what error propagation has made of the weights so far
    sparse = torch.zeros_like(weight)
    mask = torch.ones_like(weight, dtype=torch.bool)
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    columns = weight.shape[2]
    for begin in range(0, columns, block_size):
        end = min(begin + block_size, columns)
        block = upper[:, begin:end, begin:end]
        scores = remaining[:, :, begin:end] ** 2 / block.diagonal(dim1=1, dim2=2)[:, None] ** 2
        mask[:, :, begin:end] = _kept(scores, sparsity, published_count)
        errors = torch.zeros_like(scores)
        for local, column in enumerate(range(begin, end)):
            current = remaining[:, :, column]
            pivot = block[:, local, local, None]
            sparse[:, :, column] = current * mask[:, :, column]
            error = (current - sparse[:, :, column]) / pivot
            loss += (error.double() ** 2).sum() / 2
            remaining[:, :, column:end] -= error[:, :, None] * block[:, None, local, local:]
            errors[:, :, local] = error
        remaining[:, :, end:] -= errors @ upper[:, begin:end, end:]
    return sparse, mask, loss


def _kept(scores: Tensor, sparsity: float, published_count: bool) -> Tensor:
    flat = scores.flatten()
    if published_count:
        index = min(int(flat.numel() * sparsity), flat.numel() - 1)
        return scores > flat.sort().values[index]
    kept = torch.ones_like(flat, dtype=torch.bool)
    # A stable sort sends ties to the lowest index in (row, column) order.
    kept[flat.sort(stable=True).indices[: count_to_prune(flat.numel(), sparsity)]] = False
    return kept.view_as(scores)
