"""Tracing: augment the image, run the dense model once, prune every layer on what flowed into it."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast import ops, presets
from spade_fast.augmentation import Augmentation
from spade_fast.elimination import BlockLayout
from spade_fast.errors import InvalidInputError, check_whole
from spade_fast.folding import FoldedBatchNorms, FoldingMismatch, learn_folds
from spade_fast.heap import kept_heap
from spade_fast.images import image_tensor
from spade_fast.interruption import checkpoint
from spade_fast.layers import (
    GramSum,
    HessianDtype,
    InputRecorder,
    is_depthwise,
    mask_block_size,
    moved,
    prunable_layers,
    unsupported_layers,
)
from spade_fast.memory import is_out_of_memory, memory_errors
from spade_fast.models import LoadedModel, evaluation_mode, resolve_model, usable_device
from spade_fast.plans import ErrorBudget, SparsityPlan, check_prefixes, check_sparsity, is_prefix
from spade_fast.preprocessing import Preprocess
from spade_fast.solver import (
    Problem,
    Solution,
    Solver,
    Target,
    check_rules,
    largest_entry,
    solve_layers,
    solve_within,
)
from spade_fast.traces import LayerTrace, Trace

Picture: TypeAlias = Image.Image | Tensor
_Plan: TypeAlias = float | Mapping[str, float] | SparsityPlan | ErrorBudget
Sparsity: TypeAlias = _Plan | Callable[[nn.Module], _Plan]
#: (image [3, H, W], count, generator) to views [count, 3, h, w], pixel values in 0..1.
Augment: TypeAlias = Callable[[Tensor, int, torch.Generator], Tensor]
_Key = TypeVar("_Key")
_Result = TypeVar("_Result")

#: Why the layer that is called first stays dense, unless it is named.
FIRST_LAYER = "first layer"

# Views that go through the model at a time.
_CPU_BATCH = 16
_BATCH = 64
# Numbers in the Hessians of layers that a CPU solves together (128 MiB), unless a single one has more.
_SOLVED_TOGETHER = 1 << 25
# Images in flight on a GPU, at most, unless more are asked for.
_MOST_IN_FLIGHT = 16
# Memory of an image in flight: its Hessians, and three times as much while they are solved.
_HESSIANS_IN_FLIGHT = 4


def trace(
    model: nn.Module | LoadedModel,
    image: Picture | Sequence[Picture],
    sparsity: Sparsity = presets.default,
    *,
    num_augmentations: int = 64,
    augment: Augmentation | Augment | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    solver: Solver = "fast",
    layers: Sequence[str] | None = None,
    block_size: int | None = None,
    block_layout: BlockLayout = "taps",
    damping: float = 0.01,
    mask_rule: ops.MaskRule = "exact_count",
    refit: bool = False,
    batch_size: int | None = None,
    hessian_dtype: HessianDtype | None = None,
    positions_per_column: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    backend: ops.Backend = "auto",
    progress: bool = False,
) -> Trace:
    """Prune a network for one image (SPADE section 3): which connections does its answer rest on?

    Augmented views of the image go through the dense model once, in evaluation mode. Each layer is then pruned on
    the inputs it saw in that pass, each from dense activations. The model is left as it was.

    Parameters
    ----------
    model
        The network, or what :func:`spade_fast.load_model` returned.
    image
        A photograph, or pixel values [3, H, W] in 0..1 as float tensor, or a sequence of them: one trace for the
        whole set. A photograph is resized as the network's preprocessing does, its whole frame kept.
    sparsity
        Target for all layers; or a plan, or a mapping of layer or block names (see :class:`SparsityPlan`); or an
        :class:`ErrorBudget`, as the default is, by which each layer is pruned as far as the image allows; or a function
        of the model that makes a plan, as :func:`spade_fast.presets.last_half` does. The first layer that is called
        stays dense unless a key or `layers` names it.
    num_augmentations
        Views of each image. The paper uses 1024.
    augment
        An :class:`Augmentation`; or a function (image [3, H, W], count, generator) to views [count, 3, h, w], called
        once for each batch, and for all of them anew where a model turns out to call other layers for other views.
        Default: the published distribution at the network's input size.
    preprocess
        Turns views [n, 3, h, w] in 0..1 into model inputs. Default: the model's own, where it is known.
    solver
        "fast" (FastSPADE) or "exact" (SPADE): slower, see :func:`spade_fast.solve`; compared in docs/experiments.md.
    layers
        Names of layers or blocks: all others stay dense.
    block_size
        Fast: columns that share one threshold. Default, as published: the k * k taps of one channel, 1 for 1x1
        convolutions and linear layers; more channels where few rows put the target out of reach (under the published
        `mask_rule` never). The more columns, the lower each layer's error. Exact: columns that are pruned as one, k * k
        by default, so of a depthwise layer whole channels.
    block_layout, damping, mask_rule, refit
        As in :func:`spade_fast.solve`. A layer of target 0 stays dense under either rule. A refitted trace takes longer
        and keeps the image's own answer more often (measured in docs/experiments.md).
    batch_size
        Views that go through the model at a time. Default: 16 on a CPU, whose caches more would leave, else 64. Changes
        the result only by rounding, as long as the model treats the images of a batch each on its own.
    hessian_dtype
        ``torch.float32`` or ``torch.float64`` for the sums of the Hessians; or what layer inputs are rounded to, once,
        to be summed in float32: ``torch.bfloat16``, or ``"tf32"``, float32 with ten bits of mantissa (to nearest, ties
        away from zero), on every device. Default: as the model, at least float32.
    positions_per_column
        Cheaper evidence: of a layer with d columns at most about this times d output positions (rows, tokens) enter the
        Hessian, chosen at random. Early layers have thousands of times more. Default: all. Which ones are chosen
        depends on `batch_size`. What a cap does to traces is measured in docs/experiments.md.
    seed
        Of the augmentation and of the choice of positions. Equal seeds give equal bits.
    device
        Trace a copy of the model there. Default: where the model is.
    backend
        "auto" (native, or with a warning the reference), "native" or "reference".
    progress
        Show progress bars on stderr.

    Returns
    -------
    Trace

    Raises
    ------
    InvalidInputError
        For images, plans, models and settings that cannot be used; the message says which, and what to do.
    """
    tracing = prepare_tracing(
        model,
        sparsity,
        num_augmentations=num_augmentations,
        augment=augment,
        preprocess=preprocess,
        solver=solver,
        layers=layers,
        block_size=block_size,
        block_layout=block_layout,
        damping=damping,
        mask_rule=mask_rule,
        refit=refit,
        batch_size=batch_size,
        hessian_dtype=hessian_dtype,
        positions_per_column=positions_per_column,
        seed=seed,
        device=device,
        backend=backend,
        progress=progress,
    )
    tracing = replace(tracing, backend=ops.resolve_backend(backend, tracing.device))
    return _solve(tracing, [observe(tracing, image)])[0]


def default_batch_size(device: torch.device) -> int:
    """How many views go through a model there at a time, unless told otherwise."""
    return _CPU_BATCH if device.type == "cpu" else _BATCH


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """What all traces of one call have in common: the network, and settings that were checked."""

    name: str  # of the network
    module: nn.Module
    preprocess: Callable[[Tensor], Tensor]
    selection: _Selection
    anchor: Tensor  # a weight, which tells device and dtype of the model
    num_augmentations: int
    augment: Augmentation | Augment | None
    batch_size: int
    hessian_dtype: HessianDtype | None
    positions_per_column: float | None
    block_size: int | None
    budget: ErrorBudget | None
    rules: dict[str, Any]  # of `solve_layers`
    seed: int
    backend: ops.Backend
    progress: bool

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def settings(self, images: int) -> dict[str, Any]:
        """How the trace of so many images is made: plain JSON values."""
        return {
            "model": self.name,
            "images": images,
            "num_augmentations": self.num_augmentations,
            "augment": "default" if self.augment is None else repr(self.augment),
            "preprocess": (
                self.preprocess.to_dict() if isinstance(self.preprocess, Preprocess) else repr(self.preprocess)
            ),
            **({} if self.budget is None else {"error_budget": self.budget.error, "shares": list(self.budget.shares)}),
            **self.rules,
            "block_size": self.block_size,
            "batch_size": self.batch_size,
            "hessian_dtype": (None if self.hessian_dtype is None else str(self.hessian_dtype).removeprefix("torch.")),
            "positions_per_column": self.positions_per_column,
            "seed": self.seed,
            "backend": self.backend,
            "torch": torch.__version__,
        }

    def block_size_of(self, weight: Tensor, target: float) -> int:
        """Columns of a layer that share one threshold, or are pruned as one."""
        taps_alone = self.rules["solver"] == "exact" or self.rules["mask_rule"] == "published"
        return self.block_size or mask_block_size(weight, 0.0 if taps_alone else target)

    def recorder(self) -> InputRecorder:
        return InputRecorder(
            self.selection.weights,
            unless_first=self.selection.unnamed,
            backend=self.backend,
            hessian_dtype=self.hessian_dtype,
            positions_per_column=self.positions_per_column,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Observed:
    """What the dense pass of one image, or one set of them, leaves to be solved."""

    sums: dict[str, GramSum]  # by leader, in order of the calls
    dense: dict[str, str]  # layer to reason
    images: int
    unchecked: list[tuple[str, Tensor]]  # for `_check_finite`


def prepare_tracing(
    model: nn.Module | LoadedModel,
    sparsity: Sparsity,
    *,
    num_augmentations: int,
    augment: Augmentation | Augment | None,
    preprocess: Callable[[Tensor], Tensor] | None,
    solver: Solver,
    layers: Sequence[str] | None,
    block_size: int | None,
    block_layout: BlockLayout,
    damping: float,
    mask_rule: ops.MaskRule,
    refit: bool,
    batch_size: int | None,
    hessian_dtype: HessianDtype | None,
    positions_per_column: float | None,
    seed: int,
    device: torch.device | str | None,
    backend: ops.Backend,
    progress: bool,
) -> Tracing:
    """Check the arguments of :func:`trace` beside the image; the backend is left to be resolved."""
    check_whole("num_augmentations", num_augmentations, 1)
    check_whole("batch_size", 1 if batch_size is None else batch_size, 1)
    check_whole("block_size", 1 if block_size is None else block_size, 1)
    check_whole("seed", seed, 0)
    check_rules(damping=damping, solver=solver, block_layout=block_layout, mask_rule=mask_rule, refit=refit)
    if hessian_dtype not in (None, torch.bfloat16, torch.float32, torch.float64, "tf32"):
        raise InvalidInputError(
            f"hessian_dtype must be torch.bfloat16, torch.float32, torch.float64, 'tf32' or None, got {hessian_dtype!r}"
        )
    if positions_per_column is not None and not _is_positive(positions_per_column):
        raise InvalidInputError(f"positions_per_column must be a positive number or None, got {positions_per_column!r}")
    if augment is not None and not callable(augment):
        raise InvalidInputError(f"augment must be an Augmentation or a function, got {augment!r}")
    module, preprocess = resolve_model(model, preprocess)
    module = on_device(module, device)
    if callable(sparsity) and isinstance(made := sparsity(module), ErrorBudget):
        sparsity = made
    selection = _select(module, sparsity, layers)
    anchor = next(iter(prunable_layers(module).values())).weight
    if batch_size is None:
        batch_size = default_batch_size(anchor.device)
    return Tracing(
        name=model.name if isinstance(model, LoadedModel) else type(module).__name__,
        module=module,
        preprocess=preprocess,
        selection=selection,
        anchor=anchor,
        num_augmentations=num_augmentations,
        augment=augment,
        batch_size=batch_size,
        hessian_dtype=hessian_dtype,
        positions_per_column=positions_per_column,
        block_size=block_size,
        budget=sparsity if isinstance(sparsity, ErrorBudget) else None,
        rules={
            "solver": solver,
            "block_layout": block_layout,
            "damping": damping,
            "mask_rule": mask_rule,
            "refit": refit,
        },
        seed=seed,
        backend=backend,
        progress=progress,
    )


def observe(tracing: Tracing, image: Picture | Sequence[Picture]) -> Observed:
    """The dense pass of one image, or of one set of them."""
    images = list(image) if isinstance(image, Sequence) and not isinstance(image, str) else [image]
    if not images:
        raise InvalidInputError("no image to trace: the sequence is empty")
    count = len(images) * -(-tracing.num_augmentations // tracing.batch_size)
    # On a GPU the bias that takes the place of a batch norm costs a pass over the map, as the batch norm does.
    worth_folding = count > 1 and tracing.device.type == "cpu"
    with kept_heap(), memory_errors(tracing.device):
        # The second attempt is for models that call other layers for other views.
        for attempt in ("fold", "plain"):
            batches = tqdm(_batches(tracing, images), "dense pass", count, disable=not tracing.progress, leave=False)
            try:
                recorder, unchecked = _dense_pass(
                    tracing,
                    batches,
                    views=len(images) * tracing.num_augmentations,
                    fold=attempt == "fold" and worth_folding,
                )
                break
            except FoldingMismatch:
                continue
    dense = _reasons_to_stay_dense(tracing.selection, recorder)
    if tracing.selection.targets and not recorder.sums:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in dense.items())
        raise InvalidInputError(
            f"no layer is left to prune: name one in `layers` or as a key of `sparsity` ({reasons})"
        )
    return Observed(recorder.sums, dense, len(images), unchecked)


class Solved(NamedTuple):
    """A layer, pruned to one or more sparsities for one of several images.

    Attributes
    ----------
    position
        Of the image, or set of them.
    name
        Of the leading layer.
    solutions
        One for each sparsity.
    errors
        The squared error of the outputs of each, as a share of the outputs themselves without their bias; empty where
        nobody asked. On the augmented views, damping included.
    """

    position: int
    name: str
    solutions: list[Solution]
    errors: tuple[float, ...]


def solve_observed(
    tracing: Tracing, observed: Sequence[Observed], shares: Sequence[float] | None = None
) -> Iterator[Solved]:
    """Prune every layer on what was observed, those of several images side by side, and free its sums.

    To each of the `shares`, with the errors of the outputs; or, without, to the plan's targets.
    """

    def solved(problems: Sequence[Problem]) -> list[tuple[list[Solution], tuple[float, ...]]]:
        solutions = solve_layers(problems, backend=tracing.backend, **tracing.rules)
        if shares is None:
            return [(each, ()) for each in solutions]
        energies = _output_energies(problems)
        return [
            (of_layer, tuple(_relative_error(each.loss, energy) for each in of_layer))
            for of_layer, energy in zip(solutions, energies, strict=True)
        ]

    for (i, name), (solutions, errors) in _solved(tracing, observed, shares, solved):
        yield Solved(i, name, solutions, errors)


def _solved(
    tracing: Tracing,
    observed: Sequence[Observed],
    shares: Sequence[float] | None,
    solve: Callable[[Sequence[Problem]], Sequence[_Result]],
) -> Iterator[tuple[tuple[int, str], _Result]]:
    """What `solve` makes of every layer of several images, with the plan's target or the `shares`, part by part."""
    selection = tracing.selection
    _check_finite([entry for each in observed for entry in each.unchecked])
    sums = {(i, name): each.sums.pop(name) for i, each in enumerate(observed) for name in list(each.sums)}
    # Of what the exact solver takes its time for, progress is shown by smaller parts.
    together = _SOLVED_TOGETHER // 16 if tracing.rules["solver"] == "exact" else _SOLVED_TOGETHER
    room = together if tracing.device.type == "cpu" else sys.maxsize
    progress_bar = tqdm(None, "pruning", len(sums), disable=not tracing.progress, leave=False)
    with kept_heap(), memory_errors(tracing.device), progress_bar:
        for keys in _solved_together(sums, room):
            checkpoint()
            problems = []
            for i, name in keys:
                weight = selection.weights[name]
                wanted = [selection.targets[name]] if shares is None else shares
                targets = tuple(Target(share, tracing.block_size_of(weight, share)) for share in wanted)
                hessian = sums.pop((i, name)).into_hessian()
                problems.append(Problem(weight, hessian, targets, name, symmetric=tracing.backend == "native"))
            yield from zip(keys, solve(problems), strict=True)
            progress_bar.update(len(keys))


def _output_energies(problems: Sequence[Problem]) -> list[float]:
    """:func:`_output_energy` of each: a GPU is waited for once."""
    found: list[float] = torch.stack([_output_energy(each.weight, each.hessian) for each in problems]).tolist()
    return found


def _output_energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """tr(W H W^T): twice the square of a layer's outputs without bias, mean over samples, sum over outputs."""
    grouped = weight.detach().reshape(hessian.shape[0], -1, hessian.shape[1]).to(hessian.dtype)
    return ((grouped @ hessian) * grouped).sum(dtype=torch.float64)


def _relative_error(loss: float, energy: float) -> float:
    # A loss is half of tr(D H D^T). Outputs that are zero have none.
    return 2 * loss / energy if energy else 0.0


def _solve(tracing: Tracing, observed: Sequence[Observed]) -> list[Trace]:
    """Prune every layer on what was observed: one trace for each."""
    selection, budget = tracing.selection, tracing.budget
    pruned: list[dict[str, LayerTrace | None]] = [{} for _ in observed]  # by leader; None for one left dense
    if budget is None:
        for i, name, solutions, _ in solve_observed(tracing, observed):
            pruned[i][name] = LayerTrace.of(solutions[0], selection.targets[name])
    else:

        def within(problems: Sequence[Problem]) -> list[tuple[int, Solution] | None]:
            energies = _output_energies(problems)
            return solve_within(
                problems,
                lambda i, loss: _relative_error(loss, energies[i]) <= budget.error,
                backend=tracing.backend,
                **tracing.rules,
            )

        for (i, name), chosen in _solved(tracing, observed, budget.shares, within):
            pruned[i][name] = None if chosen is None else LayerTrace.of(chosen[1], budget.shares[chosen[0]])
    traces = []
    for each, by_leader in zip(observed, pruned, strict=True):
        layers, dense = {}, dict(each.dense)
        for name, leader in selection.leaders.items():
            layer = by_leader.get(leader)
            if layer is not None:
                layers[name] = layer
            elif leader in by_leader:
                dense[name] = "no sparsity is within the error budget"
        _warn_of_empty_layers(layers, last=next(reversed(by_leader), None))
        if budget is not None and not layers:
            warnings.warn(
                f"no layer can be pruned within an error budget of {budget.error:g}, so this trace is the dense "
                "network: allow a larger error, or give a sparsity",
                stacklevel=3,
            )
        traces.append(Trace(layers, dense, tracing.settings(each.images)))
    return traces


def _solved_together(sums: Mapping[_Key, GramSum], room: int) -> list[list[_Key]]:
    """The keys in their order, in lists whose Hessians have no more than `room` numbers, or are single."""
    lists: list[list[_Key]] = []
    left = 0
    for key, total in sums.items():
        size = total.groups * total.columns**2
        if not lists or size > left:
            lists.append([])
            left = room
        lists[-1].append(key)
        left -= size
    return lists


def _dense_pass(
    tracing: Tracing, batches: Iterable[Tensor], *, views: int, fold: bool
) -> tuple[InputRecorder, list[tuple[str, Tensor]]]:
    """Run all views through the dense model; what its layers saw is in the recorder's sums.

    With `fold`, batch norms are folded into convolutions where a run on one view shows that nothing but rounding
    changes. Whether batches are finite is checked at once on a CPU. On a GPU, which the host would have to wait for
    each time, it is left to be checked: the second result is for :func:`_check_finite`.
    """
    module, device = tracing.module, tracing.device
    # Hessians are summed faster from channels-last maps.
    memory_format = torch.channels_last if device.type in ("cpu", "cuda") else torch.contiguous_format
    folded, recorder = FoldedBatchNorms([]), tracing.recorder()
    unchecked: list[tuple[str, Tensor]] = []

    def check(batch: Tensor, source: str) -> None:
        _check_batch(batch, source)
        unchecked.append((source, largest_entry(batch).to(device, torch.float64)))
        if device.type == "cpu":
            _check_finite(unchecked)
            unchecked.clear()

    def run(inputs: Tensor) -> None:
        recorder.share = len(inputs) / views
        with memory_errors(device), folded, recorder:
            module(inputs.contiguous(memory_format=memory_format))

    # Not inference mode: what a module caches in it could never again take part in a gradient.
    with evaluation_mode(module), torch.no_grad():
        for position, batch in enumerate(batches):
            checkpoint()
            check(batch, "augment")
            inputs = tracing.preprocess(batch)
            check(inputs, "preprocess")
            inputs = inputs.to(tracing.anchor)
            if position > 0:
                run(inputs)
                continue
            try:
                if fold:
                    folded = FoldedBatchNorms(learn_folds(module, inputs[:1].contiguous(memory_format=memory_format)))
                run(inputs.clone())  # the model may write over its inputs before it fails
            except RuntimeError as error:
                if memory_format == torch.contiguous_format or is_out_of_memory(error):
                    raise
                # Perhaps a `view` of a map, which wants the usual layout: begin anew with that.
                memory_format = torch.contiguous_format
                if fold:
                    folded = FoldedBatchNorms(learn_folds(module, inputs[:1].contiguous()))
                recorder = tracing.recorder()
                run(inputs)
    return recorder, unchecked


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def trace_many(
    model: nn.Module | LoadedModel,
    images: Iterable[Picture],
    sparsity: Sparsity = presets.default,
    *,
    images_in_flight: int | None = None,
    **settings: Any,
) -> Iterator[Trace]:
    """One trace for each image, in order, as they are made; each equals ``trace(model, image, ...)`` bit for bit.

    Parameters
    ----------
    model, sparsity, settings
        As in :func:`trace`.
    images
        Any iterable of images, which are taken from it as they are needed.
    images_in_flight
        Images whose layers are pruned side by side, so that a GPU has enough to do; their traces come together.
        Default: 1 on a CPU; on CUDA as many as its free memory holds, at most 16. Where it does not hold them all the
        same, fewer, with a warning.

    Raises
    ------
    InvalidInputError
        As :func:`trace`, with the image's position once the traces of those before it have been given; and where the
        device has no memory for a single image.
    """
    check_whole("images_in_flight", 1 if images_in_flight is None else images_in_flight, 1)
    if isinstance(images, (Image.Image, str, os.PathLike)) or (isinstance(images, Tensor) and images.dim() != 4):
        raise InvalidInputError(f"images must be an iterable of images, got one {type(images).__name__}: pass [image]")
    if not isinstance(images, Iterable):
        raise InvalidInputError(f"images must be an iterable of images, got {images!r}")
    defaults: dict[str, Any] = trace.__kwdefaults__ or {}
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise TypeError(
            f"trace_many() got an unexpected keyword argument {unknown[0]!r}: its settings are those of trace"
        )
    tracing = prepare_tracing(model, sparsity, **{**defaults, **settings})
    tracing = replace(tracing, backend=ops.resolve_backend(tracing.backend, tracing.device))
    return _traces(tracing, images, images_in_flight)


def _traces(tracing: Tracing, images: Iterable[Picture], images_in_flight: int | None) -> Iterator[Trace]:
    """What :func:`trace_many` gives, once its arguments have been checked."""
    most = images_in_flight or _images_in_flight(tracing)
    drawn = _Drawn(images)
    position = 0  # of the first that is drawn
    while True:
        observed: list[Observed] = []
        traces: list[Trace] = []
        count, fewer = most, 0
        try:
            for image in drawn.first(most):
                observed.append(observe(tracing, image))
            if observed:
                count = len(observed)
                traces = _solve(tracing, observed)
        except torch.OutOfMemoryError as error:
            if count == 1:
                raise InvalidInputError(
                    f"image {position}: {tracing.device} has no memory for this image alone: pass a smaller batch_size "
                    "or fewer layers, or trace on a device with more memory"
                ) from error
            fewer = count // 2
            warnings.warn(
                f"{tracing.device} has no memory for {count} images in flight: going on with {fewer}", stacklevel=2
            )
        except Exception as error:
            if min(most, len(drawn.images)) > 1:  # one by one it shows whose it is, and those before it are done
                fewer = 1
            elif isinstance(error, InvalidInputError):
                raise InvalidInputError(f"image {position}: {error}") from error
            else:
                raise
        if fewer:
            most = fewer
            observed.clear()
            torch.cuda.empty_cache()  # here, where the error no longer holds on to tensors
            continue
        if not traces:
            if drawn.failure is not None:
                raise drawn.failure
            return
        del drawn.images[: len(traces)]
        position += len(traces)
        while traces:
            yield traces.pop(0)


class _Drawn:
    """Images that were drawn from an iterable and are not traced yet.

    Attributes
    ----------
    images
        What was drawn: to be removed by whoever has traced it.
    failure
        What the iterable raised, if it has: after all images before.
    """

    def __init__(self, images: Iterable[Picture]) -> None:
        self.images: list[Picture] = []
        self.failure: Exception | None = None
        self._source = iter(images)

    def first(self, count: int) -> Iterator[Picture]:
        """The first images, at most `count`: those drawn before, then others, drawn one by one."""
        yield from self.images[:count]
        while len(self.images) < count and self.failure is None:
            try:
                self.images.append(next(self._source))
            except StopIteration:
                self._source = iter(())  # some iterators would begin anew
                return
            except Exception as error:
                self.failure = error
                return
            yield self.images[-1]


def _images_in_flight(tracing: Tracing) -> int:
    """How many images to have in flight on the device of the model."""
    device = tracing.device
    # With the exact solver, rows of one image fill a GPU.
    if device.type != "cuda" or tracing.rules["solver"] == "exact":
        return 1
    layers = prunable_layers(tracing.module)
    double = (tracing.hessian_dtype or tracing.anchor.dtype) == torch.float64
    needed = bytes_in_flight([layers[name] for name in tracing.selection.weights], 8 if double else 4)
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # unused, by torch's allocator
    return images_that_fit(free + kept, needed)


def bytes_in_flight(layers: Iterable[nn.Linear | nn.Conv2d], item_size: int) -> int:
    """Memory that an image in flight takes, by the layers that are pruned and the bytes of a number in their sums."""
    numbers = 0
    for layer in layers:
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        numbers += groups * layer.weight.shape[1:].numel() ** 2
    return _HESSIANS_IN_FLIGHT * numbers * item_size


def images_that_fit(free: int, needed: int) -> int:
    """How many images that need so many bytes each fit that many free ones, a fifth of which is left for the rest."""
    return max(1, min(_MOST_IN_FLIGHT, free * 4 // 5 // max(1, needed)))


@dataclass(frozen=True)
class _Selection:
    """What to prune. Tied layers share one weight: the first of them leads, the others follow."""

    weights: dict[str, Tensor]  # by leader
    targets: dict[str, float]  # by leader
    leaders: dict[str, str]  # layer to leader, in the order of the model
    dense: dict[str, str]  # layer to reason
    named: frozenset[str]  # layers that the caller named one by one
    unnamed: frozenset[str]  # leaders that no key and no name covers: they stay dense if they are called first


def _select(module: nn.Module, sparsity: Sparsity, layers: Sequence[str] | None) -> _Selection:
    prunable, unsupported = prunable_layers(module), unsupported_layers(module)
    if not prunable:
        kinds = ", ".join(sorted(set(unsupported.values()))) or "no weights at all"
        raise InvalidInputError(
            f"{type(module).__name__} has no prunable layers: Linear and Conv2d are pruned, it has {kinds}"
        )
    plan = _as_plan(sparsity(module) if callable(sparsity) else sparsity)
    if isinstance(layers, str):
        raise InvalidInputError(f"layers must be a sequence of names: pass [{layers!r}]")
    if layers is not None and not (isinstance(layers, Sequence) and all(isinstance(key, str) for key in layers)):
        raise InvalidInputError(f"layers must be a sequence of names, got {layers!r}")
    small = {name for name, layer in prunable.items() if is_depthwise(layer)}.difference(layers or ())
    excluded = small if isinstance(sparsity, ErrorBudget) else set()
    if (layers is not None and not layers) or (plan.default is None and not plan.targets):
        raise InvalidInputError("the plan names no layer: give `sparsity` and `layers` at least one, or leave them out")
    for key in (*plan.targets, *(layers or ())):
        if key in unsupported and not any(is_prefix(key, name) for name in prunable):
            raise InvalidInputError(f"{key!r} is a {unsupported[key]}: only Linear and Conv2d layers are pruned")
    plan.check_keys(prunable)
    check_prefixes(layers or (), prunable, "layers:")

    dense = {name: f"{kind} is not pruned" for name, kind in unsupported.items()}
    foreign = _foreign_owners(module, prunable)
    weights: dict[str, Tensor] = {}
    targets: dict[str, float] = {}
    leaders: dict[str, str] = {}
    leader_of: dict[int, str] = {}
    named = frozenset([*([] if callable(sparsity) else plan.targets), *(layers or ())])
    for name, layer in prunable.items():
        outside = layers is not None and not any(is_prefix(key, name) for key in layers)
        target = None if outside else plan.target(name)
        if not target:
            dense[name] = "not in the plan" if target is None else "target sparsity 0"
        elif name in excluded:
            dense[name] = "depthwise, which an error budget leaves dense unless `layers` names it"
        elif isinstance(layer.weight, nn.parameter.UninitializedParameter):
            raise InvalidInputError(f"layer {name!r} has no weight yet: run one batch through the model first")
        elif id(layer.weight) in foreign:
            owner = foreign[id(layer.weight)]
            if name in named:
                raise InvalidInputError(f"layer {name!r} shares its weight with {owner}: leave it out, it stays dense")
            dense[name] = f"shares its weight with {owner}"
        else:
            leader = leader_of.setdefault(id(layer.weight), name)
            if targets.setdefault(leader, target) != target:
                raise InvalidInputError(
                    f"layers {leader!r} and {name!r} share one weight, but are to be pruned to {targets[leader]} and "
                    f"{target}: give both the same sparsity"
                )
            weights[leader], leaders[name] = layer.weight, leader
    for name in [name for name in dense if name in prunable]:
        leader = leader_of.get(id(prunable[name].weight), name)
        if leader != name:
            raise InvalidInputError(
                f"layers {leader!r} and {name!r} share one weight, but only the first is to be pruned: give both the "
                "same sparsity, or leave both out"
            )
    given = [*([] if callable(sparsity) else plan.targets), *(layers or ())]
    unnamed = frozenset(name for name in weights if not any(is_prefix(key, name) for key in given))
    return _Selection(weights, targets, leaders, dense, named, unnamed)


def _as_plan(sparsity: float | Mapping[str, float] | SparsityPlan | ErrorBudget) -> SparsityPlan:
    if isinstance(sparsity, SparsityPlan):
        return sparsity
    if isinstance(sparsity, ErrorBudget):
        return SparsityPlan.uniform(sparsity.shares[-1])
    if isinstance(sparsity, Mapping):
        return SparsityPlan.from_mapping(sparsity)
    return SparsityPlan.uniform(check_sparsity(sparsity, "sparsity"))


def _foreign_owners(module: nn.Module, prunable: Mapping[str, nn.Module]) -> dict[int, str]:
    """Parameters that modules other than the prunable layers hold: by identity, who."""
    owners = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if owner not in prunable and not isinstance(parameter, nn.parameter.UninitializedParameter):
            owners[id(parameter)] = repr(owner)
    return owners


def _reasons_to_stay_dense(selection: _Selection, recorder: InputRecorder) -> dict[str, str]:
    """Reasons for every layer that stays dense, once it is known which were called."""
    dense = dict(selection.dense)
    never_called = []
    idle = [leader for leader, total in recorder.sums.items() if not total.samples]
    for leader in idle:
        del recorder.sums[leader]
    for name, leader in selection.leaders.items():
        if leader == recorder.left_out:
            dense[name] = FIRST_LAYER
        elif leader in idle:
            dense[name] = "called with empty batches only"
        elif leader not in recorder.sums:
            dense[name] = "never called in the forward pass"
            never_called.append(name)
    reason = "the model uses its weight inside another operation (as nn.MultiheadAttention does), or not at all"
    for name in never_called:
        if name in selection.named:
            raise InvalidInputError(f"layer {name!r} is never called in the forward pass: {reason}; leave it out")
    if never_called:
        names = ", ".join(map(repr, never_called[:5])) + (" ..." if len(never_called) > 5 else "")
        count = f"{len(never_called)} layer" + ("s are" if len(never_called) > 1 else " is")
        warnings.warn(f"{count} never called and so stays dense: {names}; {reason}", stacklevel=4)
    return dense


def _warn_of_empty_layers(pruned: Mapping[str, LayerTrace], last: str | None) -> None:
    if not pruned:
        return
    # Of all layers at once: the host waits for a GPU whenever it looks.
    used = torch.stack([layer.mask.flatten(1).any(dim=1).count_nonzero() for layer in pruned.values()]).tolist()
    for (name, layer), filled in zip(pruned.items(), used, strict=True):
        outputs = layer.mask.shape[0]
        empty = outputs - filled
        # An output of the last layer is an answer of the network. Inside it, outputs without weights are common.
        if layer.requested_sparsity < 1 and (empty == outputs or (empty and name == last)):
            warnings.warn(
                f"layer {name!r}: {empty} of {outputs} outputs have no weight left at sparsity "
                f"{layer.requested_sparsity:g}; lower its target",
                stacklevel=4,
            )


def _batches(tracing: Tracing, images: Sequence[Picture]) -> Iterator[Tensor]:
    """Augmented views of all images, [at most batch_size, 3, h, w] each."""
    generator = torch.Generator().manual_seed(tracing.seed)
    augment, preprocess, views = tracing.augment, tracing.preprocess, tracing.num_augmentations
    for position, image in enumerate(images):
        try:
            frame = preprocess.frame(image) if isinstance(preprocess, Preprocess) else image_tensor(image)
        except InvalidInputError as error:
            raise InvalidInputError(f"image {position}: {error}" if len(images) > 1 else str(error)) from error
        if isinstance(image, Image.Image) and augment is None and not isinstance(preprocess, Preprocess):
            raise InvalidInputError(
                "how large the model's inputs are cannot be told from a photograph and a function: pass "
                "augment=spade_fast.Augmentation(size=...), or a spade_fast.Preprocess as preprocess"
            )
        frame = moved(frame, tracing.device)
        shape = (frame.shape[1], frame.shape[2])
        chosen = augment or Augmentation(size=preprocess.input_size if isinstance(preprocess, Preprocess) else shape)
        starts = range(0, views, tracing.batch_size)
        if isinstance(chosen, Augmentation):
            sampled = chosen.sample(shape, views, generator)
            for i in starts:
                yield chosen.render(frame, sampled[i : i + tracing.batch_size], backend=tracing.backend)
        else:
            for start in starts:
                yield chosen(frame, min(tracing.batch_size, views - start), generator)


def _check_batch(batch: object, source: str) -> None:
    if not isinstance(batch, Tensor) or not batch.is_floating_point() or batch.dim() != 4 or not batch.numel():
        got = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise InvalidInputError(f"{source} must give a non-empty float batch [n, channels, h, w], got {got}")


def _check_finite(largest: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse batches by their largest entries, given with what they came from; the host waits once for all."""
    if not largest:
        return
    finite = torch.stack([entry for _, entry in largest]).isfinite().tolist()
    for (source, _), good in zip(largest, finite, strict=True):
        if not good:
            raise InvalidInputError(f"{source} gave NaN or infinite values")


def on_device(module: nn.Module, device: torch.device | str | None) -> nn.Module:
    """The network there, a copy unless it is there already; None leaves it where it is."""
    devices = {parameter.device for parameter in module.parameters()}
    if torch.device("meta") in devices:
        raise InvalidInputError(f"{type(module).__name__} has no weights: it is on the meta device")
    if device is None:
        return module
    target = usable_device(device)
    if target.type == "meta":
        raise InvalidInputError("device 'meta' has no values to compute with")
    return module if devices == {target} else copy.deepcopy(module).to(target)
