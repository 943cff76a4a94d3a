"""Prunable layers, and the Gram matrices of what really flows into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from spade_fast import ops, reference
from spade_fast.errors import InvalidInputError

#: Kinds of layers that are pruned. Subclasses count: what matters is the call that their weight ends up in.
PRUNABLE = (nn.Linear, nn.Conv2d)


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
        elif any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False)):
            found[name] = type(module).__name__
    return found


def _is_prunable(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    # A parametrized or weight-normalized layer computes its weight anew at each call.
    return isinstance(module, PRUNABLE) and isinstance(module._parameters.get("weight"), nn.Parameter)


def is_depthwise(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether each output of a convolution sees one input channel only."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.weight.shape[1] == 1


def mask_block_size(weight: Tensor) -> int:
    """Columns that share one threshold: the k * k taps of one channel, 1 for 1x1 convolutions and linears."""
    return weight.shape[2:].numel()


@dataclass
class GramSum:
    """The sum of x x^T over every input x that one weight met.

    Attributes
    ----------
    gram
        [groups, d, d] in float32, or float64 for a float64 model.
    samples
        Number of inputs summed: output positions of a convolution, rows or tokens of a linear layer.
    """

    gram: Tensor
    samples: int

    def hessian(self) -> Tensor:
        """H = (2 / samples) X X^T, [groups, d, d]."""
        return self.gram * (2 / self.samples)


class InputRecorder(TorchFunctionMode):
    """Sums the Gram matrices of the inputs of chosen weights while a model runs.

    Used as a context manager around forward passes. It watches the calls of ``linear`` and ``conv2d`` themselves,
    not the modules, so it needs no hooks and sees what the weight was really applied to: padding that a subclass
    adds before the convolution, a module that is called twice, a weight that two modules share.

    Parameters
    ----------
    weights
        The parameters to watch, by a name for messages.
    skip_first
        Leave out the first watched weight that is called; see `first`.
    backend
        As in :func:`spade_fast.trace`.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], *, skip_first: bool = False, backend: ops.Backend = "auto"
    ) -> None:
        super().__init__()
        self.sums: dict[str, GramSum] = {}
        #: Name of the first watched weight that was called, None as long as none was.
        self.first: str | None = None
        self._names = {id(weight): name for name, weight in weights.items()}
        self._skip_first = skip_first
        self._backend = backend

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)  # first, so that a call that is wrong in itself fails as it would anyway
        if func is F.linear:
            self._record(_linear_call, args, kwargs)
        elif func is F.conv2d:
            self._record(_conv2d_call, args, kwargs)
        return result

    def _record(self, parse: Callable[..., _Call], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = parse(*args, **kwargs)
        name = self._names.get(id(call.weight))
        if name is None:
            return
        if self.first is None:
            self.first = name
        if self._skip_first and name == self.first:
            return
        device = call.input.device
        dtype = torch.float64 if call.input.dtype == torch.float64 else torch.float32
        total = self.sums.get(name)
        if total is None:
            shape = (call.groups, call.columns, call.columns)
            total = self.sums[name] = GramSum(torch.zeros(shape, dtype=dtype, device=device), 0)
        elif total.gram.shape != (call.groups, call.columns, call.columns):
            raise InvalidInputError(
                f"layer {name!r} is called with {call.groups} groups and {call.columns} columns, but was called with "
                f"{total.gram.shape[0]} and {total.gram.shape[1]} before: leave it out of `layers`"
            )
        native = ops.resolve_backend(self._backend, device) == "native"
        call.add_to(total, call.input.detach().to(dtype), ops if native else reference)


@dataclass
class _Call:
    """One use of a weight: `add_to(sum, input, implementation)` adds its inputs to a Gram sum."""

    weight: Tensor
    input: Tensor
    groups: int
    columns: int
    add_to: Callable[[GramSum, Tensor, Any], None]


def _linear_call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Call:  # noqa: ARG001
    def add_to(total: GramSum, input: Tensor, implementation: Any) -> None:
        rows = input.reshape(-1, input.shape[-1])
        implementation.linear_gram_(total.gram, rows)
        total.samples += rows.shape[0]

    return _Call(weight, input, 1, input.shape[-1], add_to)


def _conv2d_call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> _Call:
    kernel = (weight.shape[2], weight.shape[3])
    stride, dilation = _pair(stride), _pair(dilation)

    def add_to(total: GramSum, input: Tensor, implementation: Any) -> None:
        images = input if input.dim() == 4 else input[None]
        if padding == "same":
            extra = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            images = F.pad(images, (extra[1] // 2, -(-extra[1] // 2), extra[0] // 2, -(-extra[0] // 2)))
        zeros = (0, 0) if isinstance(padding, str) else _pair(padding)
        implementation.conv2d_gram_(total.gram, images, kernel, stride, zeros, dilation, groups)
        outputs = [
            (images.shape[2 + axis] + 2 * zeros[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
            for axis in range(2)
        ]
        total.samples += images.shape[0] * outputs[0] * outputs[1]

    return _Call(weight, input, groups, weight.shape[1:].numel(), add_to)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values[0], values[-1]


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
        If the layer is of another kind, or the inputs are empty, not floating point or not finite.
    """
    if not _is_prunable(layer):
        raise InvalidInputError(
            f"a Hessian is defined for Linear and Conv2d layers with a plain weight, got {type(layer).__name__}"
        )
    if not inputs.is_floating_point() or inputs.numel() == 0:
        raise InvalidInputError(
            f"layer inputs must be a non-empty floating point tensor, got {inputs.dtype} of shape {list(inputs.shape)}"
        )
    if not inputs.isfinite().all():
        raise InvalidInputError("layer inputs hold NaN or infinite values: clean them before making a Hessian")
    recorder = InputRecorder({"layer": layer.weight}, backend=backend)
    with torch.no_grad(), recorder:
        layer(inputs)
    if "layer" not in recorder.sums:
        raise InvalidInputError(
            f"{type(layer).__name__} does not apply its weight through torch.nn.functional as it is "
            "(a custom forward?), so its inputs cannot be seen"
        )
    return recorder.sums["layer"].hessian()
