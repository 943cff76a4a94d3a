"""Prunable layers, and the Gram matrices of what really flows into them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MethodType
from typing import Any, Literal, NamedTuple, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from spade_fast import ops, reference
from spade_fast.autocast import without_autocast
from spade_fast.errors import InvalidInputError, first_line

#: What layer inputs are summed in: see `hessian_dtype` of :func:`spade_fast.trace`.
HessianDtype: TypeAlias = torch.dtype | Literal["tf32"]

#: Kinds of layers that are pruned. Subclasses count: what matters is the call that their weight ends up in.
PRUNABLE = (nn.Linear, nn.Conv2d)
_SPARSITY_TOLERANCE = 0.02
# Positions that a native product wants in a row: smaller inputs are gathered first.
_RUN = 256
# Numbers of the inputs that are gathered, at most.
_GATHERED = 1 << 22


def prunable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """All Linear and Conv2d layers with a plain weight, by module name, in the order in which the model lists them."""
    return {name: module for name, module in model.named_modules() if _is_prunable(module)}


def unsupported_layers(model: nn.Module) -> dict[str, str]:
    """Modules with weights of two or more dimensions that cannot be pruned, by name: what they are."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PRUNABLE):
            if not _is_prunable(module):
                found[name] = f"{type(module).__name__} with a computed weight"
        elif isinstance(module, ParametrizationList):
            continue  # holds what a layer's weight is computed from; that layer is listed itself
        elif matrices := [key for key, value in module.named_parameters(recurse=False) if _is_matrix(value)]:
            # Of a module that holds other layers, they are named, since those layers may well be pruned.
            kind = type(module).__name__
            found[name] = f"{kind}.{', '.join(matrices)}" if next(module.children(), None) else kind
        elif isinstance(getattr(module, "weight", None), MethodType):  # torch's quantized layers
            found[name] = f"quantized {type(module).__name__}"
    return found


def _is_matrix(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return True
    return sum(size > 1 for size in parameter.shape) >= 2  # unlike the scale of each channel, [channels, 1, 1]


def _is_prunable(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    # A parametrized or weight-normalized layer computes its weight anew at each call.
    return isinstance(module, PRUNABLE) and isinstance(module._parameters.get("weight"), nn.Parameter)


def is_depthwise(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether each output of a convolution sees one input channel only."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.weight.shape[1] == 1


def mask_block_size(weight: Tensor, sparsity: float = 0.0) -> int:
    """Columns that share one threshold: the k * k taps of one channel, 1 for 1x1 convolutions and linears.

    With few rows a block is too small for its target: of two weights, 0.8 is both. As many channels then share a
    threshold as it takes to come within 0.02 of the target and to keep a weight. Target 0 gives the taps alone.
    """
    rows, taps = weight.shape[0], weight.shape[2:].numel()
    block = taps
    while block < weight.shape[1] * taps and not _can_reach(sparsity, rows * block):
        block += taps
    return block


def _can_reach(sparsity: float, candidates: int) -> bool:
    count = reference.count_to_prune(candidates, sparsity)
    return abs(count / candidates - sparsity) <= _SPARSITY_TOLERANCE and (count < candidates or sparsity == 1)


class GramSum:
    """The sum of x x^T over every input x that one weight met.

    Parameters
    ----------
    groups, columns
        Shape of the sum, [groups, columns, columns].
    dtype, device
        Of the sum: float32, or float64 for a float64 model.
    native
        Whether the native operators sum. They keep a form that is quick to add to, and make the matrix at the end.
    tf32
        Whether inputs are rounded to TF32 before they are multiplied; the sum is float32 then.

    Attributes
    ----------
    samples
        Number of inputs summed: output positions of a convolution, rows or tokens of a linear layer.
    """

    def __init__(
        self,
        groups: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        native: bool,
        tf32: bool = False,
    ) -> None:
        self.groups, self.columns = groups, columns
        self.samples = 0
        self._native = native
        self._tf32 = tf32
        self._dtype, self._device = dtype, device
        self._finished: Tensor | None = None
        self._open: tuple[tuple[int, int, int], ops.Geometry, Tensor] | None = None  # size, geometry, sums
        self._gathered: list[Tensor] = []  # for the open sums
        self._images_gathered = 0

    def add(self, images: Tensor, geometry: ops.Geometry) -> None:
        """Add the patches that a convolution sees in `images` [images, channels, height, width]."""
        if images.shape[0] == 0:
            return
        if not (self._native and images.dtype == torch.bfloat16 and self._dtype == torch.float32):
            images = images.to(self._dtype)
        size = (images.shape[1], images.shape[2], images.shape[3])
        outputs = geometry.outputs(*size[1:])
        self.samples += images.shape[0] * outputs[0] * outputs[1]
        if not self._native:
            self._finish(reference.conv2d_gram(_round_to_tf32(images) if self._tf32 else images, geometry))
            return
        if self._open is None or self._open[:2] != (size, geometry):
            self._close()
            self._open = size, geometry, self._zeros(*ops.conv2d_sums_shape(size, geometry))
        wanted = min(_images_wanted(geometry, outputs), max(1, _GATHERED // math.prod(size)))
        if not self._gathered and images.shape[0] >= wanted:
            ops.add_conv2d_sums_(self._open[2], images, geometry, self._tf32)
            return
        self._gathered.append(images.clone())  # the model may write over its maps
        self._images_gathered += images.shape[0]
        if self._images_gathered >= wanted:
            self._add_gathered(self._open[2], geometry)

    def gram(self) -> Tensor:
        """The sum so far, [groups, columns, columns]."""
        self._close()
        if self._finished is None:
            self._finished = self._zeros(self.groups, self.columns, self.columns)
        return self._finished

    def into_hessian(self) -> Tensor:
        """H = (2 / samples) X X^T, [groups, columns, columns], in the memory of the sum, which is empty afterwards."""
        hessian = self.gram().mul_(2 / self.samples)
        self._finished, self.samples = None, 0
        return hessian

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _close(self) -> None:
        if self._open is not None:
            size, geometry, sums = self._open
            self._open = None
            if self._gathered:
                self._add_gathered(sums, geometry)
            self._finish(ops.conv2d_gram(sums, size, geometry))

    def _add_gathered(self, sums: Tensor, geometry: ops.Geometry) -> None:
        ops.add_conv2d_sums_(sums, torch.cat(self._gathered), geometry, self._tf32)
        self._gathered.clear()
        self._images_gathered = 0

    def _finish(self, gram: Tensor) -> None:
        self._finished = gram if self._finished is None else self._finished.add_(gram)


def _round_to_tf32(values: Tensor) -> Tensor:
    """float32 values with ten bits of mantissa, to nearest, ties away from zero: as tensor cores are to read them."""
    rounded = ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(values.isnan(), values, rounded)  # the carry could make a number of NaN


def _images_wanted(geometry: ops.Geometry, outputs: tuple[int, int]) -> int:
    """How many images make a native product worth its while."""
    run = outputs[1] if math.prod(geometry.kernel_size) > 1 else outputs[0] * outputs[1]
    return math.ceil(_RUN / max(1, run))


class InputRecorder(TorchFunctionMode):
    """Sums the Gram matrices of the inputs of chosen weights while a model runs.

    Used as a context manager around forward passes. It watches the calls of ``linear`` and ``conv2d`` themselves,
    not the modules, so it needs no hooks and sees what the weight was really applied to: padding that a subclass
    adds before the convolution, a module that is called twice, a weight that two modules share.

    Parameters
    ----------
    weights
        The parameters to watch, by a name for messages.
    unless_first
        Names of those to leave out if theirs is the first ``linear`` or ``conv2d`` call of all.
    backend, hessian_dtype, positions_per_column, seed
        As in :func:`spade_fast.trace`.

    Attributes
    ----------
    sums
        What was summed, by name.
    left_out
        Name of the layer that was left out for being first, None if none was.
    share
        Share of all inputs that the next pass holds: it takes that share of the positions that may be taken.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        unless_first: Collection[str] = (),
        backend: ops.Backend = "auto",
        hessian_dtype: HessianDtype | None = None,
        positions_per_column: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sums: dict[str, GramSum] = {}
        self.left_out: str | None = None
        self._names = {id(weight): name for name, weight in weights.items()}
        self._unless_first = frozenset(unless_first)
        self._called = False
        self.share = 1.0
        self._backend = backend
        self._dtype = hessian_dtype
        self._positions_per_column = positions_per_column
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)  # first, so that a call that is wrong in itself fails as it would anyway
        if func is F.linear or func is F.conv2d:
            with torch._C.DisableTorchFunction():  # what is done here is no business of other modes
                self._record(_linear_call if func is F.linear else conv2d_call, args, kwargs)
        return result

    @without_autocast
    def _record(self, parse: Callable[..., Call], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = parse(*args, **kwargs)
        name = self._names.get(id(call.weight))
        if not self._called and name in self._unless_first:
            self.left_out = name
        self._called = True
        if name is None or name == self.left_out:
            return
        device = call.images.device
        images, geometry = call.images.detach(), call.geometry
        if self._dtype == torch.bfloat16:
            images = images.to(torch.bfloat16)  # once, before all products: errors of single entries make H indefinite
        double = self._dtype == torch.float64 or (self._dtype is None and images.dtype == torch.float64)
        dtype = torch.float64 if double else torch.float32
        groups, columns = call.geometry.groups, call.geometry.columns(call.images.shape[1])
        total = self.sums.get(name)
        if total is None:
            native = ops.resolve_backend(self._backend, device) == "native"
            total = self.sums[name] = GramSum(groups, columns, dtype, device, native, self._dtype == "tf32")
        elif (total.groups, total.columns) != (groups, columns):
            raise InvalidInputError(
                f"layer {name!r} is called with {groups} groups and {columns} columns, but was called with "
                f"{total.groups} and {total.columns} before: leave it out of `layers`"
            )
        if self._positions_per_column is not None:
            most = math.ceil(min(self._positions_per_column * columns * self.share, sys.maxsize))
            images, geometry = sample_patches(images, geometry, most, self._generator)
        total.add(images, geometry)


class Call(NamedTuple):
    """One use of a weight, as the convolution that it is."""

    weight: Tensor
    images: Tensor  # [images, channels, height, width]
    geometry: ops.Geometry


def _linear_call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:  # noqa: ARG001
    rows = input.reshape(-1, input.shape[-1])
    return Call(weight, rows[:, :, None, None], ops.Geometry())


def conv2d_call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Call:
    kernel = (weight.shape[2], weight.shape[3])
    images = input if input.dim() == 4 else input[None]
    if padding == "same":
        extra = [step * (size - 1) for step, size in zip(_pair(dilation), kernel, strict=True)]
        images = F.pad(images, (extra[1] // 2, -(-extra[1] // 2), extra[0] // 2, -(-extra[0] // 2)))
    zeros = (0, 0) if isinstance(padding, str) else _pair(padding)
    return Call(weight, images, ops.Geometry(kernel, _pair(stride), zeros, _pair(dilation), groups))


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values[0], values[-1]


def sample_patches(
    images: Tensor, geometry: ops.Geometry, count: int, generator: torch.Generator
) -> tuple[Tensor, ops.Geometry]:
    """The patches at `count` random output positions, spread evenly, none twice, as inputs of a 1x1 convolution.

    Where there are no more positions than that, the images and the geometry as they are.

    Parameters
    ----------
    images
        [n, channels, height, width].
    geometry
        How they are convolved.
    count
        Positions wanted, of all images together.
    generator
        On the CPU.

    Returns
    -------
    images, geometry
        [count, channels * taps, 1, 1] in the column order of the layer's Gram matrix, and its convolution.
    """
    height, width = geometry.outputs(images.shape[2], images.shape[3])
    if images.shape[0] * height * width <= count:
        return images, geometry
    chosen = moved(_choose(images.shape[0] * height * width, count, generator), images.device)
    image, y, x = chosen // (height * width), chosen // width % height, chosen % width
    rows, columns = (
        start[:, None] * geometry.stride[axis]
        + torch.arange(geometry.kernel_size[axis], device=images.device) * geometry.dilation[axis]
        - geometry.padding[axis]
        for axis, start in enumerate((y, x))
    )
    down, right = rows.clamp(0, images.shape[2] - 1), columns.clamp(0, images.shape[3] - 1)
    maps = images.permute(0, 2, 3, 1)
    patches = maps[image[:, None, None], down[:, :, None], right[:, None, :]]  # [count, ky, kx, channels]
    outside = (rows != down)[:, :, None] | (columns != right)[:, None, :]
    patches.masked_fill_(outside[..., None], 0)
    samples = patches.permute(0, 3, 1, 2).reshape(count, -1)
    return samples[:, :, None, None], ops.Geometry(groups=geometry.groups)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; the host waits for nothing that a GPU has yet to do."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _choose(population: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the numbers below `population`, none twice: one from each of `count` stretches, turned at random."""
    bounds = torch.arange(count + 1) * population // count
    within = torch.rand(count, generator=generator, dtype=torch.float64) * bounds.diff()
    turn = torch.randint(population, (1,), generator=generator)  # else numbers in shorter stretches were likelier
    return (bounds[:-1] + within.long() + turn) % population


def hessian(layer: nn.Module, inputs: Tensor, *, backend: ops.Backend = "auto") -> Tensor:
    """Hessian of a layer's squared output error for one batch of its inputs (SPADE section 3, SparseGPT eq. 1).

    Parameters
    ----------
    layer
        An ``nn.Linear`` or ``nn.Conv2d``, or a subclass that applies its weight through
        ``torch.nn.functional``. It is run once on `inputs`.
    inputs
        What the layer is called with: [..., d] or [images, channels, height, width]. Each row, token or output
        position is one sample.
    backend
        "auto" (native, or with a warning the reference), "native" or "reference".

    Returns
    -------
    Tensor
        H = (2 / samples) X X^T, [groups, d, d], with d = in channels / groups * kernel height * kernel width in
        the column order of ``weight.flatten(1)``. float32, or float64 for float64 inputs.

    Raises
    ------
    InvalidInputError
        If the layer is of another kind, or cannot be run on the inputs, or they are empty, not floating point or not
        finite.
    """
    if not _is_prunable(layer):
        raise InvalidInputError(
            f"a Hessian is defined for Linear and Conv2d layers with a plain weight, got {type(layer).__name__}"
        )
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.numel() == 0:
        got = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InvalidInputError(f"layer inputs must be a non-empty floating point tensor, got {got}")
    if inputs.layout != torch.strided or inputs.is_meta or layer.weight.is_meta:
        raise InvalidInputError("layer and inputs must hold their values: not sparse, and not on the meta device")
    if not inputs.isfinite().all():
        raise InvalidInputError("layer inputs hold NaN or infinite values: clean them before making a Hessian")
    recorder = InputRecorder({"layer": layer.weight}, backend=backend)
    try:
        with torch.no_grad(), recorder:
            layer(inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InvalidInputError(
            f"{type(layer).__name__} cannot be run on {inputs.dtype} {list(inputs.shape)} on {inputs.device} "
            f"({first_line(error)})"
        ) from error
    if "layer" not in recorder.sums:
        raise InvalidInputError(
            f"{type(layer).__name__} does not apply its weight through torch.nn.functional as it is "
            "(a custom forward?), so its inputs cannot be seen"
        )
    return recorder.sums["layer"].into_hessian()
