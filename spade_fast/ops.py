"""The native operators ``torch.ops.spade_fast``: typed wrappers, fake kernels, and which backend to use.

Shapes: G groups, d columns (inputs of one group), r rows (outputs of one group).
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Literal, get_args

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


def linear_gram_(gram: Tensor, input: Tensor) -> None:
    """Add X^T X to `gram` in place.

    Parameters
    ----------
    gram
        [1, d, d], float32 or float64, contiguous and symmetric.
    input
        X [samples, d], same dtype and device, any strides. Zero samples add nothing.
    """
    torch.ops.spade_fast.linear_gram_(gram, input)


def conv2d_gram_(
    gram: Tensor,
    input: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    """Add the sum of x x^T over all patches x of `input` to `gram` in place.

    Parameters
    ----------
    gram
        [G, d, d] with d = channels / G * kernel height * kernel width, columns ordered (channel, ky, kx) as in
        ``weight.flatten(1)``; float32 or float64, contiguous and symmetric.
    input
        [images, channels, height, width], same dtype and device, any strides.
    kernel_size, stride, padding, dilation
        As in :func:`torch.nn.functional.conv2d`, (vertical, horizontal); padding is with zeros.
    groups
        Number of groups G.
    """
    torch.ops.spade_fast.conv2d_gram_(gram, input, kernel_size, stride, padding, dilation, groups)


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
    sparse, mask, loss = torch.ops.spade_fast.prune_columns(weight, factor, sparsity, block_size, published_count)
    return sparse, mask, loss


def _fake_gram_(gram: Tensor, input: Tensor, *geometry: object) -> None:
    return None


def _fake_prune_columns(
    weight: Tensor, factor: Tensor, sparsity: float, block_size: int, published_count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sparse = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return sparse, torch.empty_like(sparse, dtype=torch.bool), weight.new_empty((), dtype=torch.float64)


if _C is not None:
    torch.library.register_fake("spade_fast::linear_gram_", _fake_gram_)
    torch.library.register_fake("spade_fast::conv2d_gram_", _fake_gram_)
    torch.library.register_fake("spade_fast::prune_columns", _fake_prune_columns)
