"""The native operators ``torch.ops.spade_fast``: typed wrappers, fake kernels, and which backend to use.

Shapes: G groups, d columns (inputs of one group), r rows (outputs of one group).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from spade_fast.errors import InvalidInputError

Backend = Literal["auto", "native", "reference"]
MaskRule = Literal["exact_count", "published"]

try:
    _C: ModuleType | None = importlib.import_module("spade_fast._C")
except ModuleNotFoundError:
    _C = None


def native_devices() -> frozenset[str]:
    """Device types that this build of the extension has kernels for; empty where it was not built."""
    if _C is None:
        return frozenset()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(key.lower() for key in ("CPU", "CUDA") if has_kernel("spade_fast::prune_columns", key))


def resolve_backend(backend: Backend, device: torch.device) -> Literal["native", "reference"]:
    """The implementation to run on `device`.

    "auto" means native; where there is no native kernel it warns and takes the slow reference.

    Raises
    ------
    InvalidInputError
        For "native" where this build has no kernel for the device, and for unknown names.
    """
    if backend not in get_args(Backend):
        raise InvalidInputError(f"backend={backend!r} is unknown: choose one of {', '.join(get_args(Backend))}")
    if backend == "reference":
        return "reference"
    if device.type in native_devices():
        return "native"
    missing = (
        "the native extension is not built (pip install --no-build-isolation -e .)"
        if _C is None
        else f"the native extension has no kernels for {device.type!r} devices"
    )
    if backend == "native":
        raise InvalidInputError(f"backend='native': {missing}; backend='reference' runs anywhere, slowly")
    warnings.warn(f"{missing}: using the much slower backend='reference'", stacklevel=3)
    return "reference"


class Geometry(NamedTuple):
    """How a convolution reads its input, as in :func:`torch.nn.functional.conv2d`; pairs are (vertical, horizontal)."""

    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def columns(self, channels: int) -> int:
        """Columns of one group's patches, in the order (channel, ky, kx) of ``weight.flatten(1)``."""
        return channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of that size."""
        reach = [step * (taps - 1) + 1 for step, taps in zip(self.dilation, self.kernel_size, strict=True)]
        padded = height + 2 * self.padding[0], width + 2 * self.padding[1]
        return (padded[0] - reach[0]) // self.stride[0] + 1, (padded[1] - reach[1]) // self.stride[1] + 1


def conv2d_sums_shape(size: tuple[int, int, int], geometry: Geometry) -> list[int]:
    """Shape of the sums from which :func:`conv2d_gram` makes the Gram matrix.

    Parameters
    ----------
    size
        Channels, height and width of the inputs.
    geometry
        The convolution; a linear layer is the 1x1 convolution of [samples, d, 1, 1].
    """
    shape: list[int] = torch.ops.spade_fast.conv2d_sums_shape(size, *geometry)
    return shape


def add_conv2d_sums_(sums: Tensor, input: Tensor, geometry: Geometry, tf32: bool = False) -> None:
    """Add a batch of layer inputs to the sums in place.

    Parameters
    ----------
    sums
        float32 or float64, contiguous, of the shape that :func:`conv2d_sums_shape` gives; zeros at first.
    input
        [images, channels, height, width], on the same device, any strides; channels_last is the fastest. Of the dtype
        of the sums, or bfloat16 with float32 sums. Zero images add nothing.
    geometry
        The convolution.
    tf32
        Round float32 inputs to TF32, ten bits of mantissa, ties away from zero, before they are multiplied.
    """
    torch.ops.spade_fast.add_conv2d_sums_(sums, input, *geometry, tf32)


def conv2d_gram(sums: Tensor, size: tuple[int, int, int], geometry: Geometry) -> Tensor:
    """The Gram matrix of all patches that were summed: the sum of x x^T, [G, d, d], exactly symmetric.

    Parameters
    ----------
    sums
        As :func:`add_conv2d_sums_` left them; not changed.
    size, geometry
        As in :func:`conv2d_sums_shape`.
    """
    gram: Tensor = torch.ops.spade_fast.conv2d_gram(sums, size, *geometry)
    return gram


def factor_hessian(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Factor H + damping * mean(diag H) * I = M^T M, by one Cholesky factorization from the last row upwards.

    Parameters
    ----------
    hessian
        [G, d, d], float32 or float64, symmetric. Only the lower triangle is factored.
    damping
        Share of the mean diagonal, of each group by itself.

    Returns
    -------
    factor, error
        Lower triangular M [G, d, d]; float64 [G], the backward error along the vector of ones in units of
        d * eps * ||H||, infinite where there is no factor, or only one with an M_ii^2 that is rounding noise: at most
        10 * sqrt(d) * eps times the damped H_ii.
    """
    factor, error = torch.ops.spade_fast.factor_hessian(hessian, damping)
    return factor, error


def prune_columns(
    weight: Tensor, factor: Tensor, sparsity: float, block_size: int, published_count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune column by column with OBS error propagation (FastSPADE; SPADE section 3, SparseGPT eq. 4 and 5).

    Parameters
    ----------
    weight
        [G, r, d], float32 or float64.
    factor
        Lower triangular M [G, d, d] with H = M^T M, same dtype. What lies above its diagonal is ignored.
    sparsity
        Share of each block of columns to prune, 0..1; one threshold over all groups and rows.
    block_size
        Columns that share one threshold, scored before any error propagates among them.
    published_count
        Prune every score up to and including the int(n * sparsity)-th smallest (one more than asked for, and
        all ties), instead of exactly round-half-up(n * sparsity), ties to the lowest (row, column).

    Returns
    -------
    weight, mask, loss
        [G, r, d] sparse weight; [G, r, d] bool, True where kept; float64 scalar, the sum of score / 2 over
        pruned weights, equal to half of tr(D H D^T) for the change D of the weight.
    """
    sparse, mask, loss = torch.ops.spade_fast.prune_columns(
        weight.detach(), factor, sparsity, block_size, published_count
    )
    return sparse, mask, loss


def factor_hessians(hessians: Sequence[Tensor], damping: float) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`factor_hessian` of many layers, side by side: lists of factors and of errors."""
    factors, errors = torch.ops.spade_fast.factor_hessians(hessians, damping)
    return factors, errors


def prune_layers(
    weights: Sequence[Tensor],
    factors: Sequence[Tensor],
    sparsities: Sequence[float],
    block_sizes: Sequence[int],
    published_count: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """:func:`prune_columns` of many layers, side by side: lists of weights and masks, and losses [layers]."""
    sparse, masks, losses = torch.ops.spade_fast.prune_layers(
        weights, factors, sparsities, block_sizes, published_count
    )
    return sparse, masks, losses


def elimination_orders(
    weights: Sequence[Tensor], inverses: Sequence[Tensor], block_sizes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The order in which optimal brain compression prunes each row, of many layers (OBC; Frantar et al. 2022).

    A row is pruned to the end, block by block, each time the block whose removal costs least; the kept weights make up
    for it before the next is chosen. Of blocks that cost the same the one at the lowest position goes.

    Parameters
    ----------
    weights
        [G, r, d] of each layer, float32 or float64.
    inverses
        Inverse Hessians [G, d, d], same dtypes, symmetric.
    block_sizes
        Columns that are pruned at once; each divides its layer's d.

    Returns
    -------
    orders, losses
        Of each layer int32 [G, r, d / block_size], which block goes at each step; and in the weight's dtype what that
        adds to half of the row's w H w^T. From a pivot on that is rounding noise, or a weight that is not finite, they
        are -1 and NaN: pivots are no more than 10 * sqrt(d) * eps times what the inverse's diagonal was there.
    """
    orders, losses = torch.ops.spade_fast.elimination_orders(
        [weight.detach() for weight in weights], inverses, block_sizes
    )
    return orders, losses


def solve_subsets(matrix: Tensor, subsets: Tensor, right_sides: Tensor) -> Tensor:
    """For each right side b and its subset S of the columns the x with matrix[S, S] x[S] = b[S], zero outside S.

    On a CPU only.

    Parameters
    ----------
    matrix
        [G, d, d], float32 or float64, symmetric; the lower triangles are read.
    subsets
        bool [G, systems, d].
    right_sides
        [G, systems, d], dtype of the matrix.

    Returns
    -------
    Tensor
        [G, systems, d]; NaN on S where matrix[S, S] has no Cholesky factor.
    """
    solutions: Tensor = torch.ops.spade_fast.solve_subsets(matrix, subsets, right_sides)
    return solutions


def render_views(
    image: Tensor,
    row_starts: Tensor,
    row_weights: Tensor,
    column_starts: Tensor,
    column_weights: Tensor,
    colours: Tensor,
) -> Tensor:
    """Resize by banded weights along both axes, then change brightness and hue: one image, many views.

    Along an axis, output i of a view is the sum over t of ``weights[view, t, i] * input[starts[view, i] + t]``.

    Parameters
    ----------
    image
        [3, H, W], float32 or float64, any strides.
    row_starts, column_starts
        int64 [views, h] and [views, w]; every band lies inside the image.
    row_weights, column_weights
        [views, taps, h] and [views, taps, w], dtype of the image, contiguous.
    colours
        [views, 3], dtype of the image: a factor of all channels, which are then clamped to 0..1; the turn of the hue,
        1 being the whole circle; a second factor, and clamp.

    Returns
    -------
    Tensor
        [views, 3, h, w].
    """
    views: Tensor = torch.ops.spade_fast.render_views(
        image, row_starts, row_weights, column_starts, column_weights, colours
    )
    return views


# Fake kernels trust arguments to fit, and refuse only those of which they could tell no shape.


def _check_one_device(*tensors: Tensor) -> None:
    """Without this a tensor on the meta device would make results of memory that nobody has written."""
    if not tensors or any(tensor is None for tensor in tensors):  # the dispatcher lets None through
        raise RuntimeError("a tensor is missing")
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {' and '.join(sorted(devices))}")


def _check_dimensions(count: int, *tensors: Tensor) -> None:
    if any(tensor.dim() != count for tensor in tensors):
        shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors)
        raise RuntimeError(f"tensors must have {count} dimensions, got shapes {shapes}")


def _fake_add_conv2d_sums_(sums: Tensor, input: Tensor, *geometry: Any) -> None:
    _check_one_device(sums, input)


def _fake_conv2d_gram(sums: Tensor, size: Sequence[int], *geometry: Any) -> Tensor:
    _check_one_device(sums)
    torch.ops.spade_fast.conv2d_sums_shape(size, *geometry)  # refuses what is no geometry
    convolution = Geometry(*geometry)
    columns = convolution.columns(size[0])
    return sums.new_empty(convolution.groups, columns, columns)


def _fake_factor_hessian(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    _check_one_device(hessian)
    _check_dimensions(3, hessian)
    factor = torch.empty_like(hessian, memory_format=torch.contiguous_format)
    return factor, hessian.new_empty(hessian.shape[0], dtype=torch.float64)


def _fake_prune_columns(
    weight: Tensor, factor: Tensor, sparsity: float, block_size: int, published_count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_one_device(weight, factor)
    _check_dimensions(3, weight)
    sparse = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return sparse, torch.empty_like(sparse, dtype=torch.bool), weight.new_empty((), dtype=torch.float64)


def _fake_factor_hessians(hessians: Sequence[Tensor], damping: float) -> tuple[list[Tensor], list[Tensor]]:
    _check_one_device(*hessians)
    pairs = [_fake_factor_hessian(hessian, damping) for hessian in hessians]
    return [factor for factor, _ in pairs], [error for _, error in pairs]


def _fake_prune_layers(
    weights: Sequence[Tensor],
    factors: Sequence[Tensor],
    sparsities: Sequence[float],
    block_sizes: Sequence[int],
    published_count: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    _check_one_device(*weights, *factors)
    _check_dimensions(3, *weights)
    sparse = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    masks = [torch.empty_like(weight, dtype=torch.bool) for weight in sparse]
    return sparse, masks, (*weights, *factors)[0].new_empty(len(weights), dtype=torch.float64)


def _fake_elimination_orders(
    weights: Sequence[Tensor], inverses: Sequence[Tensor], block_sizes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    _check_one_device(*weights, *inverses)
    _check_dimensions(3, *weights)
    if 0 in block_sizes:
        raise RuntimeError("block_size must be at least 1, got 0")
    losses = [
        weight.new_empty(*weight.shape[:2], weight.shape[2] // size)
        for weight, size in zip(weights, block_sizes, strict=True)
    ]
    return [torch.empty_like(each, dtype=torch.int32) for each in losses], losses


def _fake_solve_subsets(matrix: Tensor, subsets: Tensor, right_sides: Tensor) -> Tensor:
    _check_one_device(matrix, subsets, right_sides)
    return torch.empty_like(right_sides, memory_format=torch.contiguous_format)


def _fake_render_views(
    image: Tensor,
    row_starts: Tensor,
    row_weights: Tensor,
    column_starts: Tensor,
    column_weights: Tensor,
    colours: Tensor,
) -> Tensor:
    _check_one_device(image, row_starts, row_weights, column_starts, column_weights, colours)
    _check_dimensions(3, image, row_weights, column_weights)
    _check_dimensions(2, colours)
    return image.new_empty(colours.shape[0], 3, row_weights.shape[2], column_weights.shape[2])


if _C is not None:
    torch.library.register_fake("spade_fast::add_conv2d_sums_", _fake_add_conv2d_sums_)
    torch.library.register_fake("spade_fast::conv2d_gram", _fake_conv2d_gram)
    torch.library.register_fake("spade_fast::factor_hessian", _fake_factor_hessian)
    torch.library.register_fake("spade_fast::prune_columns", _fake_prune_columns)
    torch.library.register_fake("spade_fast::factor_hessians", _fake_factor_hessians)
    torch.library.register_fake("spade_fast::prune_layers", _fake_prune_layers)
    torch.library.register_fake("spade_fast::elimination_orders", _fake_elimination_orders)
    torch.library.register_fake("spade_fast::solve_subsets", _fake_solve_subsets)
    torch.library.register_fake("spade_fast::render_views", _fake_render_views)
