"""Sparse FC: a network whose classifier rests on few features of each class (Wong, Santurkar and Madry 2021)."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from spade_fast.attribution import check_outputs, like_weights
from spade_fast.augmentation import Augmentation
from spade_fast.autocast import without_autocast
from spade_fast.errors import InvalidInputError, check_whole, first_line, require
from spade_fast.files import read_tensors, write_tensors
from spade_fast.images import image_tensor, load_image
from spade_fast.models import LoadedModel, Runner, bare_module, evaluation_mode, resolve_model
from spade_fast.preprocessing import Preprocess
from spade_fast.readonly import ReadOnlyMappings

#: A photograph's file, a photograph, or pixel values [3, H, W] in 0..1.
Source: TypeAlias = str | os.PathLike[str] | Image.Image | Tensor

_METADATA_KEY = "spade_fast_sparse_fc"
# Views nearer to the photographs that the network will be asked about than those of a trace.
_SCALE, _BRIGHTNESS, _HUE = (0.5, 1.0), 0.2, 0.05
# A feature that varies less than this, as a share of its largest value, is constant but for rounding.
_CONSTANT = 1e-5
# The score of a class without images: others lie some tens around 0. Not -inf, which makes NaN of differences.
_NEVER = -1e4
# How far below the largest score that of the answer may lie, as a share of it: half precision rounds that much.
_ROUNDING = 0.02
# How far a solution may be from its optimum, in units of lambda.
_TOLERANCE = 0.02
# Passes over the features at one learning rate, the first such rate, and by how much a good one grows.
_ROUND, _RATE, _GROWTH = 5, 0.1, 1.2


@dataclass(frozen=True, eq=False)
class Features(ReadOnlyMappings):
    """What flows into a network's classifier, a row for each view of each image.

    Attributes
    ----------
    values
        float32 [n, d], on the CPU.
    answers
        int64 [n]: the class that the network gives.
    images
        int64 [n]: which image of the sequence the row is of.
    layer
        Name of the classifier, an ``nn.Linear``.
    unreadable
        Files that were left out: why.
    settings
        How they were made: plain JSON values.
    """

    values: Tensor
    answers: Tensor
    images: Tensor
    layer: str
    unreadable: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


class PathPoint(NamedTuple):
    """A solution on the regularization path: nonzero weights per class that has images, and held-out accuracy."""

    lam: float
    nonzeros: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class SparseFC(ReadOnlyMappings):
    """A sparse classifier on a network's own features.

    Attributes
    ----------
    weight, bias
        float32 [classes, d] and [classes], for features as the network has them. A class without images has no
        weights, and a score of -10,000: it is never the answer.
    layer
        Name of the layer in whose place they go.
    lam
        Strength of the regularization.
    accuracy
        ``"train"`` and ``"held_out"``: the share of rows that are given their label. Optimistic where other views of
        the same images were trained on; ``settings["held_out_by"]`` is ``"views"`` then.
    violation
        How far the weights are from the optimum: by how much they miss its conditions at most, as a share of `lam`.
    path
        All solutions, from the strongest regularization on.
    settings
        How it was made: plain JSON values.
    """

    weight: Tensor
    bias: Tensor
    layer: str
    lam: float
    accuracy: Mapping[str, float]
    violation: float
    path: tuple[PathPoint, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nonzeros(self) -> Tensor:
        """int64 [classes]: how many features each class rests on."""
        return self.weight.count_nonzero(dim=1)

    def sparse_copy(self, model: nn.Module | LoadedModel) -> nn.Module:
        """A deep copy of the model with this classifier in place of its own.

        Raises
        ------
        InvalidInputError
            If the model has no such layer.
        """
        with torch.inference_mode(False):  # parameters made in it could not take part in a gradient
            duplicate = copy.deepcopy(bare_module(model))
            own = _classifier(duplicate, self.layer, self.weight.shape[1], len(self.weight))
            flag = own.weight.requires_grad
            own.bias = nn.Parameter(self.bias.to(own.weight, copy=True), flag)
            own.weight = nn.Parameter(self.weight.to(own.weight, copy=True), flag)
        return duplicate

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the classifier to one safetensors file, whole or not at all.

        Raises
        ------
        InvalidInputError
            If the file cannot be written.
        """
        header = {
            "layer": self.layer,
            "lam": self.lam,
            "accuracy": dict(self.accuracy),
            "violation": self.violation,
            "path": self.path,
            "settings": dict(self.settings),
        }
        tensors = {name: getattr(self, name).cpu().contiguous() for name in ("weight", "bias")}
        write_tensors(path, _METADATA_KEY, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseFC:
        """Read what :meth:`save` wrote.

        Raises
        ------
        InvalidInputError
            If the file cannot be read, is no sparse classifier, or contradicts itself; the message names the file.
        """
        with read_tensors(path, _METADATA_KEY, "a sparse classifier", "SparseFC.save") as (header, tensors):
            if tensors["weight"].dim() != 2 or tensors["bias"].shape != tensors["weight"].shape[:1]:
                raise ValueError("weight and bias contradict each other")
            points = tuple(PathPoint(*point) for point in header.pop("path"))
            return cls(tensors["weight"], tensors["bias"], path=points, **header)


# Features


@without_autocast
def penultimate_features(
    model: nn.Module | LoadedModel,
    images: Sequence[Source],
    *,
    views: int = 1,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> Features:
    """What a network's classifier sees of images: the inputs of the linear layer whose outputs are the class scores.

    The layer is found by watching the network run, in evaluation mode. The model is left as it was.

    Parameters
    ----------
    model
        The network, or what :func:`spade_fast.load_model` returned.
    images
        Files of photographs, photographs, or pixel values [3, H, W] in 0..1 as float tensors. Files that cannot be read
        are left out and listed.
    views
        Rows for each image: the first is of the image as the network sees it, the others are of random crops, mirrored
        or not, with slight shifts of brightness and hue.
    preprocess
        Turns views [n, 3, h, w] in 0..1 into model inputs. Default: the model's own, where it is known.
    seed
        Of the views.
    batch_size
        Views that go through the model at a time. Changes the result only by rounding.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    Features

    Raises
    ------
    InvalidInputError
        If no image can be read, one in memory cannot be used, or the class scores are not the output of an
        ``nn.Linear``; the message says what was found instead.
    """
    for name, value, least in (("views", views, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_whole(name, value, least)
    module, preprocess = resolve_model(model, preprocess)
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise InvalidInputError(f"images must be a sequence of files, photographs or tensors, got {images!r:.200}")
    unreadable: dict[str, str] = {}
    bar = tqdm(images, "features", disable=not progress, leave=False)
    rows = _views(bar, preprocess, views, torch.Generator().manual_seed(seed), unreadable)
    layers: set[str] = set()
    sources: list[int] = []
    values, answers = [], []
    with evaluation_mode(module), torch.no_grad():
        while batch := list(islice(rows, batch_size)):
            positions, pixels = zip(*batch, strict=True)
            inputs = like_weights(preprocess(torch.stack(pixels)), module)
            layer, found, scores = _watch(module, inputs)
            layers.add(layer)
            sources += positions
            values.append(found.float().cpu())
            answers.append(scores.argmax(dim=1).cpu())
    if not values:
        reason = next(iter(unreadable.values()), "the sequence is empty")
        raise InvalidInputError(f"none of {len(images)} images can be read: {reason}")
    if len(layers) > 1:
        raise InvalidInputError(
            f"{type(module).__name__} has another classifier for other images ({', '.join(sorted(layers))}): which one "
            "is to be sparse cannot be told"
        )
    settings = {
        "model": model.name if isinstance(model, LoadedModel) else type(module).__name__,
        "images": len(set(sources)),
        "views": views,
        "preprocess": preprocess.to_dict() if isinstance(preprocess, Preprocess) else repr(preprocess),
        "seed": seed,
    }
    return Features(torch.cat(values), torch.cat(answers), torch.tensor(sources), layers.pop(), unreadable, settings)


def _views(
    images: Iterable[Source],
    preprocess: Callable[[Tensor], Tensor],
    count: int,
    generator: torch.Generator,
    unreadable: dict[str, str],
) -> Iterator[tuple[int, Tensor]]:
    """Views [3, h, w] of all images, each with the place of its image; files that cannot be read are noted."""
    size = None
    for position, image in enumerate(images):
        if not isinstance(preprocess, Preprocess) and not isinstance(image, Tensor):
            raise InvalidInputError(
                "how large the model's inputs are cannot be told from a photograph and a function: pass tensors "
                "[3, H, W], or a spade_fast.Preprocess as preprocess"
            )
        try:
            picture = load_image(image) if isinstance(image, (str, os.PathLike)) else image
            if isinstance(preprocess, Preprocess):
                frame, view = preprocess.frame(picture), preprocess.view(picture)
            else:
                frame = view = image_tensor(picture)
        except InvalidInputError as error:
            if not isinstance(image, (str, os.PathLike)):
                raise InvalidInputError(f"image {position}: {error}") from error
            unreadable[os.fspath(image)] = str(error)
            continue
        height, width = view.shape[1:]
        size = size or (height, width)
        if size != (height, width):
            raise InvalidInputError(
                f"image {position}: the network would see {height} x {width} pixels of it, but {size[0]} x {size[1]} "
                "of those before: make all images equally large"
            )
        yield position, view
        if count > 1:
            augmentation = Augmentation(size=size, scale=_SCALE, brightness=_BRIGHTNESS, hue=_HUE)
            yield from ((position, each) for each in augmentation(frame, count - 1, generator))


class _Calls(TorchFunctionMode):
    """Watches a network run.

    Attributes
    ----------
    linear
        Input, weight, bias and result of each ``linear`` that gave a matrix.
    last
        The last function that was called, and its result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []
        self.last: tuple[str, Any] = ("no function", None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.last = getattr(func, "__name__", repr(func)), result
        if func is F.linear and result.dim() == 2:
            self.linear.append((*_linear_call(*args, **kwargs), result))
        return result


def _linear_call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def classifier_name(module: nn.Module, inputs: Tensor) -> str:
    """The name of the linear layer whose outputs are the class scores.

    Parameters
    ----------
    module
        A network of class scores [n, classes].
    inputs
        Model inputs [n, c, h, w], already normalised.

    Raises
    ------
    InvalidInputError
        If the class scores are not the output of one linear layer, called once.
    """
    with evaluation_mode(module), torch.no_grad():
        return _watch(module, inputs)[0]


def _watch(module: nn.Module, inputs: Tensor) -> tuple[str, Tensor, Tensor]:
    """Name and inputs [n, d] of the linear layer whose outputs are the class scores, and these, [n, classes]."""
    kind = type(module).__name__
    try:
        with _Calls() as calls:
            outputs = Runner(module)(inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InvalidInputError(
            f"{kind} cannot be run on {inputs.dtype} {list(inputs.shape)} on {inputs.device} ({first_line(error)})"
        ) from error
    scores = check_outputs(outputs, len(inputs))
    if not scores.isfinite().all():
        raise InvalidInputError(f"{kind} gives NaN or infinite class scores")
    own = [call for call in calls.linear if call[3] is scores]
    # Once more, since what a layer gave may have been changed in place.
    if not own or not torch.allclose(F.linear(*own[-1][:3]), scores, rtol=1e-3, atol=1e-5):
        name, result = calls.last
        raise InvalidInputError(
            f"the class scores of {kind} are not the output of a linear layer"
            f"{f', but of {name}' if result is scores else ''}: only an nn.Linear at the end can be made sparse"
        )
    found, weight, _, _ = own[-1]
    names = [name for name, each in module.named_modules() if isinstance(each, nn.Linear) and each.weight is weight]
    if len(names) != 1:
        which = f"is shared by {' and '.join(map(repr, names))}" if names else "is no parameter of an nn.Linear"
        raise InvalidInputError(f"the weight that the class scores of {kind} are computed with {which}")
    if sum(call[1] is weight for call in calls.linear) > 1:
        raise InvalidInputError(f"layer {names[0]!r} of {kind} is called more than once: its features would change too")
    return names[0], found, scores


def _classifier(module: nn.Module, layer: str, columns: int, rows: int | None = None) -> nn.Linear:
    """The linear layer of that name, if it has so many columns, and rows."""
    kind = type(module).__name__
    found = dict(module.named_modules(remove_duplicate=False)).get(layer)
    if not isinstance(found, nn.Linear) or not isinstance(found._parameters.get("weight"), nn.Parameter):
        raise InvalidInputError(
            f"this {kind} has no nn.Linear {layer!r} with a plain weight: pass the network that the features are of"
        )
    shape = list(found.weight.shape)
    if shape != [shape[0] if rows is None else rows, columns]:
        needed = f"{columns} features" + ("" if rows is None else f" and {rows} classes")
        raise InvalidInputError(
            f"layer {layer!r} of this {kind} has {shape[1]} features and {shape[0]} classes, but {needed} are asked "
            "for: pass the network that the features are of"
        )
    return found


# The elastic net


@without_autocast
def sparse_fc(
    model: nn.Module | LoadedModel,
    features: Features,
    labels: Sequence[int] | Tensor,
    *,
    nonzeros: float | None = None,
    accuracy_loss: float = 0.05,
    alpha: float = 0.99,
    steps: int = 50,
    epochs: int = 1000,
    batch_size: int = 32,
    held_out: float = 0.2,
    seed: int = 0,
    progress: bool = False,
) -> SparseFC:
    """Fit a sparse classifier to a network's features: an elastic net, by glm_saga (Wong et al. 2021, section 2).

    For each of a row of strengths lambda, from that which leaves no weight down, the solution W, b minimises::

        mean cross entropy(softmax(W z + b), label) + lambda (alpha |W|_1 + (1 - alpha) / 2 |W|_2^2)

    where z are the features, standardized by what is trained on. Of these solutions one is chosen, and rewritten for
    features as they are. Classes without images take no part, which is the optimum's limit: see :class:`SparseFC`.

    Parameters
    ----------
    model
        The network that the features are of.
    features
        What :func:`penultimate_features` gave.
    labels
        The right class of each row: `features.answers` explains the network as it is; if you have labels of images,
        `labels[features.images]`.
    nonzeros
        Choose, among the solutions with at most so many nonzero weights per class, on average over classes that have
        images, the most accurate on what is held out. The path ends where there are more.
    accuracy_loss
        Without `nonzeros`: choose the sparsest solution whose held-out accuracy is at most so much below the best of
        the path. Solutions without any weight are never chosen.
    alpha
        Share of the 1-norm in the penalty, above 0 and up to 1.
    steps
        Number of strengths, in equal ratios down to 1/100 of the first, or to 1/1000 if there are more rows than
        features.
    epochs
        Passes over the features for each of them, at most. It ends sooner where the conditions of an optimum hold
        within 2 % of lambda, and warns where they do not.
    batch_size
        Rows of one step of SAGA, for each of which glm_saga makes rows x classes with images x features numbers: time
        and memory grow with their product.
    held_out
        Share of the rows that is not trained on. Whole images where each class can spare so many, else views. Each
        class keeps a row to train on.
    seed
        Of what is held out and of the order of the rows. Equal seeds give equal bits.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    SparseFC

    Raises
    ------
    InvalidInputError
        For features of another network, labels and settings that cannot be used, or too few images.
    MissingDependencyError
        If glm_saga is not installed.
    """
    if not isinstance(features, Features):
        raise InvalidInputError(
            f"features is a {type(features).__name__}: pass what spade_fast.penultimate_features returns"
        )
    for name, value, least in (("steps", steps, 2), ("epochs", epochs, 1), ("batch_size", batch_size, 1)):
        check_whole(name, value, least)
    check_whole("seed", seed, 0)
    if not 0 < held_out < 1:
        raise InvalidInputError(f"held_out must be a share of the rows within 0..1, got {held_out!r}")
    if not 0 < alpha <= 1:
        raise InvalidInputError(f"alpha must be above 0, or nothing would be sparse, and at most 1, got {alpha!r}")
    if not 0 <= accuracy_loss <= 1:
        raise InvalidInputError(f"accuracy_loss must be a share within 0..1, got {accuracy_loss!r}")
    if nonzeros is not None and not 0 < nonzeros < math.inf:
        raise InvalidInputError(f"nonzeros must be a positive number of weights per class, got {nonzeros!r}")
    classes = _check_features(features, bare_module(model))
    given = _check_labels(labels, len(features.values), classes)
    present, target = torch.unique(given, return_inverse=True)
    if len(present) < 2:
        raise InvalidInputError(f"all {len(given)} rows are of class {present[0]}: pass images of two classes at least")
    generator = torch.Generator().manual_seed(seed)
    held = _hold_out(target, features.images, held_out, generator)
    mean, scale = _standardization(features.values[~held])
    # In the default dtype, which glm_saga makes its tables in.
    inputs = ((features.values.double() - mean) * scale).to(torch.get_default_dtype())

    with torch.no_grad():
        net = _ElasticNet(inputs[~held], target[~held], len(present), alpha, batch_size, generator)
        solutions = []
        for lam in tqdm(net.strengths(steps), "elastic net", disable=not progress, leave=False):
            violation = net.solve(lam, epochs)
            count = int(net.linear.weight.count_nonzero()) / len(present)
            if nonzeros is not None and count > nonzeros:
                break
            point = PathPoint(lam, count, _accuracy(net.linear(inputs[held]), target[held]))
            solutions.append(_Solution(point, net.linear.weight.to_sparse(), net.linear.bias.clone(), violation))
        chosen = _choose(solutions, nonzeros, accuracy_loss)
        if late := sum(each.violation > _TOLERANCE for each in solutions):
            also = "the chosen one too" if chosen.violation > _TOLERANCE else "not the chosen one"
            warnings.warn(
                f"{late} of {len(solutions)} solutions ({also}) are not at their optimum after {epochs} epochs, and so "
                "less sparse than they should be: raise epochs",
                stacklevel=3,
            )
        weight, bias = scale.new_zeros(classes, len(scale)), scale.new_full((classes,), _NEVER)
        weight[present] = chosen.weight.to_dense() * scale
        bias[present] = chosen.bias - weight[present] @ mean
        weight, bias = weight.float(), bias.float()
        scores = F.linear(features.values, weight, bias)
    is_split = not set(features.images[held].tolist()).isdisjoint(features.images[~held].tolist())
    return SparseFC(
        weight=weight,
        bias=bias,
        layer=features.layer,
        lam=chosen.point.lam,
        accuracy={name: _accuracy(scores[rows], given[rows]) for name, rows in (("train", ~held), ("held_out", held))},
        violation=chosen.violation,
        path=tuple(each.point for each in solutions),
        settings={
            "features": dict(features.settings),
            "rows": len(given),
            "classes_with_images": len(present),
            "nonzeros": nonzeros,
            "accuracy_loss": accuracy_loss,
            "alpha": alpha,
            "steps": steps,
            "epochs": epochs,
            "batch_size": batch_size,
            "held_out": held_out,
            "held_out_by": "views" if is_split else "images",
            "held_out_rows": held.nonzero()[:, 0].tolist(),
            "seed": seed,
            "versions": {name: version(name) for name in ("spade-fast", "torch", "glm-saga")},
        },
    )


class _Solution(NamedTuple):
    point: PathPoint
    weight: Tensor  # [classes, d], sparse
    bias: Tensor
    violation: float


def _choose(solutions: Sequence[_Solution], nonzeros: float | None, accuracy_loss: float) -> _Solution:
    filled = [each for each in solutions if each.point.nonzeros]
    if not filled:
        raise InvalidInputError(f"no solution has weights, yet at most {nonzeros} per class: raise nonzeros or steps")
    if nonzeros is not None:
        return max(filled, key=lambda each: (each.point.accuracy, -each.point.nonzeros))
    best = max(each.point.accuracy for each in filled)
    enough = [each for each in filled if each.point.accuracy >= best - accuracy_loss]
    return min(enough, key=lambda each: (each.point.nonzeros, -each.point.accuracy))


def _check_features(features: Features, module: nn.Module) -> int:
    """The number of classes of the network, if the features are its own."""
    values, answers = features.values, features.answers
    if values.dim() != 2 or not values.numel() or not values.isfinite().all():
        raise InvalidInputError(f"the features must be a finite matrix [n, d], got {list(values.shape)}")
    if answers.shape != values.shape[:1] or features.images.shape != values.shape[:1]:
        raise InvalidInputError(
            f"there are {len(values)} rows of features, but {len(answers)} answers and {len(features.images)} images"
        )
    layer = _classifier(module, features.layer, values.shape[1])
    bias = None if layer.bias is None else layer.bias.detach().float().cpu()
    scores = F.linear(values, layer.weight.detach().float().cpu(), bias)
    classes = scores.shape[1]
    foreign = int(answers.max()) >= classes
    if not foreign:
        short = scores.amax(dim=1) - scores.gather(1, answers[:, None])[:, 0]
        foreign = bool((short > _ROUNDING * scores.abs().amax(dim=1)).any())
    if foreign:
        raise InvalidInputError(
            f"layer {features.layer!r} of this {type(module).__name__} gives other answers on these features than they "
            "come with: pass the network that the features are of"
        )
    return classes


def _check_labels(labels: Sequence[int] | Tensor, rows: int, classes: int) -> Tensor:
    """Labels int64 [rows], on the CPU."""
    try:
        given = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"labels must be whole numbers, one for each row ({first_line(error)})") from error
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool or given.dim() != 1:
        raise InvalidInputError(f"labels must be whole numbers [{rows}], got {given.dtype} {list(given.shape)}")
    if len(given) != rows:
        raise InvalidInputError(
            f"there are {rows} rows of features, but {len(given)} labels: pass one for each row, such as "
            "labels[features.images]"
        )
    outside = ((given < 0) | (given >= classes)).nonzero()[:, 0].tolist()
    if outside:
        raise InvalidInputError(
            f"label {int(given[outside[0]])} of row {outside[0]} is no class of the network: pass whole numbers within "
            f"0..{classes - 1}"
        )
    return given.long()


def _hold_out(target: Tensor, images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """bool [n]: the rows to hold out, those of whole images if classes have enough of them, else any."""
    wanted = max(1, round(share * len(target)))
    for groups in (images, torch.arange(len(images))):
        held = torch.zeros(len(target), dtype=torch.bool)
        left = target.bincount()
        names = torch.unique(groups)
        for name in names[torch.randperm(len(names), generator=generator)]:
            rows = groups == name
            taken = target[rows].bincount(minlength=len(left))
            if ((taken == 0) | (taken < left)).all():
                held |= rows
                left -= taken
            if held.sum() >= wanted:
                return held
    if not held.any():
        raise InvalidInputError(
            f"none of {len(target)} rows can be held out, since each class keeps one to train on and none has more: "
            "pass more images, or more views of each"
        )
    return held


def _standardization(values: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [d]: the means of the features, and the reciprocals of their deviations, 0 for constant ones."""
    values = values.double()
    mean, deviation = values.mean(dim=0), values.std(dim=0)
    constant = deviation <= _CONSTANT * values.abs().amax(dim=0)
    if constant.all():
        raise InvalidInputError("no feature differs from row to row: pass other images")
    return mean, torch.where(constant, 0, 1 / deviation)


class _ElasticNet:
    """An elastic net, solved for one strength after the other, each time from the last solution on.

    Parameters
    ----------
    inputs, target
        [n, d], standardized, and [n].
    classes, alpha, batch_size
        As in :func:`sparse_fc`.
    generator
        Of the order of the rows.

    Attributes
    ----------
    linear
        The solution so far. At first, that of the strongest regularization: the frequencies of the classes.
    """

    def __init__(
        self, inputs: Tensor, target: Tensor, classes: int, alpha: float, batch_size: int, generator: torch.Generator
    ) -> None:
        self._inputs, self._target, self._alpha = inputs, target, alpha
        self._batch_size, self._generator = batch_size, generator
        self._solver = require("glm_saga.elasticnet", "interpret")
        self._rate = _RATE
        frequencies = target.bincount(minlength=classes) / len(target)
        self.linear = _linear(inputs.new_zeros(classes, inputs.shape[1]), frequencies.log().to(inputs))

    def strengths(self, count: int) -> list[float]:
        """Lambdas in equal ratios, from the least that leaves no weight down to as far as glmnet goes."""
        largest = self._gradients()["w_grad_avg"].abs().max().item() / self._alpha
        rows, columns = self._inputs.shape
        ratio = 0.001 if rows > columns else 0.01
        return [largest * ratio ** (step / (count - 1)) for step in range(count)]

    def solve(self, lam: float, epochs: int) -> float:
        """Go on to the solution for this lambda; how far from it `linear` is then."""
        state, loss, done = self._gradients(), self._loss(self.linear, self._inputs, lam), 0
        while (violation := self._violation(state, lam)) > _TOLERANCE and done < epochs:
            passes = min(_ROUND, epochs - done)
            # Those features alone that have a weight, or should have: the others stay without.
            active = (self.linear.weight != 0) | (state["w_grad_avg"].abs() > lam * self._alpha)
            columns = active.any(dim=0).nonzero()[:, 0]
            inputs = self._inputs[:, columns]
            trial = _linear(self.linear.weight[:, columns], self.linear.bias.clone())
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Implicit dimension choice for softmax", UserWarning)
                self._solver.train_saga(
                    trial,
                    _Batches(inputs, self._target, self._batch_size, self._generator),
                    self._rate,
                    passes,
                    lam,
                    self._alpha,
                    group=False,
                    state={**state, "w_grad_avg": state["w_grad_avg"][:, columns]},
                    n_ex=len(inputs),
                    n_classes=len(trial.bias),
                    lookbehind=passes + 1,  # never: its own criteria stop it far from the optimum
                    logger=lambda _: None,
                )
            done += passes
            # The rate that is safe for any data is some hundred times too small: the largest that works is sought.
            reached = self._loss(trial, inputs, lam)
            if reached <= loss * (1 + 1e-6):
                loss, self._rate = reached, self._rate * _GROWTH
                self.linear.weight[:, columns] = trial.weight
                self.linear.bias.copy_(trial.bias)
            else:
                self._rate /= 2
            state = self._gradients()
        return violation

    def _loss(self, linear: nn.Linear, inputs: Tensor, lam: float) -> float:
        return float(self._solver.elastic_loss(linear, inputs, self._target, lam, self._alpha))

    def _gradients(self) -> dict[str, Tensor]:
        """What SAGA keeps: each row's gradient by its scores, and the mean gradients by weights and biases."""
        table = self.linear(self._inputs).softmax(dim=1)
        table[torch.arange(len(table)), self._target] -= 1
        return {
            "a_table": table,
            "w_grad_avg": table.T @ self._inputs / len(table),
            "b_grad_avg": table.mean(dim=0),
        }

    def _violation(self, gradients: Mapping[str, Tensor], lam: float) -> float:
        """By how much the gradients miss what an optimum asks of them, at most, as a share of lambda."""
        weight = self.linear.weight
        slope = gradients["w_grad_avg"] + lam * (1 - self._alpha) * weight
        bound = lam * self._alpha
        missed = torch.where(weight != 0, (slope + bound * weight.sign()).abs(), (slope.abs() - bound).clamp(min=0))
        return max(missed.max().item(), gradients["b_grad_avg"].abs().max().item()) / lam


class _Batches:
    """Batches of rows in a new random order each time, as glm_saga takes them: features, classes, numbers of rows."""

    def __init__(self, inputs: Tensor, target: Tensor, size: int, generator: torch.Generator) -> None:
        self._inputs, self._target, self._size, self._generator = inputs, target, size, generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for chosen in torch.split(torch.randperm(len(self._target), generator=self._generator), self._size):
            yield self._inputs[chosen], self._target[chosen], chosen


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with these, of any shape, made without random numbers."""
    linear = nn.Linear(1, 1, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return linear


def _accuracy(scores: Tensor, target: Tensor) -> float:
    return (scores.argmax(dim=1) == target).double().mean().item()
