"""Batch norms folded into the convolutions before them while a model runs; the model itself is left alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from spade_fast.layers import conv2d_call
from spade_fast.ops import Geometry

# Questions about a tensor that do not look at its values.
_METADATA = frozenset(
    {
        Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.nelement, Tensor.is_contiguous, Tensor.__len__,
        Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.storage_offset, Tensor.get_device,
    }
)  # fmt: skip
# Attributes by which a convolution's output is known: to the learner, and on its way to the folded batch norm.
_CALL, _FOLD = "_spade_fast_call", "_spade_fast_fold"
# What stands in the place of the fold once the batch norm has read the output.
_READ = "read"
# How far a layer's inputs may move, of their largest, when batch norms are folded: rounding through a hundred layers.
_TOLERANCE = 1e-3


class FoldingMismatch(Exception):  # noqa: N818
    """A model does not do what it did when the folds were learned."""


class _Norm(NamedTuple):
    """What a batch norm is called with, beside its input."""

    mean: Tensor | None
    variance: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    training: bool
    eps: float

    def is_that_of(self, other: _Norm) -> bool:
        """Whether all tensors are the very same."""
        same = all(first is second for first, second in zip(self[:4], other[:4], strict=True))
        return same and self[4:] == other[4:]


@dataclass(frozen=True)
class Fold:
    """One call of a convolution whose output goes into a batch norm and nowhere else.

    Attributes
    ----------
    parameters, norm
        The convolution's own weight and bias and those of the batch norm, by which the calls are known again.
    weight, bias
        Of both in one.
    """

    parameters: tuple[Tensor, Tensor | None]
    norm: _Norm
    weight: Tensor
    bias: Tensor


class _ConvCall:
    """A convolution's output on its way: what made it, and the batch norm that has read it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.output = weakref.ref(output)
        self.fold: Fold | None = None
        self.read = False


class FoldLearner(TorchFunctionMode):
    """Watches one run of a model for batch norms that can be folded: used as a context manager around it."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_ConvCall] = []

    def folds(self) -> list[Fold | None]:
        """One entry for each call of conv2d, in order. To be asked when the outputs of the run are gone."""
        # An output that is still alive is held by someone who may look at it.
        return [call.fold if call.output() is None else None for call in self._calls]

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        readers = _tagged(func, args, kwargs, _CALL)
        result = func(*args, **kwargs)
        for call in readers:
            # Only a batch norm that is the first to read can be folded, and only while it stays the last.
            call.fold = None if call.read or func is not F.batch_norm else _fold(call, *args, **kwargs)
            call.read = True
        if func is F.conv2d:
            _, weight, bias, _, _ = _conv_arguments(*args, **kwargs)
            call = _ConvCall(weight, bias, result)
            self._calls.append(call)
            setattr(result, _CALL, call)
        return result


class FoldedBatchNorms(TorchFunctionMode):
    """Runs a model with folds learned before: used as a context manager around each run.

    Raises
    ------
    FoldingMismatch
        From within the model or at its end, if it does anything else than it did when the folds were learned.
    """

    def __init__(self, folds: list[Fold | None]) -> None:
        super().__init__()
        self._folds = folds
        self._next = 0
        self._unread = 0  # folded outputs on their way to the batch norm
        self._mismatch: str | None = None  # kept, for a model may catch every exception
        self._packed: dict[int, Tensor] = {}  # weights by position of the call

    def __enter__(self) -> FoldedBatchNorms:
        """Begin a run, with the first call of a convolution."""
        self._next = self._unread = 0
        self._mismatch = None
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """End a run."""
        super().__exit__(kind, *rest)  # type: ignore[no-untyped-call]
        if kind is None and self._unread:
            self._mismatch = self._mismatch or f"{self._unread} batch norms did not read what only they read before"
        if kind is None and self._mismatch:
            raise FoldingMismatch(self._mismatch)

    def _refusal(self, message: str) -> FoldingMismatch:
        self._mismatch = message
        return FoldingMismatch(message)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            return self._convolve(*args, **kwargs)
        folded = _tagged(func, args, kwargs, _FOLD)
        if not folded:
            return func(*args, **kwargs)
        if func is F.batch_norm and folded[0] is not _READ:
            maps, norm = _norm_call(*args, **kwargs)
            if len(folded) == 1 and hasattr(maps, _FOLD) and norm.is_that_of(folded[0].norm):
                self._unread -= 1
                setattr(maps, _FOLD, _READ)
                # Another tensor, so that one who reads `maps` later is noticed.
                return _alias(maps) if maps.requires_grad else maps.detach()
        raise self._refusal(f"{func} reads the output of a convolution that only its batch norm read before")

    def _convolve(self, *args: Any, **kwargs: Any) -> Tensor:
        maps, weight, bias, rest, options = _conv_arguments(*args, **kwargs)
        if _tagged(F.conv2d, args, kwargs, _FOLD):
            raise self._refusal("a convolution reads what only a batch norm read before")
        position = self._next
        self._next += 1
        fold = self._folds[position] if position < len(self._folds) else None
        if fold is None:
            return F.conv2d(maps, weight, bias, *rest, **options)
        if fold.parameters[0] is not weight or fold.parameters[1] is not bias:
            raise self._refusal("convolutions are called in another order than before")
        if _can_pack(maps, fold.weight):
            images, geometry = conv2d_call(maps, fold.weight, fold.bias, *rest, **options)[1:]
            output = self._convolve_packed(position, images, fold, geometry)
        else:
            output = F.conv2d(maps, fold.weight, fold.bias, *rest, **options)
        setattr(output, _FOLD, fold)
        self._unread += 1
        return output

    def _convolve_packed(self, position: int, images: Tensor, fold: Fold, geometry: Geometry) -> Tensor:
        """Convolve with the weight in oneDNN's own layout, into which it otherwise brings it anew at each call."""
        how = (geometry.padding, geometry.stride, geometry.dilation, geometry.groups)
        if position not in self._packed:
            pack = torch.ops.mkldnn._reorder_convolution_weight
            self._packed[position] = pack(fold.weight, *how, list(images.shape))
        # What inductor compiles convolutions to; the last three arguments could fuse an activation.
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            images, self._packed[position], fold.bias, *how, "none", [], ""
        )
        return output


class _Alias(torch.autograd.Function):
    """The same storage in a tensor that is no view: the gradient of a view that an activation writes on is slow."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:  # noqa: ARG004
        place = maps.storage_offset(), maps.shape, maps.stride()
        return maps.new_empty(0).set_(maps.untyped_storage(), *place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient


def _alias(maps: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        alias: Tensor = _Alias.apply(maps)  # type: ignore[no-untyped-call]
    return alias


def _can_pack(images: Tensor, weight: Tensor) -> bool:
    return (
        images.device.type == "cpu"
        and images.dim() == 4
        and images.numel() > 0
        and not (torch.is_grad_enabled() and images.requires_grad)  # gradients do not pass it
        and images.dtype == weight.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def learn_folds(model: nn.Module, view: Tensor) -> list[Fold | None]:
    """The folds of a model, learned from one run on a view and checked by a second.

    Parameters
    ----------
    model
        In evaluation mode.
    view
        An input of the model.

    Returns
    -------
    list
        One entry for each call of a convolution, None where nothing can be folded; empty where nothing at all can.
    """
    if not _is_plain(model):
        return []
    learner = FoldLearner()
    try:
        plain = _run(model, view, learner)
        folds = _finite(learner.folds())
        if not any(folds):
            return []
        folded = _run(model, view, FoldedBatchNorms(folds))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model may be made for batches of one size; one that fails on every input will do so again
        return []
    return folds if _agree(plain, folded) else []


class _LayerInputs(TorchFunctionMode):
    """Keeps copies of what convolutions and linear layers are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.conv2d or func is F.linear:
            with torch._C.DisableTorchFunction():  # copying is no reading
                self.inputs.append((args[0] if args else kwargs["input"]).clone())
        return func(*args, **(kwargs or {}))


def _run(model: nn.Module, view: Tensor, mode: TorchFunctionMode) -> list[Tensor]:
    """The inputs of all layers, and the outputs of the model, run on a copy of the view."""
    layers = _LayerInputs()
    with mode, layers:
        outputs = model(view.clone())
    return layers.inputs + [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor)]


def _is_plain(model: nn.Module) -> bool:
    """Whether all that reads the outputs of convolutions can be seen: no hooks, nothing compiled or scripted."""
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or isinstance(module, torch.jit.ScriptModule):
            return False
        if hasattr(module, "_orig_mod"):  # torch.compile
            return False
    return not (nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def _finite(folds: list[Fold | None]) -> list[Fold | None]:
    """The folds without those that overflow; all are looked at together, since a GPU lets the host wait each time."""
    good = {i: fold.weight.isfinite().all() & fold.bias.isfinite().all() for i, fold in enumerate(folds) if fold}
    if not good:
        return folds
    kept = dict(zip(good, torch.stack(list(good.values())).tolist(), strict=True))
    return [fold if kept.get(i) else None for i, fold in enumerate(folds)]


def _agree(plain: list[Tensor], folded: list[Tensor]) -> bool:
    pairs = list(zip(plain, folded, strict=False))
    if len(plain) != len(folded) or not all(a.shape == b.shape and a.is_floating_point() for a, b in pairs):
        return False
    close = [(a - b).abs().max() <= _TOLERANCE * a.abs().max() for a, b in pairs if a.numel()]
    return not close or bool(torch.stack(close).all())


def _tagged(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tag: str) -> list[Any]:
    """The tags of the tensors whose values a call reads."""
    if func in _METADATA:
        return []
    found = []
    for argument in (*args, *kwargs.values()):
        for leaf in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(leaf, Tensor) and tag in leaf.__dict__:
                found.append(leaf.__dict__[tag])
    if not found:
        return []
    # Of the attributes only those that are tensors show values: `.T`, but not `.shape`.
    is_metadata = func.__name__ == "__get__" and not isinstance(func(*args, **kwargs), Tensor)
    return [] if is_metadata else found


def _conv_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...], dict[str, Any]]:
    return input, weight, bias, rest, options


def _norm_call(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> tuple[Tensor, _Norm]:
    return input, _Norm(running_mean, running_var, weight, bias, training, eps)


def _fold(call: _ConvCall, *args: Any, **kwargs: Any) -> Fold | None:
    norm = _norm_call(*args, **kwargs)[1]
    if norm.training or norm.mean is None or norm.variance is None or call.weight.dim() != 4:
        return None
    # Of half precision twice as much would be rounded.
    if not isinstance(call.weight, nn.Parameter) or call.weight.dtype not in (torch.float32, torch.float64):
        return None
    # What is computed is another tensor at each call.
    if not all(value is None or isinstance(value, nn.Parameter) for value in (call.bias, norm.scale, norm.shift)):
        return None
    factor = (norm.variance.double() + norm.eps).rsqrt()
    if norm.scale is not None:
        factor = factor * norm.scale.double()
    bias = -norm.mean.double() if call.bias is None else call.bias.double() - norm.mean.double()
    bias = bias * factor
    if norm.shift is not None:
        bias = bias + norm.shift.double()
    weight = call.weight.double() * factor[:, None, None, None]
    return Fold((call.weight, call.bias), norm, weight.to(call.weight).contiguous(), bias.to(call.weight))
