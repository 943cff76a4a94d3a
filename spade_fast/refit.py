"""The best weights under a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast import ops

# Numbers in the systems that are refitted at a time, unless a single one has more (32 MiB, about three such at once).
_REFIT_ELEMENTS = 1 << 22


def refit_kept(
    weight: Tensor, hessian: Tensor, mask: Tensor, *, inverse: Tensor | None = None, native: bool
) -> tuple[Tensor, Tensor]:
    """The weights on `mask` that minimize tr((W - Q) H (W - Q)^T) (SparseGPT section 3.1).

    With K the kept and P the pruned columns of a row and G = H^-1, the optimum is q_K = w_K + H_KK^-1 H_KP w_P, or just
    as well q_K = w_K - G_KP G_PP^-1 w_P: each row takes the smaller system. The error of the second grows with the
    condition of H. Where it leaves a larger residual than a stable solution may have, the row takes the first.

    Parameters
    ----------
    weight
        [G, r, d], float64.
    hessian
        [G, d, d], float64, positive definite.
    mask
        [G, r, d] bool, True where kept.
    inverse
        Of the Hessian, where it is known.
    native
        Whether the native operator may solve the systems, where it has been built for the device.

    Returns
    -------
    weight, loss
        [G, r, d], and half of the minimum as a scalar. NaN where a system has no Cholesky factor.
    """
    solve_subsets = ops.solve_subsets if native and weight.device.type == "cpu" else _solve_subsets
    sparse = weight.masked_fill(~mask, 0)
    direct = mask.sum(2, keepdim=True) * 2 <= mask.shape[2]
    if not direct.all():
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(hessian).L) if inverse is None else inverse
        change = solve_subsets(inverse, ~mask & ~direct, weight) @ inverse
        refitted = sparse - change.masked_fill(~mask | direct, 0)
        direct |= ~_is_solved(weight, refitted, hessian, mask)
        sparse = sparse.where(direct, refitted)
    sparse += solve_subsets(hessian, mask & direct, (weight - sparse) @ hessian)
    change = weight - sparse
    return sparse, ((change @ hessian) * change).sum() / 2


def _is_solved(weight: Tensor, sparse: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Whether ((W - Q) H)_K of a row is rounding, [G, r, 1]: what a stable solution of each equation may leave."""
    scale = hessian.diagonal(dim1=1, dim2=2).sqrt()[:, None]  # no unit of an input hides the others
    size = scale * ((weight.abs() + sparse.abs()) * scale).sum(2, keepdim=True)
    limit = hessian.shape[1] * torch.finfo(hessian.dtype).eps * size
    return ((((weight - sparse) @ hessian).abs() <= limit) | ~mask).all(2, keepdim=True)


def _solve_subsets(matrix: Tensor, subsets: Tensor, right_sides: Tensor) -> Tensor:
    """:func:`spade_fast.ops.solve_subsets` on any device."""
    rows_of_group, size = subsets.shape[1:]
    subsets, right_sides = subsets.reshape(-1, size), right_sides.reshape(-1, size)
    solutions = torch.zeros_like(right_sides)
    sizes, order = subsets.sum(1).sort(descending=True)
    widths = sizes.tolist()
    begin = 0
    while begin < len(widths) and widths[begin] > 0:
        # Rows of like counts are solved in one batch, smaller systems padded with the identity.
        width, end = widths[begin], begin + 1
        while end < len(widths) and widths[end] > 0.9 * width and (end + 1 - begin) * width**2 <= _REFIT_ELEMENTS:
            end += 1
        rows = order[begin:end]
        begin = end
        columns = subsets[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :width]  # the subset, padding
        inside = subsets[rows].gather(1, columns)
        groups = (rows // rows_of_group)[:, None, None]
        systems = matrix[groups, columns[:, :, None], columns[:, None, :]]
        systems.masked_fill_(~(inside[:, :, None] & inside[:, None, :]), 0)
        systems.diagonal(dim1=1, dim2=2).add_(~inside)
        right = right_sides[rows].gather(1, columns).masked_fill_(~inside, 0)
        step = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky_ex(systems).L)
        solutions[rows] = solutions[rows].scatter_add(1, columns, step[:, :, 0])
    return solutions.view(len(matrix), rows_of_group, size)
