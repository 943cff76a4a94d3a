"""Attribution maps: how much each pixel counts for a class, by gradient methods of captum."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from spade_fast.errors import InvalidInputError, require
from spade_fast.models import evaluation_mode

#: Model inputs [n, c, h, w] to outputs [n, classes].
Forward: TypeAlias = Callable[[Tensor], Tensor]

_IG_STEPS = 50
# Points of the path that go through the network at a time: bounds memory at that of a batch of ten.
_IG_BATCH = 10


@dataclass(frozen=True)
class Method:
    """An attribution method.

    Attributes
    ----------
    title
        As it is written above a map.
    compute
        (network, inputs [1, c, h, w] that require grad, target) to signed attributions [1, c, h, w].
    """

    title: str
    compute: Callable[[Forward, Tensor, int], Tensor]


def _saliency(forward: Forward, inputs: Tensor, target: int) -> Tensor:
    # Signed, as the sum over channels takes the absolute values itself.
    return _tensor(captum().Saliency(forward).attribute(inputs, target=target, abs=False))


def _input_x_gradient(forward: Forward, inputs: Tensor, target: int) -> Tensor:
    return _tensor(captum().InputXGradient(forward).attribute(inputs, target=target))


def _integrated_gradients(forward: Forward, inputs: Tensor, target: int) -> Tensor:
    method = captum().IntegratedGradients(forward)
    return _tensor(method.attribute(inputs, target=target, n_steps=_IG_STEPS, internal_batch_size=_IG_BATCH))


#: The methods by name. "saliency" is the plain gradient (Simonyan et al. 2014); "input_x_gradient" its product with
#: the model's input (Shrikumar et al. 2016); "integrated_gradients" the integral of the gradient on the way from
#: zero model inputs, the mean colour, to the image, times the input (Sundararajan et al. 2017), in 50 steps.
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "saliency": Method("Gradient", _saliency),
        "input_x_gradient": Method("Input \N{MULTIPLICATION SIGN} gradient", _input_x_gradient),
        "integrated_gradients": Method("Integrated gradients", _integrated_gradients),
    }
)


def attribute(module: nn.Module, inputs: Tensor, target: int, method: str) -> Tensor:
    """Map how much each pixel counts for a class: the sum over channels of \\|attribution\\|.

    The signed sum is no alternative: it puts gradient methods at chance when they are to find the pixels that a
    backdoored network answers to. The network runs in evaluation mode; its training flags, gradients and weights are
    afterwards what they were.

    Parameters
    ----------
    module
        The network: [n, c, h, w] to [n, classes], each image on its own.
    inputs
        Model inputs [1, c, h, w], already normalised. They are brought to device and dtype of the weights.
    target
        The class, an index into the outputs.
    method
        A name in :data:`METHODS`.

    Returns
    -------
    Tensor
        float32 [h, w] on the CPU, at least 0, in units of the output (for "saliency" per unit of input).

    Raises
    ------
    InvalidInputError
        If the method or the target does not exist, the inputs or outputs have another shape, no gradient reaches the
        inputs, or the map holds NaN or infinite values.
    MissingDependencyError
        If captum is not installed.
    """
    chosen = find_method(method)
    check_inputs(inputs)

    def forward(batch: Tensor) -> Tensor:
        # A copy, since a network that begins in place cannot do so on a tensor that gradients are asked for.
        outputs = check_outputs(module(batch.clone()), len(batch))
        check_target(target, outputs.shape[1])
        if not outputs.requires_grad:
            raise InvalidInputError(
                f"no gradient flows from the outputs of {type(module).__name__} to its inputs: its forward detaches "
                "them or runs under no_grad, which gradient methods cannot see through"
            )
        return outputs

    # Out of inference mode, whatever the caller is in: its tensors could not take part in a gradient.
    with evaluation_mode(module), torch.inference_mode(False), torch.enable_grad():
        point = like_weights(inputs, module).detach().clone().requires_grad_()
        attribution = chosen.compute(forward, point, target)
    result = attribution.detach().cpu().double().abs().sum(dim=1)[0].float()
    if not result.isfinite().all():
        raise InvalidInputError(
            f"method {method!r} gives NaN or infinite values for target {target} of {type(module).__name__}: look for "
            "them in the model's weights and outputs, or use a wider dtype"
        )
    return result


def find_method(name: str) -> Method:
    """The method of that name.

    Raises
    ------
    InvalidInputError
        If there is none; the message gives the nearest names.
    """
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    nearest = difflib.get_close_matches(str(name), METHODS, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(map(repr, nearest))}" if nearest else f"known: {', '.join(map(repr, METHODS))}"
    raise InvalidInputError(f"no attribution method goes by the name {name!r}; {hint}")


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises
    ------
    InvalidInputError
        If there are none, or one is unknown.
    """
    if isinstance(names, str):
        raise InvalidInputError(f"methods must be a sequence of names: pass [{names!r}]")
    for name in names:
        find_method(name)
    if not names:
        raise InvalidInputError(f"no attribution method is asked for: name some of {', '.join(map(repr, METHODS))}")
    return tuple(dict.fromkeys(names))


def check_inputs(inputs: Any) -> Tensor:
    """The model inputs, if they are one image, [1, c, h, w], of finite floating-point values.

    Raises
    ------
    InvalidInputError
        Otherwise, with what was found.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() != 4 or len(inputs) != 1:
        got = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InvalidInputError(f"model inputs must be one image, a float tensor [1, c, h, w], got {got}")
    if not inputs.isfinite().all():
        raise InvalidInputError("model inputs hold NaN or infinite values: look at the image and its preprocessing")
    return inputs


def check_outputs(outputs: Any, count: int) -> Tensor:
    """The network's outputs, if they are [count, classes].

    Raises
    ------
    InvalidInputError
        Otherwise, with what was found.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != count or not outputs.shape[1]:
        got = f"a tensor {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise InvalidInputError(
            f"the model must give one score for each class, [{count}, classes], but gives {got}: wrap it in a module "
            "that returns the class scores alone"
        )
    return outputs


def check_target(target: int, classes: int) -> None:
    """Raise InvalidInputError unless `target` is one of the classes."""
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < classes:
        raise InvalidInputError(f"target {target!r} is no class of this model: pass an index within 0..{classes - 1}")


def like_weights(inputs: Tensor, module: nn.Module) -> Tensor:
    """The inputs on the device and in the dtype of the network's first weight, as they are if it has none.

    Raises
    ------
    InvalidInputError
        If the weights are on the meta device, where they have no values.
    """
    weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    if weight is None:
        return inputs
    if weight.is_meta:
        raise InvalidInputError(f"{type(module).__name__} has no weights: it is on the meta device")
    return inputs.to(device=weight.device, dtype=weight.dtype)


def captum() -> Any:
    """The package ``captum.attr``, imported when first needed.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    return require("captum.attr", "interpret")


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)  # captum has no types: one tensor in, one tensor out
    return value
