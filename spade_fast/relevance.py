"""Layer-wise relevance propagation (LRP; Bach et al. 2015) on prepared networks, with zennit's rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from spade_fast import operations, preparation
from spade_fast.errors import require
from spade_fast.preparation import Prepared
from spade_fast.rules import check_total, in_full_precision

# What keeps denominators from zero, with their sign: no larger, since relevance leaks through it.
_STABILIZER = 1e-12
# Of a layer's outputs: those below this share of the largest owe nothing to what came in, but to the bias alone.
_NEGLIGIBLE = 1e-9
# Of relevance's sum from the score, as a share of it: rounding in float32 takes a thousandth where scores are tiny.
_LARGEST_LEAK = 1e-2


def relevance(prepared: Prepared, inputs: Tensor, target: int) -> Tensor:
    """Relevance of each input for a class score, which it adds up to but for rounding.

    The rules are those of the composite "EpsilonPlusFlat" (Kohlbrenner et al. 2020), with biases left out of all
    denominators, so that none absorbs relevance: flat for layers with weights that see the inputs, z+ for other
    convolutions, epsilon for linear layers. An output that owes its value to the bias alone, as is common in
    depthwise layers, divides its relevance evenly instead of losing it. Batch norms are folded into the layers
    before them; those that follow none, activations and factors pass relevance on; sums of branches and averages
    divide it by contribution; max pooling gives it to the largest.

    Parameters
    ----------
    prepared
        What :func:`spade_fast.prepare` made of the network.
    inputs
        Model inputs [n, ...].
    target
        The class, an index into the outputs.

    Returns
    -------
    Tensor
        As the inputs, in units of the class score.

    Raises
    ------
    InvalidInputError
        If LRP is not valid on the network: the message names the layer, or by how much relevance misses the score.
    MissingDependencyError
        If zennit is not installed.
    """
    prepared.report.require("lrp")
    prepared, inputs = in_full_precision(prepared, inputs)
    network = _with_rules(prepared)
    with torch.inference_mode(False), torch.no_grad():
        expected = prepared.module(inputs.clone())[:, target]
    with torch.inference_mode(False), torch.enable_grad(), _composite(network).context(network):
        point = inputs.detach().clone().requires_grad_()
        outputs = network(point.clone())
        seed = torch.zeros_like(outputs)
        seed[:, target] = outputs.detach()[:, target]
        (found,) = torch.autograd.grad(outputs, point, seed)
    check_total("lrp", found, expected, expected, _LARGEST_LEAK, _padding(prepared))
    return found


def _padding(prepared: Prepared) -> str | None:
    """What pads maps before a layer does, if anything: the relevance of its zeros is lost."""
    modules = (
        name for name, each in prepared.module.named_modules() if isinstance(each, (nn.ZeroPad2d, nn.ConstantPad2d))
    )
    assert isinstance(prepared.module, fx.GraphModule)
    functions = (str(node.name) for node in prepared.module.graph.nodes if _function(node) is F.pad)
    found = next(iter((*modules, *functions)), None)
    return None if found is None else f"{found}, to whose zeros relevance is lost,"


def _with_rules(prepared: Prepared) -> fx.GraphModule:
    """A copy of the network that passes relevance where it would pass a gradient, but for layers with weights."""
    network = operations.twin(prepared.module)
    assert isinstance(network, fx.GraphModule)  # or the report would have refused
    _separate_calls(network)
    for node in list(network.graph.nodes):
        if not _is_active(node) or node.op == "placeholder":
            continue
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            if isinstance(module, operations.BATCH_NORMS) and _fold(network, node, module):
                continue
            if isinstance(module, (*operations.BATCH_NORMS, *operations.ACTIVATIONS)):
                _replace(network, node, _Pass(module))
            elif isinstance(module, (*operations.AVERAGE_POOLING, nn.Upsample)):
                _replace(network, node, _Share(module))
        elif _function(node) in operations.SUMS and all(map(_is_active, node.args)):
            node.op, node.target = "call_function", _split_sum
        elif _function(node) in operations.AVERAGES:
            _replace(network, node, _Share(_Call(node), _active_source(node)))
        elif _function(node) in operations.SUMS | operations.DIFFERENCES | operations.FACTORS:
            _replace(network, node, _Pass(_Call(node), _active_source(node)))
    network.graph.lint()  # type: ignore[no-untyped-call]
    network.recompile()
    return network


def _active_source(node: fx.Node) -> int:
    """Which of the nodes that a node uses is the activation."""
    return [_is_active(source) for source in node.all_input_nodes].index(True)


def _function(node: fx.Node) -> Any:
    return getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target


def _is_active(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and bool(argument.meta.get(preparation.ACTIVE))


def _separate_calls(network: fx.GraphModule) -> None:
    """A module for each call, as rules keep what went through a module until relevance comes back."""
    calls: Counter[str] = Counter()
    for node in network.graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            calls[name] += 1
            if calls[name] > 1:
                node.target = f"{name}_call_{calls[name]}"
                # With hooks of its own, through which zennit applies its rules.
                network.add_submodule(node.target, operations.twin(network.get_submodule(name)))


def _fold(network: fx.GraphModule, node: fx.Node, norm: Any) -> bool:
    """Fold a batch norm into the layer it follows, if it follows one that nothing else does."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
        return False
    layer: Any = network.get_submodule(str(source.target))
    if not isinstance(layer, operations.WEIGHTED):
        return False
    fused: nn.Module
    if isinstance(layer, nn.Linear):
        if source.meta.get(preparation.DIMENSIONS) != 2:  # the norm is over another dimension than the layer's outputs
            return False
        fused = fuse_linear_bn_eval(layer, norm)
    elif layer.transposed and layer.groups > 1:
        return False
    else:
        is_transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        fused = fuse_conv_bn_eval(layer, norm, is_transposed)
    network.add_submodule(str(source.target), fused)
    node.replace_all_uses_with(source)
    network.graph.erase_node(node)
    return True


def _replace(network: fx.GraphModule, node: fx.Node, module: _Rule) -> None:
    name = f"_{node.name}_rule"
    network.add_submodule(name, module)
    node.op, node.target = "call_module", name
    if isinstance(module.function, _Call):
        node.args, node.kwargs = tuple(node.all_input_nodes), {}


class _Call(nn.Module):
    """The call of a function that a node makes, of the tensors that go into it."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self._function = _function(node)
        self._arguments, self._keywords = node.args, node.kwargs
        self._nodes = node.all_input_nodes

    def forward(self, *tensors: Tensor) -> Tensor:
        values = dict(zip(self._nodes, tensors, strict=True))
        arguments, keywords = fx.map_arg((self._arguments, self._keywords), values.__getitem__)
        result: Tensor = self._function(*arguments, **keywords)
        return result


class _Rule(nn.Module):
    """A function of several inputs, one of which is an activation, with a rule for relevance."""

    def __init__(self, function: Callable[..., Tensor], active: int = 0) -> None:
        super().__init__()
        self.function, self.active = function, active


class _Pass(_Rule):
    """Whatever comes back goes on to the one activation that comes in."""

    def forward(self, *inputs: Any) -> Tensor:
        with torch.no_grad():
            result = self.function(*inputs)
        passed: Tensor = _PassOn.apply(inputs[self.active], result)  # type: ignore[no-untyped-call]
        return passed


class _Share(_Rule):
    """Whatever comes back is divided among the places of an activation by what each contributed."""

    def forward(self, *inputs: Any) -> Tensor:
        def of_active(value: Tensor) -> Tensor:
            return self.function(*inputs[: self.active], value, *inputs[self.active + 1 :])

        shared: Tensor = _ShareOut.apply(inputs[self.active], of_active)  # type: ignore[no-untyped-call]
        return shared


class _PassOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, result: Tensor) -> Tensor:
        ctx.shape = input.shape
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *found: Tensor) -> tuple[Tensor, None]:
        return found[0].sum_to_size(ctx.shape), None


class _ShareOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(input)
        return function(input)

    @staticmethod
    def backward(ctx: Any, *found: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        with torch.enable_grad():
            point = saved.detach().requires_grad_()
            result = ctx.function(point)
            dead = _is_negligible(result.detach())
            divided = found[0].masked_fill(dead, 0) / _stabilized(result.detach())
            (share,) = torch.autograd.grad(result, point, divided, retain_graph=True)
            # What is due to nothing goes to all places alike, in the shares in which they are summed.
            (even,) = torch.autograd.grad(result, point, torch.ones_like(result), retain_graph=True)
            total = ctx.function(even.detach()) if bool(dead.any()) else result.detach()
            (rest,) = torch.autograd.grad(result, point, torch.where(dead, found[0] / _stabilized(total), 0))
        return saved * share + even * rest, None


class _SplitSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(left, alpha * right)
        return torch.add(left, right, alpha=alpha)

    @staticmethod
    def backward(ctx: Any, *found: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        total = left + right
        dead = _is_negligible(total)
        share, half = found[0].masked_fill(dead, 0) / _stabilized(total), torch.where(dead, found[0] / 2, 0)
        return (left * share + half).sum_to_size(left.shape), (right * share + half).sum_to_size(right.shape), None


def _split_sum(left: Tensor, right: Tensor, *, alpha: float = 1) -> Tensor:
    total: Tensor = _SplitSum.apply(left, right, alpha)  # type: ignore[no-untyped-call]
    return total


def _is_negligible(outputs: Tensor) -> Tensor:
    return outputs.abs() <= _NEGLIGIBLE * outputs.abs().max()


def _stabilized(denominator: Tensor) -> Tensor:
    return denominator + torch.where(denominator < 0, -_STABILIZER, _STABILIZER)


def _composite(network: fx.GraphModule) -> Any:
    rules = require("zennit.rules", "interpret")
    composites = require("zennit.composites", "interpret")
    core = require("zennit.core", "interpret")
    layers: dict[str, nn.Module] = {}
    first = []  # what sees the inputs themselves
    behind: set[fx.Node] = set()  # what comes after a layer with weights
    for node in network.graph.nodes:
        if not _is_active(node):
            continue
        is_behind = not behind.isdisjoint(node.all_input_nodes)
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, operations.WEIGHTED):
            layers[str(node.target)] = module
            if not is_behind:
                first.append(str(node.target))
            is_behind = True
        if is_behind:
            behind.add(node)
    others = [name for name in layers if name not in first]
    zero = {"zero_params": ["bias"]}
    linear = [name for name in others if isinstance(layers[name], nn.Linear)]
    convolutions = [name for name in others if name not in linear]
    ones = core.ParamMod(lambda parameter, _: torch.ones_like(parameter), **zero)

    def divide(found: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """By contribution, the last of the outputs apart; where there is none, evenly, by the last."""
        *contributions, places = outputs
        total = torch.stack(contributions).sum(dim=0)
        dead = _is_negligible(total)
        shares = found.masked_fill(dead, 0) / _stabilized(total)
        return [shares] * len(contributions) + [torch.where(dead, found / _stabilized(places), 0)]

    def collect(inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
        return torch.stack(list(map(torch.mul, inputs, gradients))).sum(dim=0)

    z_plus = core.BasicHook(
        input_modifiers=[lambda x: x.clamp(min=0), lambda x: x.clamp(max=0), torch.ones_like],
        param_modifiers=[rules.ClampMod(min=0.0, **zero), rules.ClampMod(max=0.0, **zero), ones],
        output_modifiers=[lambda output: output] * 3,
        gradient_mapper=divide,
        reducer=collect,
    )
    epsilon = core.BasicHook(
        input_modifiers=[lambda x: x, torch.ones_like],
        param_modifiers=[rules.NoMod(**zero), ones],
        output_modifiers=[lambda output: output] * 2,
        gradient_mapper=divide,
        reducer=collect,
    )
    return composites.NameMapComposite(
        [
            (first, rules.Flat(stabilizer=_STABILIZER, **zero)),
            (convolutions, z_plus),
            (linear, epsilon),
        ]
    )
