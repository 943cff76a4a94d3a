"""Tracing: augment the image, run the dense model once, prune every layer on what flowed into it."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast import ops, presets
from spade_fast.augmentation import Augmentation
from spade_fast.errors import InvalidInputError
from spade_fast.folding import FoldedBatchNorms, FoldingMismatch, learn_folds
from spade_fast.heap import kept_heap
from spade_fast.images import image_tensor
from spade_fast.layers import GramSum, InputRecorder, mask_block_size, prunable_layers, unsupported_layers
from spade_fast.models import LoadedModel, evaluation_mode, resolve_model, usable_device
from spade_fast.plans import SparsityPlan, check_prefixes, check_sparsity, is_prefix
from spade_fast.preprocessing import Preprocess
from spade_fast.solver import Problem, Solution, Solver, is_finite, solve_layers
from spade_fast.traces import LayerTrace, Trace

Picture: TypeAlias = Image.Image | Tensor
Sparsity: TypeAlias = float | Mapping[str, float] | SparsityPlan | Callable[[nn.Module], SparsityPlan]
#: (image [3, H, W], count, generator) to views [count, 3, h, w], pixel values in 0..1.
Augment: TypeAlias = Callable[[Tensor, int, torch.Generator], Tensor]

# Views that go through the model at a time.
_CPU_BATCH = 16
_BATCH = 64
# Numbers in the Hessians of layers that are solved together (128 MiB), unless a single one has more.
_SOLVED_TOGETHER = 1 << 25


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
    damping: float = 0.01,
    mask_rule: ops.MaskRule = "exact_count",
    refit: bool = False,
    batch_size: int | None = None,
    hessian_dtype: torch.dtype | None = None,
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
        Target for all layers; or a plan, or a mapping of layer or block names (see :class:`SparsityPlan`); or a
        function of the model that makes a plan, as :func:`spade_fast.presets.default` does. The first layer that is
        called stays dense unless a key or `layers` names it.
    num_augmentations
        Views of each image. The paper uses 1024.
    augment
        An :class:`Augmentation`; or a function (image [3, H, W], count, generator) to views [count, 3, h, w], called
        once for each batch, and for all of them anew where a model turns out to call other layers for other views.
        Default: the published distribution at the network's input size.
    preprocess
        Turns views [n, 3, h, w] in 0..1 into model inputs. Default: the model's own, where it is known.
    solver
        "fast" (FastSPADE).
    layers
        Names of layers or blocks: all others stay dense.
    block_size
        Columns that share one threshold. Default, as published: the k * k taps of one channel, 1 for 1x1 convolutions
        and linear layers; more channels where few rows put the target out of reach (under the published `mask_rule`
        never). The more columns, the lower each layer's error.
    damping, mask_rule, refit
        As in :func:`spade_fast.solve`. A layer of target 0 stays dense under either rule. A refitted trace takes longer
        and keeps the image's own answer more often (measured in docs/experiments.md).
    batch_size
        Views that go through the model at a time. Default: 16 on a CPU, whose caches more would leave, else 64. Changes
        the result only by rounding, as long as the model treats the images of a batch each on its own.
    hessian_dtype
        ``torch.float32`` or ``torch.float64`` for the sums of the Hessians, or ``torch.bfloat16``: layer inputs are
        rounded to it once and summed in float32. Default: as the model, at least float32.
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
    images = list(image) if isinstance(image, Sequence) and not isinstance(image, str) else [image]
    if not images:
        raise InvalidInputError("no image to trace: the sequence is empty")
    _check_whole("num_augmentations", num_augmentations, 1)
    _check_whole("batch_size", 1 if batch_size is None else batch_size, 1)
    _check_whole("block_size", 1 if block_size is None else block_size, 1)
    _check_whole("seed", seed, 0)
    if not isinstance(refit, bool):
        raise InvalidInputError(f"refit must be True or False, got {refit!r}")
    if hessian_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise InvalidInputError(
            f"hessian_dtype must be torch.bfloat16, torch.float32, torch.float64 or None, got {hessian_dtype!r}"
        )
    if positions_per_column is not None and not _is_positive(positions_per_column):
        raise InvalidInputError(f"positions_per_column must be a positive number or None, got {positions_per_column!r}")
    module, preprocess = resolve_model(model, preprocess)
    module = _on_device(module, device)
    selection = _select(module, sparsity, layers)
    anchor = next(iter(prunable_layers(module).values())).weight  # tells device and dtype of the model
    backend = ops.resolve_backend(backend, anchor.device)
    if batch_size is None:
        batch_size = _CPU_BATCH if anchor.device.type == "cpu" else _BATCH
    settings = {
        "model": model.name if isinstance(model, LoadedModel) else type(module).__name__,
        "images": len(images),
        "num_augmentations": num_augmentations,
        "augment": "default" if augment is None else repr(augment),
        "preprocess": preprocess.to_dict() if isinstance(preprocess, Preprocess) else repr(preprocess),
        "solver": solver,
        "block_size": block_size,
        "damping": damping,
        "mask_rule": mask_rule,
        "refit": refit,
        "batch_size": batch_size,
        "hessian_dtype": None if hessian_dtype is None else str(hessian_dtype).removeprefix("torch."),
        "positions_per_column": positions_per_column,
        "seed": seed,
        "backend": backend,
        "torch": torch.__version__,
    }

    count = len(images) * -(-num_augmentations // batch_size)
    evidence = _Evidence(backend, hessian_dtype, positions_per_column, seed, len(images) * num_augmentations)
    with kept_heap():
        # The second attempt is for models that call other layers for other views.
        for attempt in ("fold", "plain"):
            generator = torch.Generator().manual_seed(seed)
            batches = _batches(
                images, augment, preprocess, num_augmentations, batch_size, generator, anchor.device, backend
            )
            progress_bar = tqdm(batches, "dense pass", count, disable=not progress, leave=False)
            try:
                recorder = _dense_pass(
                    module, progress_bar, preprocess, selection, anchor, evidence, fold=attempt == "fold" and count > 1
                )
                break
            except FoldingMismatch:
                continue
    dense = _reasons_to_stay_dense(selection, recorder)
    if selection.targets and not recorder.sums:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in dense.items())
        raise InvalidInputError(
            f"no layer is left to prune: name one in `layers` or as a key of `sparsity` ({reasons})"
        )

    rules: dict[str, Any] = {"damping": damping, "solver": solver, "mask_rule": mask_rule, "refit": refit}
    solutions: dict[str, Solution] = {}
    with kept_heap(), tqdm(None, "pruning", len(recorder.sums), disable=not progress, leave=False) as progress_bar:
        for names in _solved_together(recorder.sums):  # in order of the calls
            problems = []
            for name in names:
                weight, target = selection.weights[name], selection.targets[name]
                hessian = recorder.sums.pop(name).into_hessian()  # the sums of solved layers are freed
                block = block_size or mask_block_size(weight, target if mask_rule == "exact_count" else 0.0)
                problems.append(Problem(weight, hessian, target, block, name))
            solutions.update(zip(names, solve_layers(problems, backend=backend, **rules), strict=True))
            progress_bar.update(len(names))
    pruned = {
        name: LayerTrace.of(solutions[leader], selection.targets[leader])
        for name, leader in selection.leaders.items()
        if leader in solutions
    }
    _warn_of_empty_layers(pruned, last=next(reversed(solutions), None))
    return Trace(pruned, dense, settings)


def _solved_together(sums: Mapping[str, GramSum]) -> list[list[str]]:
    """Names of layers in their order, in lists whose Hessians take little memory together."""
    lists: list[list[str]] = []
    room = 0
    for name, total in sums.items():
        size = total.groups * total.columns**2
        if size > room:
            lists.append([])
            room = _SOLVED_TOGETHER
        lists[-1].append(name)
        room -= size
    return lists


@dataclass(frozen=True)
class _Evidence:
    """What of the layers' inputs is summed, and how."""

    backend: ops.Backend
    hessian_dtype: torch.dtype | None
    positions_per_column: float | None
    seed: int
    views: int  # of all images

    def recorder(self, selection: _Selection) -> InputRecorder:
        return InputRecorder(
            selection.weights,
            unless_first=selection.unnamed,
            backend=self.backend,
            hessian_dtype=self.hessian_dtype,
            positions_per_column=self.positions_per_column,
            seed=self.seed,
        )


def _dense_pass(
    module: nn.Module,
    batches: Iterable[Tensor],
    preprocess: Callable[[Tensor], Tensor],
    selection: _Selection,
    anchor: Tensor,
    evidence: _Evidence,
    *,
    fold: bool,
) -> InputRecorder:
    """Run all views through the dense model; what its layers saw is in the recorder's sums.

    With `fold`, batch norms are folded into convolutions where a run on one view shows that nothing but rounding
    changes.
    """
    # On a CPU Hessians are summed faster from channels-last maps.
    memory_format = torch.channels_last if anchor.device.type == "cpu" else torch.contiguous_format
    folded, recorder = FoldedBatchNorms([]), evidence.recorder(selection)

    def run(inputs: Tensor) -> None:
        recorder.share = len(inputs) / evidence.views
        with folded, recorder:
            module(inputs.contiguous(memory_format=memory_format))

    # Not inference mode: what a module caches in it could never again take part in a gradient.
    with evaluation_mode(module), torch.no_grad():
        for position, batch in enumerate(batches):
            _check_batch(batch, "augment")
            inputs = preprocess(batch)
            _check_batch(inputs, "preprocess")
            inputs = inputs.to(anchor)
            if position > 0:
                run(inputs)
                continue
            try:
                if fold:
                    folded = FoldedBatchNorms(learn_folds(module, inputs[:1].contiguous(memory_format=memory_format)))
                run(inputs.clone())  # the model may write over its inputs before it fails
            except RuntimeError:
                if memory_format == torch.contiguous_format:
                    raise
                # Perhaps a `view` of a map, which wants the usual layout: begin anew with that.
                memory_format = torch.contiguous_format
                if fold:
                    folded = FoldedBatchNorms(learn_folds(module, inputs[:1].contiguous()))
                recorder = evidence.recorder(selection)
                run(inputs)
    return recorder


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _check_whole(what: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise InvalidInputError(f"{what} must be a whole number of at least {least}, got {value!r}")


def trace_many(
    model: nn.Module | LoadedModel,
    images: Iterable[Picture],
    sparsity: Sparsity = presets.default,
    **settings: Any,
) -> Iterator[Trace]:
    """One trace for each image, in order, as they are made; each equals ``trace(model, image, ...)`` bit for bit.

    Parameters
    ----------
    model, sparsity, settings
        As in :func:`trace`.
    images
        Any iterable of images; images are taken from it one at a time.

    Raises
    ------
    InvalidInputError
        As :func:`trace`, with the image's position.
    """
    module, preprocess = resolve_model(model, settings.pop("preprocess", None))
    device = settings.pop("device", None)
    moved = _on_device(module, device)  # once for all images
    prepared = replace(model, module=moved) if isinstance(model, LoadedModel) else moved
    for position, image in enumerate(images):
        try:
            yield trace(prepared, image, sparsity, preprocess=preprocess, **settings)
        except InvalidInputError as error:
            raise InvalidInputError(f"image {position}: {error}") from error


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
        target = plan.target(name)
        if layers is not None and not any(is_prefix(key, name) for key in layers):
            target = None
        if not target:
            dense[name] = "not in the plan" if target is None else "target sparsity 0"
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


def _as_plan(sparsity: float | Mapping[str, float] | SparsityPlan) -> SparsityPlan:
    if isinstance(sparsity, SparsityPlan):
        return sparsity
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
            dense[name] = "first layer"
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
        warnings.warn(f"{count} never called and so stays dense: {names}; {reason}", stacklevel=3)
    return dense


def _warn_of_empty_layers(pruned: Mapping[str, LayerTrace], last: str | None) -> None:
    for name, layer in pruned.items():
        empty, outputs = layer.empty_outputs, layer.mask.shape[0]
        # An output of the last layer is an answer of the network. Inside it, outputs without weights are common.
        if layer.requested_sparsity < 1 and (empty == outputs or (empty and name == last)):
            warnings.warn(
                f"layer {name!r}: {empty} of {outputs} outputs have no weight left at sparsity "
                f"{layer.requested_sparsity:g}; lower its target",
                stacklevel=3,
            )


def _batches(
    images: Sequence[Picture],
    augment: Augmentation | Augment | None,
    preprocess: Callable[[Tensor], Tensor],
    num_augmentations: int,
    batch_size: int,
    generator: torch.Generator,
    device: torch.device,
    backend: ops.Backend,
) -> Iterator[Tensor]:
    """Augmented views of all images, [at most batch_size, 3, h, w] each."""
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
        frame = frame.to(device)
        shape = (frame.shape[1], frame.shape[2])
        if augment is not None and not callable(augment):
            raise InvalidInputError(f"augment must be an Augmentation or a function, got {augment!r}")
        chosen = augment or Augmentation(size=preprocess.input_size if isinstance(preprocess, Preprocess) else shape)
        starts = range(0, num_augmentations, batch_size)
        if isinstance(chosen, Augmentation):
            views = chosen.sample(shape, num_augmentations, generator)
            yield from (chosen.render(frame, views[i : i + batch_size], backend=backend) for i in starts)
        else:
            for start in starts:
                yield chosen(frame, min(batch_size, num_augmentations - start), generator)


def _check_batch(batch: object, source: str) -> None:
    if not isinstance(batch, Tensor) or not batch.is_floating_point() or batch.dim() != 4 or not batch.numel():
        got = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise InvalidInputError(f"{source} must give a non-empty float batch [n, channels, h, w], got {got}")
    if not is_finite(batch):
        raise InvalidInputError(f"{source} gave NaN or infinite values")


def _on_device(module: nn.Module, device: torch.device | str | None) -> nn.Module:
    devices = {parameter.device for parameter in module.parameters()}
    if torch.device("meta") in devices:
        raise InvalidInputError(f"{type(module).__name__} has no weights: it is on the meta device")
    if device is None:
        return module
    target = usable_device(device)
    if target.type == "meta":
        raise InvalidInputError("device 'meta' has no values to compute with")
    return module if devices == {target} else copy.deepcopy(module).to(target)
