"""The exact solver's part that knows no sparsity: in which order the weights of a layer go, and at what loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spade_fast import ops, reference
from spade_fast.errors import InvalidInputError

BlockLayout = Literal["taps", "channels"]

# Columns of a block on a GPU, as in csrc/cuda/elimination.h.
_LARGEST_ON_GPU = 1024
# Multiply-adds of a call of the native operator on a CPU, unless a row for each thread takes more.
_PIECE = 1e11


class Blocks(NamedTuple):
    """Which columns of a layer are pruned together.

    Attributes
    ----------
    of_column
        int64 [d], the block that each column belongs to.
    columns
        int64 [blocks, size], the columns of each; d where a block has fewer.
    in_order
        Whether these are all columns as they come.
    """

    of_column: Tensor
    columns: Tensor
    in_order: bool

    @property
    def size(self) -> int:
        return self.columns.shape[1]

    @staticmethod
    def of(shape: Sequence[int], size: int, layout: BlockLayout, device: torch.device) -> Blocks:
        """Blocks of `size` columns of a weight of that shape, of which the last ones may have fewer.

        Parameters
        ----------
        shape
            [rows, ...]; of a convolution [rows, channels, *taps].
        size
            Columns of a block, where there are as many.
        layout
            "taps": neighbours in the order of ``weight.flatten(1)``, so with as many as it has taps one channel's.
            "channels": neighbouring channels at one tap.
        device
            Of the result.
        """
        channels, taps = shape[1], torch.Size(shape[2:]).numel()
        column = torch.arange(channels * taps, device=device)
        if layout == "taps":
            size = min(size, len(column))
            count = -(-len(column) // size)
            of_column, place = column // size, column % size
        else:
            size = min(size, channels)
            of_tap = -(-channels // size)
            count = taps * of_tap
            channel, tap = column // taps, column % taps
            of_column, place = tap * of_tap + channel // size, channel % size
        columns = column.new_full((count, size), len(column))
        columns[of_column, place] = column
        in_order = count * size == len(column) and (layout == "taps" or taps == 1)
        return Blocks(of_column, columns, in_order)

    def gather(self, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [G, r, d] and inverse [G, d, d] with blocks side by side; columns that are no column touch none."""
        if self.in_order:
            return weight, inverse
        columns = self.columns.flatten()
        absent = columns == len(self.of_column)
        at = columns.masked_fill(absent, 0)
        inverse = inverse[:, at[:, None], at].masked_fill(absent | absent[:, None], 0)
        inverse.diagonal(dim1=1, dim2=2).masked_fill_(absent, 1)
        return weight[:, :, at].masked_fill(absent, 0), inverse


@dataclass(frozen=True)
class Elimination:
    """How the rows of a layer are pruned to the end: every sparsity is a part of it.

    Attributes
    ----------
    order
        int32 [G, r, blocks], which block of a row goes at each step.
    losses
        float64, same shape: what each step adds to the layer's loss. Not monotone within a row.
    blocks
        Which columns these are.
    """

    order: Tensor
    losses: Tensor
    blocks: Blocks

    @property
    def failed(self) -> Tensor:
        """Scalar bool: whether some pivot was rounding noise."""
        return self.losses.isnan().any()

    def count(self, sparsity: float, mask_rule: ops.MaskRule) -> int:
        """How many blocks of all rows go."""
        return reference.blocks_to_prune(self.losses.numel(), sparsity, mask_rule == "published")

    def steps(self, count: int) -> Tensor:
        """int64 [G, r], how far each row is pruned: as often as its losses are among the `count` least of all rows'.

        Of equal losses those of the first row's first steps.
        """
        if count == 0:
            return self.losses.new_zeros(self.losses.shape[:2], dtype=torch.int64)
        threshold = self.losses.flatten().kthvalue(count).values
        below, equal = self.losses < threshold, self.losses == threshold
        among_equal = equal.flatten().cumsum(0).view_as(equal)
        return (below | (equal & (among_equal <= count - below.sum()))).sum(2)

    def loss(self, steps: Tensor) -> Tensor:
        """Scalar: what so many steps of the rows [G, r] cost."""
        done = torch.arange(self.losses.shape[2], device=steps.device) < steps[:, :, None]
        return self.losses.where(done, 0).sum()

    def mask(self, steps: Tensor) -> Tensor:
        """bool [G, r, d], True where a weight is kept after so many steps of the rows [G, r]."""
        left = torch.arange(self.losses.shape[2], device=steps.device) >= steps[:, :, None]
        kept = torch.empty_like(left).scatter_(2, self.order.long(), left)
        return kept[:, :, self.blocks.of_column]


def eliminate_layers(
    weights: Sequence[Tensor], inverses: Sequence[Tensor], blocks: Sequence[Blocks], native: bool
) -> list[Elimination]:
    """Eliminate the rows of many layers, natively side by side.

    Rows and inverses are scaled by powers of two, to largest entries of about 1: no loss overflows, what underflows is
    as good as zero beside the row's others, and no other bit changes.

    Parameters
    ----------
    weights
        [G, r, d] of each.
    inverses
        Inverse Hessians [G, d, d], of any dtype: they are rounded to the weight's.
    blocks
        Which columns are pruned together.
    native
        Whether by :func:`spade_fast.ops.elimination_orders`, else by the reference.
    """
    rows, matrices, units = [], [], []
    for weight, inverse, each in zip(weights, inverses, blocks, strict=True):
        of_row = _power_of_two(weight.abs().amax(2, keepdim=True).double())
        of_inverse = _power_of_two(inverse.diagonal(dim1=1, dim2=2).amax(1)[:, None, None].double())
        units.append(of_row**2 / of_inverse)
        row, matrix = each.gather((weight / of_row).to(weight.dtype), (inverse / of_inverse).to(weight.dtype))
        rows.append(row)
        matrices.append(matrix)
    sizes = [each.size for each in blocks]
    if not native:
        found = [*map(reference.elimination_order, rows, matrices, sizes)]
    elif rows[0].device.type == "cpu":
        found = _in_pieces(rows, matrices, sizes)
    else:
        torch.cuda.empty_cache()  # workspaces are made of what nobody has, not torch's allocator either
        found = [*zip(*ops.elimination_orders(rows, matrices, sizes), strict=True)]
    return [
        Elimination(order, losses.double() * unit, each)
        for (order, losses), unit, each in zip(found, units, blocks, strict=True)
    ]


def check_size(blocks: Blocks, device: torch.device, native: bool) -> None:
    """Refuse blocks that the native operator cannot prune there."""
    if native and device.type == "cuda" and blocks.size > _LARGEST_ON_GPU:
        raise InvalidInputError(
            f"blocks of {blocks.size} columns are too large for a GPU, which takes {_LARGEST_ON_GPU}: make block_size "
            "smaller, or solve it on the CPU"
        )


def _power_of_two(values: Tensor) -> Tensor:
    """That of about the same size; 1 for 0 and what is not finite."""
    power = torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent)
    return power.where((values > 0) & values.isfinite(), 1)


def _in_pieces(rows: Sequence[Tensor], matrices: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """As the operator, in calls of a second or so, between which Ctrl-C is heard."""
    found = [
        (
            row.new_empty((*row.shape[:2], row.shape[2] // size), dtype=torch.int32),
            row.new_empty((*row.shape[:2], row.shape[2] // size)),
        )
        for row, size in zip(rows, sizes, strict=True)
    ]
    piece: list[tuple[int, slice]] = []  # layers and which rows of their groups
    room = _PIECE

    def run() -> None:
        layers = [layer for layer, _ in piece]
        orders, losses = ops.elimination_orders(
            [rows[layer][:, some] for layer, some in piece],
            [matrices[layer] for layer in layers],
            [sizes[layer] for layer in layers],
        )
        for (layer, some), order, loss in zip(piece, orders, losses, strict=True):
            found[layer][0][:, some] = order
            found[layer][1][:, some] = loss
        piece.clear()

    # The longest rows first, as within a call.
    for layer in sorted(range(len(rows)), key=lambda layer: -rows[layer].shape[2]):
        groups, count, columns = rows[layer].shape
        cost = groups * columns**3 / 6  # of a row of every group
        begin = 0
        while begin < count:
            taken = min(count - begin, max(torch.get_num_threads(), int(room / cost)))
            piece.append((layer, slice(begin, begin + taken)))
            begin += taken
            room -= taken * cost
            if room < cost:
                run()
                room = _PIECE
    if piece:
        run()
    return found
