"""One image pruned to every sparsity of a grid: traces by many plans at the cost of little more than one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast import ops
from spade_fast.errors import InvalidInputError
from spade_fast.models import LoadedModel
from spade_fast.plans import SparsityPlan, check_shares
from spade_fast.readonly import ReadOnlyMappings
from spade_fast.solver import Fallback, Solution
from spade_fast.tracer import FIRST_LAYER, Picture, observe, prepare_tracing, solve_observed, trace
from spade_fast.traces import LayerTrace, Trace


@dataclass(frozen=True, eq=False)
class Sweep(ReadOnlyMappings):
    """What :func:`sweep` gives.

    Attributes
    ----------
    grid
        Shares of the weights, ascending, all above 0.
    errors
        By layer, for each share of the grid: the squared error of the layer's outputs, as a share of the outputs
        themselves without their bias; on the augmented views, damping included.
    dense
        Layers that stay dense under any plan: why.
    settings
        As in :class:`spade_fast.Trace`.
    """

    grid: tuple[float, ...]
    errors: Mapping[str, tuple[float, ...]]
    dense: Mapping[str, str]
    settings: Mapping[str, Any]
    _layers: Mapping[str, tuple[_Packed, ...]]
    _leaders: Mapping[str, str]

    def trace(self, plan: SparsityPlan) -> Trace:
        """The trace by a plan whose targets are 0 or in the grid: that of :func:`spade_fast.trace`, bit for bit.

        Raises
        ------
        InvalidInputError
            For what is no plan, a target that is not in the grid, and a key that names no layer.
        """
        if not isinstance(plan, SparsityPlan):
            raise InvalidInputError(f"plan must be a SparsityPlan, got a {type(plan).__name__}")
        plan.check_keys([*self._leaders, *self.dense])
        for name, reason in self.dense.items():
            if reason == FIRST_LAYER and name in plan.targets and plan.targets[name]:
                raise InvalidInputError(f"layer {name!r} was left out as the first layer: name it in `layers`")
        targets_of: dict[str, dict[float | None, str]] = {}
        for name, leader in self._leaders.items():
            tied = targets_of.setdefault(leader, {})
            tied.setdefault(plan.target(name) or None, name)
            if len(tied) > 1:
                one, other = tied.values()
                raise InvalidInputError(
                    f"layers {one!r} and {other!r} share one weight, but have different targets: give both the same"
                )
        layers, dense = {}, dict(self.dense)
        unpacked: dict[tuple[str, float], LayerTrace] = {}  # tied layers share theirs
        for name, leader in self._leaders.items():
            target = plan.target(name)
            if not target:
                dense[name] = "not in the plan" if target is None else "target sparsity 0"
                continue
            if target not in self.grid:
                shares = ", ".join(f"{share:g}" for share in (0.0, *self.grid))
                raise InvalidInputError(f"layer {name!r} has target {target:g}, but what was solved is {shares}")
            if (leader, target) not in unpacked:
                solution = self._layers[leader][self.grid.index(target)].unpacked()
                unpacked[leader, target] = LayerTrace.of(solution, target)
            layers[name] = unpacked[leader, target]
        return Trace(layers, dense, self.settings)


def sweep(
    model: nn.Module | LoadedModel,
    image: Picture | Sequence[Picture],
    grid: Sequence[float],
    *,
    layers: Sequence[str] | None = None,
    **settings: Any,
) -> Sweep:
    """Prune every layer for an image to each of several sparsities; the Hessians and their factors are made once.

    Parameters
    ----------
    model, image, layers, settings
        As in :func:`spade_fast.trace`.
    grid
        Shares of the weights, 0..1.

    Raises
    ------
    InvalidInputError
        As :func:`spade_fast.trace`.
    """
    shares = check_shares(grid)
    defaults: dict[str, Any] = trace.__kwdefaults__ or {}
    tracing = prepare_tracing(model, max(shares), **{**defaults, **settings, "layers": layers})
    tracing = replace(tracing, backend=ops.resolve_backend(tracing.backend, tracing.device))
    observed = observe(tracing, image)
    packed, errors = {}, {}
    for _, name, solutions, of_outputs in solve_observed(tracing, [observed], shares):
        packed[name] = tuple(_Packed.of(solution) for solution in solutions)
        errors[name] = of_outputs
    leaders = {name: leader for name, leader in tracing.selection.leaders.items() if leader in packed}
    return Sweep(
        grid=shares,
        errors={name: errors[leader] for name, leader in leaders.items()},
        dense=observed.dense,
        settings=tracing.settings(observed.images),
        _layers=packed,
        _leaders=leaders,
    )


@dataclass(frozen=True)
class _Packed:
    """A solution without its zeros."""

    values: Tensor  # the kept weights, row by row
    bits: Tensor  # uint8, the mask, eight weights to a byte
    like: Tensor  # on the meta device: shape, strides and dtype
    loss: float
    damping: float
    fallback: Fallback | None

    @classmethod
    def of(cls, solution: Solution) -> _Packed:
        flat = solution.mask.flatten()
        eights = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
        return cls(
            values=solution.weight.flatten()[flat],
            bits=(eights * _places(flat.device)).sum(dim=1, dtype=torch.uint8),
            like=torch.empty_like(solution.weight, device="meta"),
            loss=solution.loss,
            damping=solution.damping,
            fallback=solution.fallback,
        )

    def unpacked(self) -> Solution:
        device = self.values.device
        flat = (self.bits[:, None] & _places(device)).ne(0).flatten()[: self.like.numel()]
        mask = flat.view(self.like.shape)
        weight = torch.zeros_like(self.like, device=device).masked_scatter_(mask, self.values)
        return Solution(weight, mask, self.loss, self.damping, self.fallback)


def _places(device: torch.device) -> Tensor:
    """What each bit of a byte counts."""
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)
