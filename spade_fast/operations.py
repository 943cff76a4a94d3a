"""What the steps of a network are to the attribution methods that look inside it."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast.errors import InvalidInputError, first_line


class ClippedReLU(nn.ReLU):
    """min(max(x, 0), limit): ReLU6 and its kin, as a kind of ReLU, which guided backpropagation looks for."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, input: Tensor) -> Tensor:
        return F.hardtanh(input, 0.0, self.limit)  # which has no slope at 0 either, as ReLU6, unlike clamp

    def extra_repr(self) -> str:
        return f"limit={self.limit:g}"


class Elementwise(nn.Module):
    """An activation of another kind, each number on its own: DeepLIFT's rescale rule holds for it as for any."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.activation(input)
        return output


class MaxPool2d(nn.MaxPool2d):
    """Max pooling that DeepLIFT has a rule for, whatever the baseline and however windows overlap."""


def twin(module: nn.Module) -> nn.Module:
    """The same modules anew, around the same parameters and buffers, for evaluation and without hooks.

    Hooks that run before a module stay, since some compute its weight.

    Raises
    ------
    InvalidInputError
        If the module holds something that cannot be copied.
    """
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for each in module.modules():  # activations that a network keeps for its own use cannot be copied
        shared.update({id(tensor): tensor for tensor in tensors_in(list(vars(each).values())) if not tensor.is_leaf})
    try:
        copied = copy.deepcopy(module, shared)
    except (TypeError, RuntimeError, pickle.PickleError) as error:
        raise InvalidInputError(
            f"{type(module).__name__} cannot be copied ({first_line(error)}): keep such things outside of the module"
        ) from error
    for each in copied.modules():
        each.training = False
        for hooks in (each._forward_hooks, each._backward_hooks, each._backward_pre_hooks):
            hooks.clear()
    return copied


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Whatever tensors there are in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)


#: Methods that look inside the network.
INSIDE_METHODS = ("deep_lift", "lrp", "guided_backprop", "guided_grad_cam", "grad_cam", "score_cam")
#: Those of them that need a rule for every operation; those that change the gradient of ReLUs; those about a map.
RULED_METHODS = ("deep_lift", "lrp")
GUIDED_METHODS = ("guided_backprop", "guided_grad_cam")
MAP_METHODS = ("guided_grad_cam", "grad_cam", "score_cam")

# Modules

# Activations that captum's DeepLift knows by these very types.
_KNOWN_ACTIVATIONS = (nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Softplus, nn.Tanh)
_OTHER_ACTIVATIONS = (
    nn.CELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LogSigmoid, nn.Mish, nn.PReLU,
    nn.ReLU6, nn.SELU, nn.SiLU, nn.Softshrink, nn.Softsign, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
ACTIVATIONS = (nn.ReLU, Elementwise, *_KNOWN_ACTIVATIONS, *_OTHER_ACTIVATIONS)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AVERAGE_POOLING = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
)  # fmt: skip
#: Layers with weights.
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR_MODULES = (
    *AVERAGE_POOLING, nn.AlphaDropout, nn.ChannelShuffle, nn.ConstantPad2d, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
    nn.Dropout3d, nn.Flatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle, nn.ReflectionPad2d, nn.ReplicationPad2d,
    nn.Unflatten, nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip
_NORMALIZATIONS = (
    nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.LayerNorm, nn.LocalResponseNorm, nn.LogSoftmax, nn.RMSNorm,
    nn.Softmax, nn.Softmax2d,
)  # fmt: skip


def own_module(module: nn.Module) -> nn.Module | None:
    """A new module for one call of an activation or a max pooling; None for other modules, which may stay."""
    kind = type(module)
    if kind is nn.ReLU:
        return nn.ReLU()
    if isinstance(module, nn.Hardtanh) and kind in (nn.ReLU6, nn.Hardtanh) and module.min_val == 0 < module.max_val:
        return ClippedReLU(module.max_val)
    if isinstance(module, nn.MaxPool2d) and kind is nn.MaxPool2d and not module.return_indices:
        return MaxPool2d(module.kernel_size, module.stride, module.padding, module.dilation, ceil_mode=module.ceil_mode)
    if kind in _KNOWN_ACTIVATIONS or kind in _OTHER_ACTIVATIONS:
        own: Any = twin(module)
        if hasattr(own, "inplace"):
            own.inplace = False
        return own if kind in _KNOWN_ACTIVATIONS else Elementwise(own)
    return None


# Functions and methods of tensors

#: By name: the module that does the same, and what the arguments after the first are called there.
MODULE_OF_FUNCTION: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d, ("output_size",)),
    "avg_pool2d": (
        nn.AvgPool2d,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    "celu": (nn.CELU, ("alpha",)),
    "elu": (nn.ELU, ("alpha",)),
    "gelu": (nn.GELU, ("approximate",)),
    "hardshrink": (nn.Hardshrink, ("lambd",)),
    "hardsigmoid": (nn.Hardsigmoid, ()),
    "hardswish": (nn.Hardswish, ()),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
    "logsigmoid": (nn.LogSigmoid, ()),
    "max_pool2d": (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    "mish": (nn.Mish, ()),
    "relu": (nn.ReLU, ()),
    "relu6": (nn.ReLU6, ()),
    "selu": (nn.SELU, ()),
    "sigmoid": (nn.Sigmoid, ()),
    "silu": (nn.SiLU, ()),
    "softplus": (nn.Softplus, ("beta", "threshold")),
    "softshrink": (nn.Softshrink, ("lambd",)),
    "softsign": (nn.Softsign, ()),
    "tanh": (nn.Tanh, ()),
    "tanhshrink": (nn.Tanhshrink, ()),
    "threshold": (nn.Threshold, ("threshold", "value")),
}


def functions_named(*names: str) -> frozenset[Any]:
    """Whatever goes by these names in torch: functions, methods of tensors, operators of Python."""
    owners = (torch, F, torch.Tensor, operator)
    return frozenset(getattr(owner, name) for owner in owners for name in names if hasattr(owner, name))


SUMS = functions_named("add", "iadd", "__add__", "__radd__", "__iadd__")
#: Sums and means of several places.
AVERAGES = functions_named(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d", "interpolate", "mean", "sum", "upsample"
)
FACTORS = functions_named(
    "mul", "multiply", "imul", "__mul__", "__rmul__", "__imul__", "div", "divide", "truediv", "itruediv", "true_divide",
    "__truediv__", "__itruediv__", "neg",
)  # fmt: skip
DIFFERENCES = functions_named("sub", "subtract", "isub", "__sub__", "__rsub__", "__isub__", "rsub")
_WEIGHTED_FUNCTIONS = functions_named(
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "matmul",
    "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "mm", "scaled_dot_product_attention",
)  # fmt: skip
_STATISTICS = functions_named(
    "batch_norm", "group_norm", "instance_norm", "layer_norm", "local_response_norm", "log_softmax", "normalize",
    "norm", "rms_norm", "softmax", "std", "var",
)  # fmt: skip
_LINEAR_FUNCTIONS = AVERAGES | functions_named(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d", "broadcast_to", "cat", "channel_shuffle",
    "chunk", "clone", "concat", "concatenate", "contiguous", "dropout", "expand", "flatten", "float", "flip",
    "__getitem__", "getitem", "interpolate", "movedim", "narrow", "pad", "permute", "pixel_shuffle", "pixel_unshuffle",
    "repeat", "reshape", "roll", "select", "split", "squeeze", "stack", "swapaxes", "swapdims", "t", "tensor_split",
    "tile", "to", "transpose", "unbind", "unflatten", "unsqueeze", "upsample", "view",
)  # fmt: skip
#: Functions that ask a tensor for its shape and kind alone.
CONSTANTS = functions_named(
    "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"
)


#: What takes maps [n, channels, h, w] and gives maps, whatever else those could be.
MAP_MODULES = (
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample,
)  # fmt: skip
MAP_FUNCTIONS = functions_named(
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "batch_norm", "conv2d", "conv_transpose2d",
    "interpolate", "max_pool2d", "pixel_shuffle", "pixel_unshuffle",
)  # fmt: skip


class Operation(NamedTuple):
    """One step of a network that depends on its input."""

    layer: str  # where: the name of a module, or of a function behind that of the module that calls it
    what: Any  # an nn.Module, or a function
    active: int  # how many of the tensors that come in depend on the input
    is_first_active: bool  # whether the first of its arguments does
    is_identity: bool  # whether what comes out is what came in
    has_plain_weight: bool = True  # False for a layer that computes its weight from another
    is_affine: bool = True  # False for a layer with weights that does something else beside
    has_hook: bool = False  # whether something runs before the layer
    is_float: bool = True  # False for masks, indices and whole numbers

    def obstacle(self, traced: bool) -> tuple[tuple[str, ...], str] | None:
        """The methods that it makes invalid, and why; None if it stands in no method's way.

        Parameters
        ----------
        traced
            Whether functions of the network can be replaced.
        """
        what, several = self.what, self.active > 1
        if self.is_identity:
            return None
        if isinstance(what, nn.Module):
            if self.has_hook:
                reason = f"a hook that runs before this {type(what).__name__} may change what goes into it"
                return (*RULED_METHODS, *GUIDED_METHODS), reason
            if not self.is_affine:
                return (*RULED_METHODS, *GUIDED_METHODS), f"{type(what).__name__} does more than apply its weight"
            if not self.has_plain_weight:
                return ("lrp",), f"{type(what).__name__} computes its weight, which LRP has to change"
            return _module_obstacle(what)
        name = getattr(what, "__name__", str(what)).strip("_")
        if not self.is_float:
            return (*RULED_METHODS, *GUIDED_METHODS), f"{name} makes masks or whole numbers, which have no gradient"
        if what in SUMS or what in _LINEAR_FUNCTIONS:
            return None
        if not traced and name in MODULE_OF_FUNCTION:
            return (*RULED_METHODS, *GUIDED_METHODS), f"calls the function {name}: make it a module of its own"
        if what in DIFFERENCES:
            return (("lrp",), "subtracts one activation from another") if several else None
        if what in FACTORS and (self.is_first_active or "div" not in name):
            return (RULED_METHODS, "multiplies or divides activations by each other") if several else None
        if what in _WEIGHTED_FUNCTIONS:
            if several:
                return RULED_METHODS, f"multiplies activations with each other ({name})"
            return ("lrp",), f"calls the function {name}: make it a module of its own"
        if name == "batch_norm":
            return (
                RULED_METHODS,
                "calls the function batch_norm, perhaps with the batch's own statistics: make it a module",
            )
        if what in _STATISTICS:
            return RULED_METHODS, f"normalises activations by their own statistics ({name})"
        return (*RULED_METHODS, *GUIDED_METHODS), f"{name} is no operation that these methods have a rule for"


def _module_obstacle(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    kind = type(module).__name__
    if isinstance(module, BATCH_NORMS):
        if module.running_mean is None or module.running_var is None:
            return RULED_METHODS, f"{kind} normalises activations by their own statistics"
        return None
    if isinstance(module, (nn.ReLU, MaxPool2d, *WEIGHTED)) or type(module) in _LINEAR_MODULES:
        return None
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
        return ("deep_lift",), f"{kind} has a rule for two dimensions, without return_indices"
    if isinstance(module, ACTIVATIONS):
        inner = type(module.activation).__name__ if isinstance(module, Elementwise) else kind
        return GUIDED_METHODS, f"{inner} is no ReLU, the only activation that guided backpropagation is defined for"
    if isinstance(module, _NORMALIZATIONS):
        return RULED_METHODS, f"{kind} normalises activations by their own statistics"
    if isinstance(module, nn.MultiheadAttention):
        return RULED_METHODS, f"{kind} multiplies activations with each other"
    return (*RULED_METHODS, *GUIDED_METHODS), f"{kind} is no module that these methods have a rule for"
