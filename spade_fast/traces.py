"""The trace: what is left of a network once it is pruned for an image."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spade_fast.errors import InvalidInputError
from spade_fast.files import read_tensors, write_tensors
from spade_fast.models import LoadedModel, bare_module, usable_device
from spade_fast.readonly import ReadOnlyMappings
from spade_fast.solver import Fallback, Solution

_METADATA_KEY = "spade_fast_trace"
_REPORTED = ("requested_sparsity", "loss", "damping", "fallback")


class PackedMask(NamedTuple):
    """The mask of a layer: the shape of its weight, and uint8 [bytes], eight weights a byte in their order."""

    shape: tuple[int, ...]
    bits: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """One pruned layer of a trace.

    Attributes
    ----------
    weight
        Sparse weight, shape and dtype of the layer's own.
    mask
        bool, same shape: True where a weight was kept. False for all weights of inputs that were never active.
    requested_sparsity
        The target, 0..1.
    loss, damping, fallback
        As in :class:`spade_fast.Solution`.
    """

    weight: Tensor
    mask: Tensor
    requested_sparsity: float
    loss: float
    damping: float
    fallback: Fallback | None = None

    @classmethod
    def of(cls, solution: Solution, requested_sparsity: float) -> LayerTrace:
        """The layer that a solution and its target make."""
        return cls(
            weight=solution.weight,
            mask=solution.mask,
            requested_sparsity=requested_sparsity,
            loss=solution.loss,
            damping=solution.damping,
            fallback=solution.fallback,
        )

    @property
    def sparsity(self) -> float:
        """Share of the weights that was pruned."""
        return 1 - self.mask.count_nonzero().item() / self.mask.numel()

    @property
    def empty_outputs(self) -> int:
        """Number of outputs (rows) left without any weight."""
        return int((~self.mask.flatten(1).any(dim=1)).count_nonzero())


@dataclass(frozen=True, eq=False)
class Trace(ReadOnlyMappings):
    """A network's sparse trace for an image or a set of images (SPADE section 3).

    It holds the pruned layers only, and never touches the model it was made from.

    Attributes
    ----------
    layers
        Pruned layers by module name.
    dense
        Layers left dense, by module name: why.
    settings
        How the trace was made: plain JSON values.
    """

    layers: Mapping[str, LayerTrace]
    dense: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of the weights of all layers in the trace that was pruned; 0 for a trace without layers."""
        kept = sum(layer.mask.count_nonzero().item() for layer in self.layers.values())
        total = sum(layer.mask.numel() for layer in self.layers.values())
        return 1 - kept / total if total else 0.0

    @contextlib.contextmanager
    def applied(self, model: nn.Module | LoadedModel) -> Iterator[nn.Module]:
        """Swap the sparse weights into the model, and back on leaving, bit for bit, whatever happens inside.

        The model's own parameters are put aside whole, not copied over, and put back as the same objects. Blocks
        may be nested, and then end in the order of nesting; the innermost trace counts. Other threads see the sparse
        weights too.

        Parameters
        ----------
        model
            The model the trace was made from, or one with layers of the same names and shapes.

        Yields
        ------
        nn.Module
            The model itself.

        Raises
        ------
        InvalidInputError
            If a layer of the trace is missing in the model, has another shape, or shares its weight with one that the
            trace does not treat alike, or another thread has applied a trace to the model; nothing is swapped then.
        """
        module = bare_module(model)
        with _applied_by_one_thread(module):
            yield from self._swapped(module)

    def _swapped(self, module: nn.Module) -> Iterator[nn.Module]:
        replacements = self._replacements(module)
        originals = [(owner, owner._parameters["weight"]) for owner, _ in replacements]

        def restore() -> None:
            for owner, parameter in originals:
                owner._parameters["weight"] = parameter

        try:
            for owner, parameter in replacements:
                owner._parameters["weight"] = parameter
            yield module
        finally:
            try:
                restore()
            finally:  # again, should Ctrl-C have cut it short
                restore()

    def pruned_copy(self, model: nn.Module | LoadedModel) -> nn.Module:
        """A deep copy of the model with the sparse weights in place.

        Raises
        ------
        InvalidInputError
            As :meth:`applied`.
        """
        with torch.inference_mode(False):
            duplicate = copy.deepcopy(bare_module(model))
        for owner, parameter in self._replacements(duplicate):
            owner._parameters["weight"] = parameter
        return duplicate

    def overlap(self, other: Trace) -> dict[str, float]:
        """Overlap of the kept weights, intersection over union, for each layer that both traces pruned.

        1 for equal masks (two empty ones too), 0 for disjoint ones.

        Raises
        ------
        InvalidInputError
            If the traces share no layer, or a shared layer differs in shape.
        """
        shared = [name for name in self.layers if name in other.layers]
        if not shared:
            raise InvalidInputError("the two traces have no pruned layer in common: were they made from one model?")
        result = {}
        for name in shared:
            mine, theirs = self.layers[name].mask, other.layers[name].mask
            if mine.shape != theirs.shape:
                raise InvalidInputError(
                    f"layer {name!r} has shape {list(mine.shape)} in one trace and {list(theirs.shape)} in the other"
                )
            theirs = theirs.to(mine.device)
            union = (mine | theirs).count_nonzero().item()
            result[name] = (mine & theirs).count_nonzero().item() / union if union else 1.0
        return result

    def masks(self) -> dict[str, PackedMask]:
        """The masks of the pruned layers, by name, a bit for each weight."""
        return {
            name: PackedMask(tuple(layer.mask.shape), np.packbits(layer.mask.cpu().numpy()))
            for name, layer in self.layers.items()
        }

    def rows(self) -> list[dict[str, Any]]:
        """The report, a row for each pruned layer: plain JSON values."""
        return [
            {
                "layer": name,
                "shape": list(layer.weight.shape),
                "requested_sparsity": layer.requested_sparsity,
                "sparsity": layer.sparsity,
                "empty_outputs": layer.empty_outputs,
                "loss": layer.loss,
                "damping": layer.damping,
                "fallback": layer.fallback,
            }
            for name, layer in self.layers.items()
        ]

    def summary(self) -> str:
        """The report as a plain text table, followed by the layers left dense."""
        width = max((len(name) for name in (*self.layers, *self.dense)), default=5)
        lines = [f"{'layer':{width}}  {'shape':>18}  requested  sparsity      loss  damping  fallback"]
        for row in self.rows():
            shape = "x".join(map(str, row["shape"]))
            lines.append(
                f"{row['layer']:{width}}  {shape:>18}  {row['requested_sparsity']:>9.3f}  {row['sparsity']:>8.3f}  "
                f"{row['loss']:>8.2e}  {row['damping']:>7.1e}  {row['fallback'] or '-'}"
            )
        lines += [f"{name:{width}}  dense: {reason}" for name, reason in self.dense.items()]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to one safetensors file, whole or not at all: its kept weights, and a bit for each weight.

        Raises
        ------
        InvalidInputError
            If the file cannot be written.
        """
        header, tensors = self.to_tensors()
        write_tensors(path, _METADATA_KEY, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Trace:
        """Read what :meth:`save` wrote.

        Raises
        ------
        InvalidInputError
            If the file cannot be read, is no trace, or contradicts itself; the message names the file.
        """
        target = usable_device(device)
        with read_tensors(path, _METADATA_KEY, "a trace", "Trace.save") as (header, tensors):
            return cls.from_tensors(header, tensors, device=target)

    def to_tensors(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What is written of a trace: plain JSON values; and tensors on the CPU, by name.

        Of each layer the kept weights alone, in the order of the weights, and the mask, eight weights a byte.
        """
        layers, tensors, masks = {}, {}, self.masks()
        for name, layer in self.layers.items():
            layers[name] = {"shape": list(layer.weight.shape), **{key: getattr(layer, key) for key in _REPORTED}}
            tensors[f"{name}.kept"] = layer.weight.detach().cpu()[layer.mask.cpu()]
            tensors[f"{name}.mask"] = torch.from_numpy(masks[name].bits)
        return {"layers": layers, "dense": dict(self.dense), "settings": dict(self.settings)}, tensors

    @classmethod
    def from_tensors(
        cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], *, device: torch.device | str = "cpu"
    ) -> Trace:
        """The trace that :meth:`to_tensors` gave; KeyError, TypeError or ValueError if they contradict each other."""
        layers = {}
        for name, report in header["layers"].items():
            kept, packed, shape = tensors[f"{name}.kept"], tensors[f"{name}.mask"], report["shape"]
            mask = unpacked_mask(packed, shape)
            if kept.dim() != 1 or not kept.is_floating_point() or len(kept) != int(mask.count_nonzero()):
                raise ValueError(f"mask and weights of layer {name!r} contradict each other")
            weight = torch.zeros(shape, dtype=kept.dtype).masked_scatter_(mask, kept)
            layers[name] = LayerTrace(weight.to(device), mask.to(device), **{key: report[key] for key in _REPORTED})
            if not _is_sound(layers[name]):
                raise ValueError(f"the report of layer {name!r} holds other values than a trace's")
        dense, settings = dict(header["dense"]), dict(header["settings"])
        if not all(isinstance(reason, str) for reason in dense.values()):
            raise ValueError("the layers left dense have no reasons")
        return cls(layers, dense, settings)

    @staticmethod
    def masks_from_tensors(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, PackedMask]:
        """:meth:`masks` of the trace that :meth:`to_tensors` gave, without its weights; errors as of `from_tensors`."""
        masks = {}
        for name, report in header["layers"].items():
            packed, shape = tensors[f"{name}.mask"], report["shape"]
            unpacked_mask(packed, shape)
            masks[name] = PackedMask(tuple(shape), packed.numpy())
        return masks

    def _replacements(self, module: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
        """For each layer, the module that owns its weight and the sparse parameter to put there."""
        modules = dict(module.named_modules())
        owners: dict[int, list[str]] = {}  # of each parameter, by its identity
        for parameter_name, parameter in module.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(parameter_name.removesuffix(".weight"))
        problems, found = [], []
        sparse: dict[int, nn.Parameter] = {}  # tied layers get one parameter again
        for name, layer in self.layers.items():
            weight = modules[name]._parameters.get("weight") if name in modules else None
            if weight is None:
                problems.append(f"{name!r} is missing")
                continue
            if weight.shape != layer.weight.shape:
                problems.append(f"{name!r} has shape {list(weight.shape)}, the trace {list(layer.weight.shape)}")
                continue
            for tied in owners[id(weight)]:
                if tied not in self.layers or not torch.equal(self.layers[tied].weight, layer.weight):
                    problems.append(f"{name!r} shares its weight with {tied!r}, but not in the trace")
            if id(weight) not in sparse:
                with torch.inference_mode(False):  # parameters made in it could not take part in a gradient
                    value = torch.empty_like(weight, requires_grad=False).copy_(layer.weight)
                    sparse[id(weight)] = nn.Parameter(value, requires_grad=weight.requires_grad)
            found.append((modules[name], sparse[id(weight)]))
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise InvalidInputError(
                f"the trace does not fit this {type(module).__name__}: {'; '.join(problems[:5])}{more}. "
                "Apply it to the model it was made from"
            )
        return found


def unpacked_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of that shape in bytes of :meth:`Trace.to_tensors`; ValueError if there are too few, or too many."""
    if len(shape) < 2 or not all(type(side) is int and 0 <= side < 2**31 for side in shape):
        raise ValueError(f"{shape!r} is no shape")
    count = math.prod(shape)
    bits = np.unpackbits(packed.numpy())
    if packed.dim() != 1 or len(packed) != -(-count // 8) or bits[count:].any():
        raise ValueError(f"a mask of {len(bits)} bits is not one of {list(shape)} weights")
    return torch.from_numpy(bits[:count]).view(torch.bool).reshape(tuple(shape))


def _is_sound(layer: LayerTrace) -> bool:
    """Whether a layer's report holds the values that it could."""
    numbers = (layer.requested_sparsity, layer.loss, layer.damping)
    are_numbers = all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers)
    # Compared as they are, since a whole number may be too large to be converted.
    in_range = are_numbers and all(0 <= number <= sys.float_info.max for number in numbers)
    return in_range and layer.requested_sparsity <= 1 and layer.fallback in (None, *get_args(Fallback))


_applying_lock = threading.Lock()
# Models to which traces are applied: by which thread, and how many.
_applying: weakref.WeakKeyDictionary[nn.Module, tuple[int, int]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _applied_by_one_thread(module: nn.Module) -> Iterator[None]:
    """Refuse a second thread, whose weights could not be told from those to be put back."""
    thread = threading.get_ident()
    with _applying_lock:
        owner, count = _applying.get(module, (thread, 0))
        if owner != thread:
            raise InvalidInputError(
                "another thread has applied a trace to this model: use trace.pruned_copy(model), or one model a thread"
            )
        _applying[module] = thread, count + 1
    try:
        yield
    finally:
        with _applying_lock:
            _, count = _applying.pop(module)
            if count > 1:
                _applying[module] = thread, count - 1
