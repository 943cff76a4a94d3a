"""DeepLIFT and guided backpropagation: rules by which a gradient passes activations.

captum finds activations by hooks on the tensors that go into them. A tensor that goes elsewhere too, past a skip
connection for one, then loses the other branch's share without a word; and its rule for max pooling holds for
references alone that are the same everywhere. Here the activations of a prepared network are replaced by functions with
a rule of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast.errors import InvalidInputError, first_line
from spade_fast.operations import ACTIVATIONS, MaxPool2d, twin
from spade_fast.preparation import Prepared

# Of contributions' sum from what it must be, as a share of that.
_LARGEST_GAP = 1e-4
# Units of rounding that a sum, or a score in a batch, may be off by.
_ROUNDING = 256
# Differences from the reference below which an activation's own slope is taken, as captum does.
_SMALLEST_DIFFERENCE = 1e-10


def deep_lift(prepared: Prepared, inputs: Tensor, baseline: Tensor, target: int) -> Tensor:
    """Contributions of the inputs' differences from a baseline to that of a class score (Shrikumar et al. 2017).

    The rescale rule, for every elementwise activation; of a max pooling, an output above its reference owes that to the
    largest input, one below to the reference's largest; of several that are equally large, to the one whose counterpart
    is largest. Contributions add up to the difference of the score.

    Parameters
    ----------
    prepared
        What :func:`spade_fast.prepare` made of the network.
    inputs, baseline
        Model inputs [n, ...] of one shape.
    target
        The class, an index into the outputs.

    Returns
    -------
    Tensor
        As the inputs, in units of the class score.

    Raises
    ------
    InvalidInputError
        If DeepLIFT is not valid on the network: the message names the layer, or by how much contributions miss the
        score's difference.
    """
    prepared.report.require("deep_lift")
    prepared, inputs = in_full_precision(prepared, inputs)
    baseline = baseline.to(inputs)
    network = _with_rule(prepared, lambda module: _Rescale(module) if _is_nonlinear(module) else None)
    with torch.inference_mode(False), torch.no_grad():
        alone = torch.cat([prepared.module(each.clone())[:, target] for each in (inputs, baseline)])
    with torch.inference_mode(False), torch.enable_grad():
        both = torch.cat([inputs, baseline]).detach().clone().requires_grad_()
        scores = _together(network, both.clone())[:, target]  # a network may begin in place
        try:
            _check_apart(scores.detach(), alone)
            (multipliers,) = torch.autograd.grad(scores[: len(inputs)].sum(), both)
            contributions = (inputs - baseline).detach() * multipliers[: len(inputs)]
            check_total("deep_lift", contributions, torch.sub(*alone.chunk(2)), alone, _LARGEST_GAP)
        except torch.OutOfMemoryError:
            raise
        except (InvalidInputError, RuntimeError) as error:  # of a rule that finds no reference where it looks for it
            layer = _first_mixed(prepared.module, inputs, baseline)
            if layer is None:
                raise
            raise InvalidInputError(
                f"method 'deep_lift' is not valid on this network: {layer}: what it gets of an image depends on the "
                "others of the batch, or does not have the images along its first dimension; choose another method"
            ) from error
    return contributions


def _first_mixed(network: nn.Module, inputs: Tensor, baseline: Tensor) -> str | None:
    """The first layer that gets of both images together something else than of each alone, but for rounding."""
    alone, others, together = (
        _layer_inputs(network, batch) for batch in (inputs, baseline, torch.cat([inputs, baseline]))
    )
    for (layer, one), (_, other), (_, both) in zip(alone, others, together, strict=False):
        if one.is_floating_point() and differs(both, torch.cat([one, other])):
            return layer
    return None


def _layer_inputs(network: nn.Module, batch: Tensor) -> list[tuple[str, Tensor]]:
    """What goes into each layer first, in the order of their calls."""
    copied = twin(network)
    found: list[tuple[str, Tensor]] = []
    for name, module in copied.named_modules():
        if not any(module.children()):

            def note(_: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
                found.extend((name, each.clone()) for each in given[:1] if isinstance(each, Tensor) and each.dim())

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        copied(batch.clone())
    return found


def _together(network: nn.Module, both: Tensor) -> Tensor:
    try:
        outputs: Tensor = network(both)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InvalidInputError(
            "method 'deep_lift' runs input and baseline as one batch, on which this network fails "
            f"({first_line(error)}): choose another method, or let the network take several images"
        ) from error
    return outputs


def _check_apart(together: Tensor, alone: Tensor) -> None:
    """Raise InvalidInputError unless images of one batch get the scores that they get alone, but for rounding."""
    if differs(together, alone):
        raise InvalidInputError(
            "method 'deep_lift' is not valid on this network: what it makes of an image depends on the others of the "
            "batch; choose another method"
        )


def differs(found: Tensor, expected: Tensor) -> bool:
    """Whether there is more between them than rounding."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    tolerance = max(_LARGEST_GAP, _ROUNDING * torch.finfo(expected.dtype).eps)
    return found.shape != expected.shape or bool((found - expected).abs().max() > tolerance * scale)


def in_full_precision(prepared: Prepared, inputs: Tensor) -> tuple[Prepared, Tensor]:
    """Network and inputs in float32 at least: what half precision rounds, no sum could tell from what is wrong."""
    if inputs.dtype not in (torch.float16, torch.bfloat16):
        return prepared, inputs
    return replace(prepared, module=copy.deepcopy(prepared.module).float()), inputs.float()


def check_total(
    method: str,
    attributions: Tensor,
    expected: Tensor,
    scores: Tensor,
    tolerance: float,
    suspect: str | None = None,
) -> None:
    """Raise InvalidInputError unless attributions [n, ...] add up to what they must [n].

    They may miss it by a share of it, and by the rounding of their sum and of the scores [...] that it is made of. The
    suspect is a layer that may be to blame.
    """
    found = attributions.double().flatten(1)
    magnitude = found.abs().sum(dim=1) + scores.double().abs().max()
    rounding = _ROUNDING * torch.finfo(attributions.dtype).eps * magnitude
    if bool(((found.sum(dim=1) - expected.double()).abs() > tolerance * expected.double().abs() + rounding).any()):
        raise InvalidInputError(
            f"method {method!r} is not valid on this network: its attributions add up to {found.sum(1)[0]:.4g}, not to "
            f"{expected[0]:.4g}, so {suspect or 'some operation'} has no rule that holds; choose another method"
        )


def guided_backprop(prepared: Prepared, inputs: Tensor, target: int) -> Tensor:
    """The gradient of a class score, of which each ReLU passes only what is positive (Springenberg et al. 2015).

    Parameters, returns and raises as :func:`deep_lift`.
    """
    prepared.report.require("guided_backprop")
    network = _with_rule(prepared, lambda module: _Guided(module) if isinstance(module, nn.ReLU) else None)
    with torch.inference_mode(False), torch.enable_grad():
        point = inputs.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(point.clone())[:, target].sum(), point)
    return gradient


def _is_nonlinear(module: nn.Module) -> bool:
    return isinstance(module, (*ACTIVATIONS, MaxPool2d))


def _with_rule(prepared: Prepared, rule: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of the network with other modules where the rule gives them."""
    network = twin(prepared.module)
    for name, module in list(network.named_modules(remove_duplicate=False)):
        replaced = rule(module)
        if replaced is not None:
            network.set_submodule(name, replaced)
    return network


class _Ruled(nn.Module):
    """An activation whose gradient has a rule of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class _Rescale(_Ruled):
    def forward(self, input: Tensor) -> Tensor:
        function = _RescaledPool if isinstance(self.module, MaxPool2d) else _Rescaled
        output: Tensor = function.apply(input, self.module)  # type: ignore[no-untyped-call]
        return output


class _Guided(_Ruled):
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _Clamped.apply(self.module(input))  # type: ignore[no-untyped-call]
        return output


class _Clamped(torch.autograd.Function):
    """The identity, through which no negative gradient passes."""

    @staticmethod
    def forward(_: Any, input: Tensor) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp(min=0)


class _Rescaled(torch.autograd.Function):
    """An activation of inputs and their references, which follow them along the batch."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(input)
        output: Tensor = module(input)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (both,) = ctx.saved_tensors
        with torch.enable_grad():
            point = both.detach().requires_grad_()
            result = ctx.module(point)
            (slope,) = torch.autograd.grad(result.sum(), point)
        (values, references), (outputs, others) = both.chunk(2), result.detach().chunk(2)
        difference = values - references
        multiplier = torch.where(
            difference.abs() < max(_SMALLEST_DIFFERENCE, torch.finfo(both.dtype).tiny),
            slope.chunk(2)[0],
            (outputs - others) / difference,
        )
        passed = gradients[0].chunk(2)[0] * multiplier
        return torch.cat([passed, torch.zeros_like(passed)]), None


class _RescaledPool(_Rescaled):
    """A max pooling of inputs and their references, which follow them along the batch."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (both,) = ctx.saved_tensors
        values, references = both.chunk(2)
        windows = _Windows(ctx.module, values)
        x, r = windows.of(values), windows.of(references)
        highest, other = x.amax(dim=2, keepdim=True), r.amax(dim=2, keepdim=True)
        # Whoever decides an output that differs from its reference differs from its own by as much at least.
        rises, falls = _first_by(x, r), _first_by(r, x)
        decides = torch.where(highest > other, rises, falls)  # [n, c, 1, outputs]
        gradient = gradients[0].chunk(2)[0].flatten(2)[:, :, None]
        share = gradient * (highest - other)
        contributions = windows.sum(torch.zeros_like(x).scatter_(2, decides, share))
        passed = torch.where(contributions == 0, 0, contributions / (values - references))
        return torch.cat([passed, torch.zeros_like(passed)]), None


def _first_by(first: Tensor, second: Tensor) -> Tensor:
    """Where along the third dimension the first is largest, and of these places the second."""
    is_largest = first == first.amax(dim=2, keepdim=True)
    return second.masked_fill(~is_largest, -torch.inf).argmax(dim=2, keepdim=True)


class _Windows:
    """The windows of a max pooling over maps [n, c, h, w]."""

    def __init__(self, module: MaxPool2d, maps: Tensor) -> None:
        self._kernel, self._dilation = _pair(module.kernel_size), _pair(module.dilation)
        self._stride, padding = _pair(module.stride), _pair(module.padding)
        outputs = module(maps[:1, :1]).shape[2:]
        self._size = maps.shape
        reach = [self._dilation[i] * (self._kernel[i] - 1) + 1 for i in range(2)]
        self._padded = [(outputs[i] - 1) * self._stride[i] + reach[i] for i in range(2)]
        # What is left over beyond the last window is cut off.
        self._before = padding
        self._after = [self._padded[i] - padding[i] - maps.shape[2 + i] for i in range(2)]

    def of(self, maps: Tensor) -> Tensor:
        """[n, c, places, outputs], minus infinity beyond the maps."""
        padding = (self._before[1], self._after[1], self._before[0], self._after[0])
        padded = F.pad(maps, padding, value=-torch.inf).flatten(0, 1)[:, None]
        found = F.unfold(padded, self._kernel, self._dilation, 0, self._stride)
        return found.view(*self._size[:2], *found.shape[1:])

    def sum(self, windows: Tensor) -> Tensor:
        """Maps that hold the sums of what all windows have at each place."""
        height, width = self._padded
        folded = F.fold(windows.flatten(0, 1), (height, width), self._kernel, self._dilation, 0, self._stride)
        top, left = self._before
        maps = folded.view(*self._size[:2], height, width)[:, :, top:, left:][:, :, : self._size[2], : self._size[3]]
        return F.pad(maps, (0, self._size[3] - maps.shape[3], 0, self._size[2] - maps.shape[2]))


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
