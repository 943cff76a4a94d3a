"""Attribution maps: how much each pixel counts for a class."""

from __future__ import annotations

import contextlib
import difflib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast.autocast import without_autocast
from spade_fast.errors import InvalidInputError, SpadeError, check_whole, first_line
from spade_fast.heap import kept_heap
from spade_fast.memory import is_out_of_memory
from spade_fast.methods import METHODS, Method, Question, captum
from spade_fast.models import LoadedModel, bare_module, evaluation_mode
from spade_fast.preparation import Prepared
from spade_fast.rules import differs

__all__ = [
    "METHODS",
    "Method",
    "attribute",
    "captum",
    "check_inputs",
    "check_methods",
    "check_outputs",
    "check_target",
    "find_method",
    "like_weights",
]


@without_autocast
def attribute(
    module: nn.Module | LoadedModel,
    inputs: Tensor,
    target: int,
    method: str,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Map how much each pixel counts for a class.

    Methods that look inside the network do so on an equal one, as :func:`spade_fast.prepare` makes it. The network runs
    in evaluation mode; its training flags, hooks, gradients and weights are afterwards what they were.

    Parameters
    ----------
    module
        The network: [n, c, h, w] to [n, classes], each image on its own; or what :func:`spade_fast.load_model`
        returned.
    inputs
        Model inputs [1, c, h, w], already normalised. They are brought to device and dtype of the weights.
    target
        The class, an index into the outputs.
    method
        A name in :data:`METHODS`, where it stands how each makes a map of its attributions.
    batch_size
        Inputs that go through the network at a time: bounds the memory that a method takes.
    seed
        Of methods that draw at random ("gradient_shap", "lime"): the same seed gives the same bits.
    progress
        Show progress bars on stderr.

    Returns
    -------
    Tensor
        float32 [h, w] on the CPU, at least 0, in units of the output (for "saliency" per unit of input).

    Raises
    ------
    InvalidInputError
        If the method or the target does not exist, the method is not valid on this network (the message names the
        layer), the inputs or outputs have another shape, no gradient reaches the inputs, or the map holds NaN or
        infinite values.
    MissingDependencyError
        If a library that the method needs is not installed.
    """
    chosen = find_method(method)
    with asked(module, inputs, target, batch_size=batch_size, seed=seed, progress=progress) as question:
        return answer(question, method, chosen)


@contextlib.contextmanager
def asked(
    module: nn.Module | LoadedModel,
    inputs: Tensor,
    target: int,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
    again: bool = False,
    prepared: Prepared | None = None,
) -> Iterator[Question]:
    """The question of a network's answer to one image, as it is now, for as many methods as there are.

    Of a network that has been asked before, with other weights perhaps, nothing is checked `again`; and methods may
    look into what was `prepared` of it, which has the weights that it has now.
    """
    module = bare_module(module)
    check_inputs(inputs)
    if any(parameter.is_inference() for parameter in module.parameters()):
        raise InvalidInputError(
            f"{type(module).__name__} was made in inference mode, so no gradient can pass it: make or load it outside"
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidInputError(f"batch_size must be a positive whole number, got {batch_size!r}")
    check_whole("seed", seed, 0)
    # Out of inference mode, whatever the caller is in: its tensors could not take part in a gradient.
    with kept_heap(), evaluation_mode(module), torch.inference_mode(False), torch.enable_grad():
        point = like_weights(inputs, module).detach().clone().requires_grad_()
        if again:
            yield Question(module, point, target, batch_size, seed, progress, prepared)
            return
        outputs = check_outputs(_outputs(module, point), 1)
        target = check_target(target, outputs.shape[1])
        if not outputs.requires_grad:
            raise InvalidInputError(
                f"no gradient flows from the outputs of {type(module).__name__} to its inputs: its forward detaches "
                "them or runs under no_grad, which gradient methods cannot see through"
            )
        if batch_size > 1:
            _check_apart(module, point.detach(), outputs.detach())
        yield Question(module, point, target, batch_size, seed, progress)


def _outputs(module: nn.Module, point: Tensor) -> Any:
    try:
        return module(point.clone())  # a network may begin in place
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InvalidInputError(
            f"{type(module).__name__} does not run on inputs {point.dtype} {list(point.shape)} ({first_line(error)})"
        ) from error


def _check_apart(module: nn.Module, point: Tensor, outputs: Tensor) -> None:
    """Refuse a network that answers otherwise in company: methods ask it about several inputs at a time."""
    with torch.no_grad():
        try:
            together = module(torch.cat([point, torch.zeros_like(point)]))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # some take single images: methods that need more say so themselves
            return
    if isinstance(together, Tensor) and len(together) == 2 and differs(together[:1], outputs):
        raise InvalidInputError(
            f"what {type(module).__name__} makes of an image depends on the others of its batch (batch norms without "
            "running statistics, for one): pass batch_size=1, or let it treat each image on its own"
        )


def answer(question: Question, name: str, method: Method) -> Tensor:
    """A method's map, float32 [h, w] on the CPU."""
    try:
        result = method.reduce(method.compute(question).detach().cpu().double()).float()
    except SpadeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InvalidInputError(
            f"method {name!r} fails on {type(question.module).__name__} ({first_line(error)})"
        ) from error
    if not result.isfinite().all():
        raise InvalidInputError(
            f"method {name!r} gives NaN or infinite values for target {question.target} of "
            f"{type(question.module).__name__}: look for them in the model's weights and outputs, or use a wider dtype"
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
    if isinstance(names, str) or not isinstance(names, Iterable):
        cure = f"pass [{names!r}]" if names in METHODS else "such as ['saliency', 'lrp']"
        raise InvalidInputError(f"methods must be 'all' or a sequence of names, got {names!r}: {cure}")
    names = tuple(names)
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
    if (
        not isinstance(inputs, Tensor)
        or inputs.layout != torch.strided
        or inputs.is_meta
        or not inputs.is_floating_point()
        or inputs.dim() != 4
        or len(inputs) != 1
        or not inputs.numel()
    ):
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


def check_target(target: int, classes: int) -> int:
    """The target as a plain int, or InvalidInputError unless it is one of the classes.

    Whole numbers of numpy and torch will do.
    """
    index = -1
    if not isinstance(target, bool) and not (isinstance(target, Tensor) and target.dtype == torch.bool):
        with contextlib.suppress(TypeError, ValueError):
            index = operator.index(target)
    if not 0 <= index < classes:
        raise InvalidInputError(
            f"target {target!r} is no class of this model: pass an index, a whole number within 0..{classes - 1}"
        )
    return index


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
