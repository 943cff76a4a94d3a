"""The published procedure in plain PyTorch: the oracle of the tests, the baseline of the benchmarks.

It runs on any device in float32 or float64, and follows the paper and its published code step by step: unfolded
inputs, a running Hessian, the inverse Hessian's Cholesky factor, one pass over the columns. Slow by design.

Sources: SPADE (Soltani Moakhar et al., ICML 2024) section 3 and appendix, "FastSPADE"; SparseGPT (Frantar and
Alistarh, ICML 2023) section 3 and algorithm 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_gram_(gram: Tensor, input: Tensor) -> None:
    """Plain form of :func:`spade_fast.ops.linear_gram_`."""
    gram[0] += input.T @ input


def conv2d_gram_(
    gram: Tensor,
    input: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    """Plain form of :func:`spade_fast.ops.conv2d_gram_`: unfold, then multiply, group by group."""
    for group, channels in enumerate(input.chunk(groups, dim=1)):
        patches = F.unfold(channels, kernel_size, dilation=dilation, padding=padding, stride=stride)
        columns = patches.transpose(0, 1).flatten(1)  # [d, images * positions]
        gram[group] += columns @ columns.T


def factor(hessian: Tensor) -> Tensor | None:
    """Upper triangular U [G, d, d] with H^-1 = U^T U: Cholesky, inverse, Cholesky (SparseGPT algorithm 1).

    None where `hessian` [G, d, d] or its computed inverse is not positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(hessian)
    if info.any():
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if info.any() or not upper.isfinite().all() else upper


def count_to_prune(candidates: int, sparsity: float) -> int:
    """round-half-up(candidates * sparsity)."""
    return math.floor(candidates * sparsity + 0.5)


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
