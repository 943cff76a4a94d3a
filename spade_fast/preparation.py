"""Preparing a network for attribution: an equal one, in which every activation is a module of its own.

Methods that look inside a network (DeepLIFT, LRP, guided backpropagation) change what an activation does to a
gradient. They find activations by their modules. One that is a mere function, is called twice, works in place or is of
a kind that the method does not know is passed over in silence, and the map is wrong.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from spade_fast.autocast import without_autocast
from spade_fast.errors import InvalidInputError, first_line
from spade_fast.models import LoadedModel, evaluation_mode, resolve_model, visible_module
from spade_fast.operations import (
    BATCH_NORMS,
    CONSTANTS,
    GUIDED_METHODS,
    INSIDE_METHODS,
    MAP_FUNCTIONS,
    MAP_METHODS,
    MAP_MODULES,
    MODULE_OF_FUNCTION,
    WEIGHTED,
    ClippedReLU,
    Elementwise,
    MaxPool2d,
    Operation,
    functions_named,
    own_module,
    tensors_in,
    twin,
)
from spade_fast.preprocessing import Preprocess
from spade_fast.readonly import ReadOnlyMappings

# Largest difference of outputs, as a share of their largest, that the order of additions explains in float32.
_TOLERANCE = 1e-4
_DEFAULT_SIZE = 224
# Steps of a gradient that activations and choices give.
_BENDING = frozenset(
    f"{name}Backward"
    for name in (
        "Abs", "Amax", "Amin", "Celu", "Clamp", "ClampMax", "ClampMin", "Elu", "Erf", "Exp", "Expm1", "Gelu",
        "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "Log", "Log1P", "LogSigmoid", "LogSoftmax",
        "Max", "Maximum", "Min", "Minimum", "Mish", "Pow", "PreluKernel", "Reciprocal", "Relu", "Rsqrt",
        "RreluWithNoise", "Sigmoid", "Silu", "Softmax", "Softplus", "Softshrink", "Sqrt", "Tanh", "Threshold",
        "Where",
    )
)  # fmt: skip
#: What nodes of a prepared graph have in their `meta` if they give activations.
ACTIVE = "spade_fast_active"
#: And how many dimensions those have.
DIMENSIONS = "spade_fast_dimensions"


@dataclass(frozen=True)
class Report(ReadOnlyMappings):
    """What preparing a network took, and which attribution methods are valid on it.

    Attributes
    ----------
    changes
        By layer: what was made of it.
    obstacles
        By method, of those that look inside the network: the layers that make it invalid, and why. Empty where it is
        valid. Methods that are not listed see inputs, outputs and gradients only, and are always valid.
    spatial_map
        The last layer whose output is a map, for Grad-CAM and its kin; None where there is none. Where torch.fx cannot
        trace the network, the last module, though a function may make another map of what it gives.
    spatial_call
        Which of that layer's calls gives the map, from 0.
    untraceable
        Why the network could not be traced by torch.fx, in which case functions stayed functions; None if it was.
    largest_difference
        Of the outputs on all inputs that were tried, from those of the network as it was.
    """

    changes: Mapping[str, str]
    obstacles: Mapping[str, Mapping[str, str]]
    spatial_map: str | None
    spatial_call: int
    untraceable: str | None
    largest_difference: float

    def supports(self, method: str) -> bool:
        """Whether a method is valid on this network."""
        return not self.obstacles.get(method)

    def require(self, method: str) -> None:
        """Raise InvalidInputError, naming the first layer that stands in the way, unless the method is valid."""
        found = self.obstacles.get(method)
        if found:
            layer, reason = next(iter(found.items()))
            more = f" (the first of {len(found)} such layers)" if len(found) > 1 else ""
            raise InvalidInputError(
                f"method {method!r} is not valid on this network: {layer}: {reason}{more}; choose another method"
            )

    def summary(self) -> str:
        """The report as plain text: a line for each method, then what stands in the way, then what was changed."""
        lines = []
        for method, found in self.obstacles.items():
            lines.append(f"{method}: {'not valid' if found else 'valid'}")
            lines += [f"  {layer}: {reason}" for layer, reason in found.items()]
        if self.untraceable:
            lines.append(f"not traced: {self.untraceable}")
        lines += [f"{layer}: {change}" for layer, change in self.changes.items()]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Prepared:
    """An equal network on which attribution methods are valid, and the report that says which.

    Attributes
    ----------
    module
        The network: own modules around the original's parameters and buffers, layers under their names. Traces of the
        original apply to it. Batch norms that the original calls by function have a module below theirs.
    report
        What was done and what is valid.
    """

    module: nn.Module
    report: Report


@without_autocast
def prepare(model: nn.Module | LoadedModel, inputs: Tensor | None = None) -> Prepared:
    """An equal network on which the attribution methods are valid, as far as they can be.

    Each call of an activation becomes a module of its own, functions included; nothing works in place; ReLU6 and its
    kin become a kind of ReLU; max pooling gets a rule for DeepLIFT. Additions, reshapes and all layers with weights
    stay what and where they are, under their names. Where torch.fx cannot trace the network, modules are converted one
    by one and the report names what could not be.

    Parameters
    ----------
    model
        The network, or what :func:`spade_fast.load_model` returned. It is left as it was.
    inputs
        Model inputs [n, ...], already normalised, such as a real image's: the outputs of the prepared network are
        compared with the original's on them, and on normal noise of that shape. Default: noise alone, in the size of
        the network's own preprocessing where that is known, else [2, channels, 224, 224].

    Returns
    -------
    Prepared

    Raises
    ------
    InvalidInputError
        If the network cannot be run on such inputs, hides its layers (scripted, compiled), or a prepared one would not
        give the same outputs.
    """
    module = visible_module(model)
    tried = _inputs_to_try(model, module, inputs)
    with evaluation_mode(module), torch.inference_mode(False), torch.no_grad():
        expected = [_run(module, batch) for batch in tried]
        try:
            prepared = _traced(module, tried[0])
            difference = _largest_difference(prepared.module, tried, expected)
            if difference > _TOLERANCE:
                untraceable = f"the traced network's outputs differ by {difference:.1e} of the largest"
            elif all(_have_one_gradient(module, prepared.module, batch) for batch in tried):
                return _with_difference(prepared, difference)
            else:
                untraceable = "an operation has a gradient of its own, or none, which the traced network has lost"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            untraceable = first_line(error)
        prepared = _converted(module, tried[0], untraceable)
        difference = _largest_difference(prepared.module, tried, expected)
        if difference > _TOLERANCE and _largest_difference(module, tried, expected) > _TOLERANCE:
            raise InvalidInputError(
                f"{type(module).__name__} gives other outputs for the same inputs each time, even in evaluation mode "
                "(F.dropout without training=self.training, for one): there is no answer to explain"
            )
    if difference > _TOLERANCE:
        hooked = [name or "the network" for name, each in module.named_modules() if each._forward_hooks]
        cure = (
            f"remove the forward hooks (of {hooked[0]}, for one), which it is prepared without"
            if hooked
            else "leave inplace=True out where a tensor that it changes is used again"
        )
        raise InvalidInputError(
            f"{type(module).__name__} cannot be prepared: with nothing done in place its outputs differ by "
            f"{difference:.1e} of the largest; {cure}"
        )
    return _with_difference(prepared, difference)


def _inputs_to_try(model: nn.Module | LoadedModel, module: nn.Module, inputs: Tensor | None) -> list[Tensor]:
    """Normal noise and, if there are any, real inputs, like the network's weights."""
    weight = next((each for each in module.parameters() if each.is_floating_point()), torch.empty(0))
    if weight.is_meta:
        raise InvalidInputError(f"{type(module).__name__} has no weights: it is on the meta device")
    if inputs is not None:
        is_dense = isinstance(inputs, Tensor) and inputs.layout == torch.strided and not inputs.is_meta
        if not is_dense or not inputs.is_floating_point() or inputs.dim() < 2 or not inputs.numel():
            got = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
            raise InvalidInputError(f"inputs must be a non-empty batch of model inputs, a float tensor, got {got}")
        if not inputs.isfinite().all():
            raise InvalidInputError("inputs hold NaN or infinite values: look at the image and its preprocessing")
        shape = list(inputs.shape)
    else:
        size = _DEFAULT_SIZE
        try:
            _, preprocess = resolve_model(model, None)
            size = preprocess.input_size if isinstance(preprocess, Preprocess) else size
        except InvalidInputError:
            pass  # it does not say
        first = next((each for each in module.modules() if isinstance(each, (nn.Conv2d, nn.Linear))), None)
        channels = first.in_channels if isinstance(first, nn.Conv2d) else 3
        shape = [2, channels, size, size]
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    with torch.inference_mode(False):
        return [batch.to(weight, copy=True) for batch in (noise, inputs) if batch is not None]


def _run(module: nn.Module, batch: Tensor) -> Tensor:
    try:
        outputs = module(batch.clone())  # a network may work on its inputs in place
    except Exception as error:
        raise InvalidInputError(
            f"{type(module).__name__} does not run on inputs {list(batch.shape)} ({first_line(error)}): pass inputs= "
            "such as it takes"
        ) from error
    if not isinstance(outputs, Tensor):
        raise InvalidInputError(
            f"{type(module).__name__} gives a {type(outputs).__name__}: wrap it in a module that returns the class "
            "scores alone"
        )
    if not outputs.isfinite().all():
        raise InvalidInputError(f"{type(module).__name__} gives NaN or infinite outputs: look for them in its weights")
    return outputs


def _largest_difference(module: nn.Module, tried: list[Tensor], expected: list[Tensor]) -> float:
    """Of the outputs, as a share of the largest expected one; infinite where NaN is not met by NaN."""
    shares = [0.0]
    for batch, right in zip(tried, expected, strict=True):
        found = module(batch.clone())
        if found.shape != right.shape:
            return float("inf")
        difference = torch.where((found == right) | (found.isnan() & right.isnan()), 0, (found - right).abs())
        share = (difference.max() / right.abs().max().clamp_min(torch.finfo(right.dtype).tiny)).item()
        shares.append(share if share == share else float("inf"))
    return max(shares)


def _have_one_gradient(module: nn.Module, other: nn.Module, batch: Tensor) -> bool:
    """Whether two networks of equal outputs have equal gradients too, at the first image, if the first has one."""
    gradients: list[Tensor] = []
    for each in (twin(module), other):  # without hooks, which may not expect gradients
        with torch.enable_grad():
            point = batch[:1].clone().requires_grad_()
            try:
                outputs = each(point.clone())
                gradient = None
                if outputs.requires_grad:
                    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).to(outputs)
                    (gradient,) = torch.autograd.grad((outputs * weights).sum(), point, allow_unused=True)
                gradients.append(torch.zeros_like(point) if gradient is None else gradient)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                return not gradients  # if the network itself fails, whoever needs its gradient will say so
    expected, found = gradients
    difference = torch.where((found == expected) | (found.isnan() & expected.isnan()), 0, (found - expected).abs())
    return bool(difference.max() <= _TOLERANCE * expected.nan_to_num(0).abs().max())


def _with_difference(prepared: Prepared, difference: float) -> Prepared:
    return replace(prepared, report=replace(prepared.report, largest_difference=difference))


# What torch.fx can trace


class _Tracer(fx.Tracer):
    """Down to the modules that torch defines, and to layers with weights of any kind."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, WEIGHTED) or super().is_leaf_module(m, module_qualified_name)


def _traced(module: nn.Module, batch: Tensor) -> Prepared:
    shadow = twin(module)
    # Whatever has a default keeps it.
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(shadow.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    traced = fx.GraphModule(shadow, _Tracer().trace(shadow, defaults), type(module).__name__)
    changes = _Rewriting(traced, shadow).changes
    observer = _Observer(traced)
    observer.run(batch)
    spatial_map = _name_spatial_map(traced, observer.spatial_map)
    traced.delete_all_unused_submodules()
    traced.graph.lint()  # type: ignore[no-untyped-call]
    traced.recompile()
    return Prepared(traced, _report(changes, observer.operations, (spatial_map, 0), None))


def _owner(node: fx.Node) -> str:
    """The module whose forward makes a call."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module":
        stack = stack[:-1]
    return stack[-1] if stack else ""


def _joined(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


class _Rewriting:
    """Makes modules of activations and pooling, one for each call, and undoes what works in place."""

    def __init__(self, traced: fx.GraphModule, twin: nn.Module) -> None:
        self.changes: dict[str, str] = {}
        self._traced, self._twin = traced, twin
        self._names = {name for name, _ in twin.named_modules()} | {name for name, _ in traced.named_modules()}
        self._order = {node: position for position, node in enumerate(traced.graph.nodes)}
        self._calls: Counter[str] = Counter()
        for node in list(traced.graph.nodes):
            if node.op == "call_module":
                self._module_call(node)
            elif node.op in ("call_function", "call_method"):
                self._function_call(node)
        traced.graph.eliminate_dead_code()

    def _module_call(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self._traced.get_submodule(name)
        _name_arguments(node)
        if getattr(module, "inplace", False) is True:
            self._undo_in_place(node)
            setattr(module, "inplace", False)  # noqa: B010 - modules declare none
        made = own_module(module)
        if made is None:
            return
        self._calls[name] += 1
        if self._calls[name] > 1:
            node.target = self._free_name(name)
            self.changes[str(node.target)] = f"call {self._calls[name]} of {name!r}"
        elif type(made) is not type(module):
            self.changes[name] = f"{type(module).__name__} made {type(made).__name__}"
        self._traced.add_submodule(str(node.target), made)

    def _function_call(self, node: fx.Node) -> None:
        _name_arguments(node)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            self._undo_in_place(node)
            name = name[:-1]
            owner: Any = torch.Tensor if isinstance(node.target, str) else torch
            if hasattr(owner, name):
                node.target = name if isinstance(node.target, str) else getattr(owner, name)
        made = self._module_for(node, name)
        if made is None:
            return
        owner = _owner(node)
        target = self._free_name(_joined(owner, name))
        self.changes[target] = f"function {name} made {type(made).__name__}"
        self._traced.add_submodule(target, made)
        node.op, node.target, node.args, node.kwargs = "call_module", target, (node.args[0],), {}

    def _module_for(self, node: fx.Node, name: str) -> nn.Module | None:
        if name == "batch_norm":
            return self._batch_norm(node)
        if not node.args or not isinstance(node.args[0], fx.Node) or node.target not in _called(name):
            return None
        if name in ("clamp", "clip", "clamp_min"):
            given = _bound(node, ("min", "max"))
            if given is None or given.get("min") is None:
                return None
            low, high = given["min"], given.get("max")
            if high is None:
                return nn.ReLU() if low == 0 else Elementwise(nn.Threshold(low, low))
            return own_module(nn.Hardtanh(low, high)) if low < high else None
        if name not in MODULE_OF_FUNCTION:
            return None
        kind, names = MODULE_OF_FUNCTION[name]
        given = _bound(node, (*names, "inplace"))
        if given is None:
            return None
        if given.pop("inplace", False):
            self._undo_in_place(node)
        module = kind(**given)
        return own_module(module) or module

    def _batch_norm(self, node: fx.Node) -> nn.Module | None:
        """Batch normalization by the function alone, as timm's kinds with an activation inside call it."""
        owner = _owner(node)
        kind = next((kind for kind in BATCH_NORMS if isinstance(self._twin.get_submodule(owner), kind)), None)
        names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
        mean, variance, weight, bias = (self._attribute(given.get(name)) for name in names[:4])
        if kind is None or given.get("training") or mean is None or variance is None:
            return None
        made: nn.Module = kind(len(mean), eps=given.get("eps", 1e-5), affine=False)
        made.running_mean, made.running_var = mean, variance
        for name, value in (("weight", weight), ("bias", bias)):
            made.register_parameter(name, _as_parameter(value))
        made.training = False
        return made

    def _attribute(self, value: Any) -> Any:
        """What a node reads from the network."""
        if isinstance(value, fx.Node) and value.op == "get_attr":
            return operator.attrgetter(str(value.target))(self._traced)
        return None

    def _undo_in_place(self, node: fx.Node) -> None:
        """Who uses what a call works on, later on, sees what it makes of it."""
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node):
            source.replace_all_uses_with(node, delete_user_cb=lambda user: self._order.get(user, 0) > self._order[node])

    def _free_name(self, name: str) -> str:
        free, count = name, 0
        while free in self._names:
            count += 1
            free = f"{name}_{count}"
        self._names.add(free)
        return free


def _as_parameter(value: Tensor | None) -> nn.Parameter | None:
    return value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)


def _called(name: str) -> frozenset[Any]:
    """What a node's target is where it calls the function or the method of that name."""
    return functions_named(name, f"{name}_") | {name, f"{name}_"}


def _name_arguments(node: fx.Node) -> None:
    """Give by position what was given by the names of the first arguments."""
    for position, key in enumerate(("input", "other")):
        if len(node.args) == position and key in node.kwargs:
            node.args = (*node.args, node.kwargs[key])
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != key}


def _bound(node: fx.Node, names: Sequence[str]) -> dict[str, Any] | None:
    """A call's arguments after the first, by name; None where one of them is computed."""
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    computed: list[fx.Node] = []
    fx.map_arg(given, computed.append)
    return None if computed else given


class _Observer(fx.Interpreter):
    """Runs a traced network and notes what each step does to the activations."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.operations: list[Operation] = []
        self.spatial_map: fx.Node | None = None  # the last node that gives a map
        self._channels = _Channels()
        self._pooled: set[fx.Node] = set()  # what is made of pooled activations alone
        self._has_input = False

    def run_node(self, n: fx.Node) -> Any:
        arguments: tuple[Any, ...] = () if n.op == "placeholder" else self.fetch_args_kwargs_from_env(n)[0]
        stamps = _stamps(arguments)
        result = super().run_node(n)
        if n.op == "placeholder":
            if not self._has_input:
                self._has_input = True
                self._channels.of_input(result)
                n.meta[ACTIVE] = True
            return result
        flags: list[bool] = []
        fx.map_arg((n.args, n.kwargs), lambda node: flags.append(ACTIVE in node.meta))
        is_module = n.op == "call_module"
        what: Any = self.fetch_attr(str(n.target)) if is_module else n.target
        what = getattr(torch.Tensor, what) if n.op == "call_method" else what
        if n.op == "output" or not any(flags) or not _holds_activations(result) or what in CONSTANTS:
            return result
        n.meta[ACTIVE] = True
        layer = str(n.target) if is_module else _joined(_owner(n), n.name)
        first = bool(n.args) and isinstance(n.args[0], fx.Node) and ACTIVE in n.args[0].meta
        facts = _weight_facts(what, arguments[0], _has_hook(what)) if is_module and arguments else {}
        facts["is_float"] = not isinstance(result, Tensor) or result.is_floating_point()
        what = torch.floor if n.kwargs.get("rounding_mode") else what
        self.operations.append(Operation(layer, what, sum(flags), first, _is_unchanged(result, stamps), **facts))
        if isinstance(result, Tensor):
            n.meta[DIMENSIONS] = result.dim()
            sources = [node for node in n.all_input_nodes if ACTIVE in node.meta]
            pooled = _is_pooled(result) or self._pooled.issuperset(sources)
            if pooled:
                self._pooled.add(n)
            self._channels.note(what, arguments, result)
            if self._channels.is_map(result) and not pooled:
                self.spatial_map = n
            elif result.dim() in (3, 4) and result.is_floating_point() and not pooled:
                self.spatial_map = None
        return result


def _stamps(arguments: Any) -> dict[int, int]:
    """Tensors by identity, and how often each was written to."""
    return {id(tensor): _version(tensor) for tensor in tensors_in(arguments)}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # those of inference mode count nothing


def _is_unchanged(result: Any, stamps: Mapping[int, int]) -> bool:
    """Whether what came out is what went in, and was not written to on the way."""
    return isinstance(result, Tensor) and stamps.get(id(result)) == _version(result)


def _holds_activations(result: Any) -> bool:
    """Masks and indices too: what is made of them depends on the input as well."""
    if isinstance(result, Tensor):
        return True
    return isinstance(result, (tuple, list)) and any(map(_holds_activations, result))


class _Channels:
    """Which dimension of activations [n, ., ., .] the channels are, to tell maps [n, channels, h, w] from others.

    Tokens and maps with channels last, which Grad-CAM knows nothing of, put an end to maps.
    """

    def __init__(self) -> None:
        self._of: Any = WeakTensorKeyDictionary()

    def of_input(self, inputs: Tensor) -> None:
        if inputs.dim() == 4:
            self._of[inputs] = 1

    def note(self, what: Any, given: Any, result: Tensor) -> None:
        """What a step makes of the activations that are given to it."""
        if result.dim() != 4 or not result.is_floating_point():
            return
        if isinstance(what, MAP_MODULES) or what in MAP_FUNCTIONS:
            self._of[result] = 1
            return
        for source in tensors_in(given):
            place = self._of.get(source)
            if place is not None:
                found = _same_dimension(source, place, result)
                if found is not None:
                    self._of[result] = found
                    return

    def is_map(self, result: Tensor) -> bool:
        return result.dim() == 4 and self._of.get(result) == 1


def _same_dimension(source: Tensor, place: int, result: Tensor) -> int | None:
    """Where a dimension [n, ., ., .] of a tensor is in what was made of it."""
    if result.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
        return place  # computed, number by number or along a dimension
    dimensions = list(zip(result.shape, result.stride(), strict=True))
    wanted = (source.shape[place], source.stride(place))
    return dimensions.index(wanted) if wanted in dimensions else None  # None where it was reshaped


def _is_pooled(tensor: Tensor) -> bool:
    return tensor.dim() == 2 or (tensor.dim() == 4 and tensor.shape[2] * tensor.shape[3] == 1)


def _has_hook(module: Any) -> bool:
    """Whether something runs before a layer that may change what goes into it, other than to compute its weight."""
    return bool(module._forward_pre_hooks) and not ("weight" in vars(module) and "weight" not in module._parameters)


def _weight_facts(module: nn.Module, batch: Any, has_hook: bool) -> dict[str, bool]:
    """Whether a layer applies its weight as it is, and does nothing else, as :class:`Operation` has it.

    Kinds of other libraries are asked by what they do: twice the weight, twice the input and the input's negative must
    have the effect that they have on a linear map.
    """
    if has_hook:
        return {"has_hook": True}
    if not isinstance(module, WEIGHTED) or not isinstance(batch, Tensor):
        return {}
    weight = module._parameters.get("weight")
    if weight is None:
        return {"has_plain_weight": False}  # computed by a parametrization
    if type(module) in WEIGHTED:
        return {}
    forward: Any = type(module).forward  # not the module itself, whose hooks would take part
    one = batch[:1].detach()

    def outputs(inputs: Tensor, factor: float = 1.0) -> Tensor:
        module._parameters["weight"] = nn.Parameter(factor * weight, requires_grad=False)
        try:
            result: Tensor = forward(module, inputs).double()
            return result
        finally:
            module._parameters["weight"] = weight

    def is_zero(difference: Tensor) -> bool:
        return bool(difference.abs().max() <= _TOLERANCE * once.abs().max())  # False for NaN

    with torch.no_grad():
        offset = outputs(torch.zeros_like(one))
        once = outputs(one) - offset
        affine = is_zero(outputs(2 * one) - offset - 2 * once) and is_zero(outputs(-one) - offset + once)
        plain = is_zero(outputs(one, 0.0) - offset) and is_zero(outputs(one, 2.0) - offset - 2 * once)
    return {"has_plain_weight": plain, "is_affine": affine}


def _name_spatial_map(traced: fx.GraphModule, node: fx.Node | None) -> str | None:
    """The module whose output is the last map: one is put behind a function that gives it, or one call of several."""
    if node is None:
        return None
    if node.op == "call_module" and sum(other.target == node.target for other in traced.graph.nodes) == 1:
        return str(node.target)
    taken = {name for name, _ in traced.named_modules()}
    name = _joined(_owner(node), node.name)
    while name in taken:
        name += "_map"
    traced.add_submodule(name, nn.Identity())
    with traced.graph.inserting_after(node):
        behind = traced.graph.call_module(name, (node,))
    behind.meta = dict(node.meta)
    node.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
    return name


# What it cannot


def _converted(module: nn.Module, batch: Tensor, untraceable: str) -> Prepared:
    """The network with its modules converted one by one: functions stay what they are."""
    shadow = twin(module)
    changes = {}
    for name, each in list(shadow.named_modules(remove_duplicate=False)):
        if getattr(each, "inplace", False) is True:
            each.inplace = False
        made = own_module(each)
        if made is not None and name and type(made) is not type(each):
            shadow.set_submodule(name, made)
            changes[name] = f"{type(each).__name__} made {type(made).__name__}"
    watch = _Watch(shadow)
    with ExitStack() as hooks:
        watch.attach(hooks)
        parameters = {name: each.detach() for name, each in shadow.named_parameters()}
        with torch.enable_grad():
            outputs = watch.run(shadow, parameters, batch.clone().requires_grad_().clone())
    hidden = watch.hidden_activation(outputs)
    return Prepared(shadow, _report(changes, watch.operations, watch.spatial_map(outputs), untraceable, hidden))


class _Watch(TorchFunctionMode):
    """Notes what a network does, as it runs, with tensors that require a gradient: those that depend on its input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._channels = _Channels()
        # Modules that give maps, None for an end to them; which call; and the step of the gradient.
        self._maps: list[tuple[str | None, int, Any]] = []
        self._calls: Counter[nn.Module] = Counter()
        self._names: dict[nn.Module, str] = {each: name for name, each in module.named_modules()}
        self._hooked = {each for each in self._names if _has_hook(each)}
        self._stack: list[tuple[str, dict[int, int]]] = []  # names, and what went in
        self._inside: nn.Module | None = None  # a module that is looked at as a whole
        self._steps: set[Any] = set()  # of the gradient, that give what was noted

    def run(self, module: nn.Module, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        self._channels.of_input(inputs)
        try:
            with self:
                outputs: Tensor = torch.func.functional_call(module, parameters, (inputs,))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise InvalidInputError(
                f"{type(module).__name__} does not run where a gradient is to be taken ({first_line(error)}), though "
                "it does without: no method that looks inside it can be used"
            ) from error
        return outputs

    def attach(self, hooks: ExitStack) -> None:
        for module in self._names:
            for handle in (
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
            ):
                hooks.callback(handle.remove)

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._stack.append((self._names[module], _stamps((arguments, keywords))))
        if self._inside is None and _is_leaf(module):
            self._inside = module

    def _leave(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], outputs: Any) -> None:
        name, stamps = self._stack.pop()
        self._calls[module] += 1
        if self._inside is not None and module is not self._inside:
            return
        is_leaf, self._inside = self._inside is not None, None
        given = (*arguments, *keywords.values())
        if isinstance(outputs, Tensor) and outputs.requires_grad and name:
            if is_leaf:
                self._channels.note(module, given, outputs)
            if not _is_pooled(outputs) and not all(map(_is_pooled, tensors_in(given))):
                is_map = self._channels.is_map(outputs)
                if is_map or (outputs.dim() in (3, 4) and outputs.is_floating_point()):
                    self._maps.append((name if is_map else None, self._calls[module] - 1, outputs.grad_fn))
        if is_leaf:
            self._inside = module  # what is tried out with it is no step of the network
            facts = _weight_facts(module, given[0] if given else None, module in self._hooked)
            self._inside = None
            self._note(name, module, given, outputs, stamps, **facts)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = (*args, *(kwargs or {}).values())
        stamps = _stamps(given) if self._inside is None else {}
        result = func(*args, **(kwargs or {}))
        if self._inside is None:
            name = getattr(func, "__name__", str(func))
            place = _joined(self._stack[-1][0] if self._stack else "", name)
            what = torch.floor if (kwargs or {}).get("rounding_mode") else func
            self._note(place, what, given, given[0] if func is torch.Tensor.__setitem__ else result, stamps)
            if isinstance(result, Tensor) and func not in CONSTANTS:
                self._channels.note(func, given, result)
        return result

    def _note(
        self, layer: str, what: Any, given: tuple[Any, ...], result: Any, stamps: Mapping[int, int], **facts: bool
    ) -> None:
        flags = [tensor.requires_grad for tensor in tensors_in(given)]
        # One number, not a mask, may only decide which way to go: sums of attributions are checked anyway.
        decides = isinstance(result, Tensor) and not result.is_floating_point() and result.numel() == 1
        if any(flags) and _holds_activations(result) and not decides and what not in CONSTANTS:
            first = bool(given) and isinstance(given[0], Tensor) and given[0].requires_grad
            facts["is_float"] = not isinstance(result, Tensor) or result.is_floating_point()
            self.operations.append(Operation(layer, what, sum(flags), first, _is_unchanged(result, stamps), **facts))
            self._steps.update(tensor.grad_fn for tensor in tensors_in(result))

    def hidden_activation(self, outputs: Tensor) -> str | None:
        """A step of the outputs' gradient that may be an activation and was not noted: what it is called."""
        for step in _steps(outputs):
            name = type(step).__name__
            # Those that torch does not name are whole scripted functions.
            is_opaque = isinstance(step, torch.autograd.function.BackwardCFunction) or name == "CppFunction"
            if step not in self._steps and (is_opaque or name.rstrip("0123456789") in _BENDING):
                return str(step.name()).rpartition("::")[2]
        return None

    def spatial_map(self, outputs: Tensor) -> tuple[str | None, int]:
        """The last module that gives a map of which the outputs are made, and by which call."""
        steps = _steps(outputs)
        return next(((name, call) for name, call, step in reversed(self._maps) if step in steps), (None, 0))


def _steps(outputs: Tensor) -> set[Any]:
    """All steps of the outputs' gradient."""
    waiting: list[Any] = [outputs.grad_fn] if outputs.grad_fn is not None else []
    known = set(waiting)
    while waiting:
        following = {after for after, _ in waiting.pop().next_functions if after is not None} - known
        known |= following
        waiting += following
    return known


def _is_leaf(module: nn.Module) -> bool:
    defined_by_torch = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
    return defined_by_torch or isinstance(module, (*WEIGHTED, ClippedReLU, Elementwise, MaxPool2d))


def _report(
    changes: Mapping[str, str],
    operations: Sequence[Operation],
    last_map: tuple[str | None, int],
    untraceable: str | None,
    hidden: str | None = None,
) -> Report:
    obstacles: dict[str, dict[str, str]] = {method: {} for method in INSIDE_METHODS}
    traced = untraceable is None
    for operation in operations:
        methods, reason = operation.obstacle(traced) or ((), "")
        for method in methods:
            obstacles[method].setdefault(operation.layer, reason)
    if not any(isinstance(operation.what, nn.ReLU) for operation in operations):
        for method in GUIDED_METHODS:
            obstacles[method].setdefault("the network", "it has no ReLU whose gradient could be guided")
    if hidden is not None:
        reason = f"it has an activation that cannot be seen ({hidden}), scripted or with a gradient of its own"
        for method in GUIDED_METHODS:
            obstacles[method].setdefault("the network", reason)
    if untraceable is not None:
        obstacles["lrp"] = {"the network": f"torch.fx cannot trace it ({untraceable})"}
    spatial_map, call = last_map
    if spatial_map is None:
        for method in MAP_METHODS:
            obstacles[method].setdefault("the network", "no layer before its answer gives a map [n, channels, h, w]")
    return Report(changes, obstacles, spatial_map, call, untraceable, 0.0)
