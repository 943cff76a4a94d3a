"""Feature visualization: the image that a neuron answers to most, for the dense network and for its traces.

Gradient ascent from noise, as in Olah et al. 2017 (https://distill.pub/2017/feature-visualization), on torch-lucent's
parametrization, colours and transformations. The loop is our own, as ``lucent.optvis.render.render_vis`` cannot be
called safely: it hooks every module and leaves the hooks there, goes on with the activation of an earlier step when the
network fails, ends quietly on Ctrl-C, adds to the gradients of the network's parameters, knows no preprocessing but
torchvision's, and reads an activation only after an in-place ReLU behind the layer has overwritten it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast.attribution import like_weights
from spade_fast.autocast import without_autocast
from spade_fast.errors import InvalidInputError, check_whole, first_line, require
from spade_fast.files import write_folder
from spade_fast.images import image_tensor
from spade_fast.models import LoadedModel, evaluation_mode, resolve_model
from spade_fast.preprocessing import Preprocess
from spade_fast.randomness import seeded
from spade_fast.readonly import ReadOnlyMappings
from spade_fast.traces import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A batch [1, 3, h, w] of pixels to another.
Transform: TypeAlias = Callable[[Tensor], Tensor]

_PNG_DPI = 160
_DENSE_ARM = "the dense network"


@dataclass(frozen=True, eq=False)
class Visualization(ReadOnlyMappings):
    """What a neuron answers to most, in the dense network and in its traces.

    Attributes
    ----------
    dense
        Images of the dense network, one for each threshold: float32 [thresholds, 3, size, size] in 0..1, on the CPU.
    spade
        The same for each trace, in their order.
    layer, channel
        The neuron: a channel of a map, or a unit of an output.
    name
        Name of the class where the neuron is one of the network's answers, ``"class 967"`` where that has none; else
        ``"channel 12"`` or, outside of maps, ``"unit 12"``.
    thresholds
        Steps of gradient ascent after which the images were kept.
    dense_score, spade_scores
        The objective at the last image, without transformations: the mean activation of the channel, in units of the
        layer's output. Each by the network that the image was made with.
    settings
        How the images were made: plain JSON values.
    """

    dense: Tensor
    spade: tuple[Tensor, ...]
    layer: str
    channel: int
    name: str
    thresholds: tuple[int, ...]
    dense_score: float
    spade_scores: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def figure(self, *, photos: Sequence[Image.Image | Tensor] | None = None) -> Figure:
        """The picture: a column for the dense network and one for each trace, a row for each threshold.

        With the photographs of the traces above their columns it is Figure 1 (left) of the paper.

        Parameters
        ----------
        photos
            One for each trace: PIL images, or float tensors [3, H, W] in 0..1.

        Returns
        -------
        matplotlib.figure.Figure
            ``figure.savefig(path)`` needs no display.

        Raises
        ------
        InvalidInputError
            If there are not as many photographs as traces, or one cannot be used.
        MissingDependencyError
            If matplotlib is not installed.
        """
        return _figure(self, _check_photos(photos, len(self.spade)))

    def report(self) -> dict[str, Any]:
        """Everything but the images, as plain JSON values."""
        return {
            "layer": self.layer,
            "channel": self.channel,
            "name": self.name,
            "thresholds": list(self.thresholds),
            "dense_score": self.dense_score,
            "spade_scores": list(self.spade_scores),
            "settings": dict(self.settings),
            "versions": {
                "spade_fast": version("spade-fast"),
                "torch": torch.__version__,
                "torch-lucent": version("torch-lucent"),
                "python": platform.python_version(),
            },
        }

    def save(
        self, folder: str | os.PathLike[str], *, photos: Sequence[Image.Image | Tensor] | None = None
    ) -> dict[str, Path]:
        """Write figure, images and report into a folder, each file whole or not at all.

        Parameters
        ----------
        folder
            Made where it is missing. Files of the same names are replaced.
        photos
            As in :meth:`figure`.

        Returns
        -------
        dict[str, Path]
            What was written, by its path within the folder: ``visualization.png``; the images after each threshold,
            ``images/dense_512.png``, ``images/spade_1_512.png``, ..., in 8 bits, and the same as float32 [3, h, w],
            ``images/dense_512.npy``, ...; and, last, ``report.json``.

        Raises
        ------
        InvalidInputError
            As :meth:`figure`, or if the folder cannot be made or a file cannot be written.
        """
        png = io.BytesIO()
        self.figure(photos=photos).savefig(png, format="png", dpi=_PNG_DPI)
        contents = {"visualization.png": png.getvalue()}
        for arm, images in (("dense", self.dense), *((f"spade_{n}", found) for n, found in enumerate(self.spade, 1))):
            for threshold, image in zip(self.thresholds, images, strict=True):
                picture, array = io.BytesIO(), io.BytesIO()
                Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).save(picture, format="png")
                np.save(array, image.numpy())
                contents[f"images/{arm}_{threshold}.png"] = picture.getvalue()
                contents[f"images/{arm}_{threshold}.npy"] = array.getvalue()
        report = json.dumps(self.report(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        contents["report.json"] = report.encode()
        return write_folder(folder, contents)


@without_autocast
def visualize(
    model: nn.Module | LoadedModel,
    layer: str,
    channel: int,
    *,
    trace: Trace | Sequence[Trace] | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    size: int | None = None,
    thresholds: Sequence[int] = (512,),
    seed: int = 0,
    fourier: bool = True,
    decorrelate: bool = True,
    transforms: Sequence[Transform] | None = None,
    learning_rate: float = 0.05,
    progress: bool = False,
) -> Visualization:
    """Find the image that a neuron answers to most, by the dense network and by its traces (SPADE section 3, Figure 1).

    Gradient ascent on the pixels (Olah et al. 2017), from the same noise and under the same transformations for all
    networks: where the images differ, the networks do. The network runs in evaluation mode and is left as it was, bit
    for bit. The random numbers of Python, numpy and torch are seeded meanwhile and put back afterwards. Equal seeds
    give equal bits on one machine with one number of threads, as long as no other thread draws random numbers and, on
    a GPU, the network's own operators are deterministic there. Anything else rounds differently, and ascent magnifies
    that.

    Parameters
    ----------
    model
        The network, or what :func:`spade_fast.load_model` returned.
    layer
        Name of a module in the model, ``"layer4.1"``. Of one that is called several times, the last call counts.
    channel
        Of a map [n, c, h, w] a channel, maximised in the mean over positions; of an output [n, c] a unit, such as the
        neuron of a class; of tokens [n, t, c] a unit, maximised in the mean over tokens. A map whose first two sides
        alone are equal is taken for [n, h, w, c], as Swin gives them.
    trace
        A trace of this model, or several: those of different images of a class, for one.
    preprocess
        As in :func:`spade_fast.trace`.
    size
        Side of the image, in pixels. Default: the network's input size, where it is known.
    thresholds
        Steps after which to keep the image, increasing; the last one is the number of steps.
    seed
        Of the noise and the transformations.
    fourier
        Optimise the image's spectrum, scaled to that of natural images, not its pixels.
    decorrelate
        Optimise colours in which natural images are uncorrelated, not red, green and blue.
    transforms
        What the image goes through in every step, so that it does not fall back on what a network answers to by a
        hair's breadth: functions of a batch [1, 3, h, w] on the model's device, called one after the other; empty for
        none. Default: lucent's, which pad, shift, scale and rotate at random. What comes out larger than `size` is cut
        to its centre, as some networks take one size only.
    learning_rate
        Of Adam.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    Visualization

    Raises
    ------
    InvalidInputError
        For arguments that cannot be used, before the first step; and for a network that fails or answers with NaN in a
        later one.
    MissingDependencyError
        If torch-lucent is not installed.

    Warns
    -----
    UserWarning
        If the neuron answers to nothing (a trace may have lost it): the image is the noise it began as.
    """
    _lucent()  # first, as all else needs it
    module, preprocess = resolve_model(model, preprocess)
    traces = _check_traces(trace)
    plan = _Plan(
        module=module,
        preprocess=preprocess,
        layer=_check_layer(module, layer),
        channel=check_whole("channel", channel, 0),
        size=_input_size(model, preprocess) if size is None else check_whole("size", size, 1),
        thresholds=_check_thresholds(thresholds),
        seed=check_whole("seed", seed, 0),
        fourier=_check_flag("fourier", fourier),
        decorrelate=_check_flag("decorrelate", decorrelate),
        transforms=_check_transforms(transforms),
        learning_rate=_check_rate(learning_rate),
        device=like_weights(torch.empty(0, device="cpu"), module).device,
    )
    for one in traces:
        with one.applied(module):  # does it fit?
            pass
    kind = _probe(plan)

    arms: list[tuple[str, Callable[[], contextlib.AbstractContextManager[object]]]]
    arms = [(_DENSE_ARM, contextlib.nullcontext)]
    for number, one in enumerate(traces, 1):
        arms.append((f"trace {number}" if len(traces) > 1 else "the trace", functools.partial(one.applied, module)))
    images, scores = [], []
    total = len(arms) * plan.thresholds[-1]
    with tqdm(total=total, desc="visualization", disable=not progress, leave=False) as bar:
        for arm, applied in arms:
            with applied():
                found, score = _ascend(plan, arm, bar)
            images.append(found)
            scores.append(score)
    if kind != "class":
        name = f"{kind} {channel}"
    else:
        name = model.category(channel) if isinstance(model, LoadedModel) else f"class {channel}"
    return Visualization(
        dense=images[0],
        spade=tuple(images[1:]),
        layer=layer,
        channel=channel,
        name=name,
        thresholds=plan.thresholds,
        dense_score=scores[0],
        spade_scores=tuple(scores[1:]),
        settings={
            "model": model.name if isinstance(model, LoadedModel) else type(module).__name__,
            "weights": model.source if isinstance(model, LoadedModel) else None,
            "kind": kind,
            "size": plan.size,
            "seed": seed,
            "fourier": plan.fourier,
            "decorrelate": plan.decorrelate,
            "transforms": "standard" if plan.transforms is None else [_described(one) for one in plan.transforms],
            "learning_rate": plan.learning_rate,
            "preprocess": preprocess.to_dict() if isinstance(preprocess, Preprocess) else None,
            "traces": [{"sparsity": one.sparsity, "settings": dict(one.settings)} for one in traces],
        },
    )


# Gradient ascent


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What all images of one call have in common: the network, and settings that were checked."""

    module: nn.Module
    preprocess: Callable[[Tensor], Tensor]
    layer: str
    channel: int
    size: int
    thresholds: tuple[int, ...]
    seed: int
    fourier: bool
    decorrelate: bool
    transforms: tuple[Transform, ...] | None
    learning_rate: float
    device: torch.device

    @property
    def submodule(self) -> nn.Module:
        return self.module.get_submodule(self.layer)


class _Activation:
    """Forward hook that keeps a neuron's mean activation in the last call of its layer.

    The mean is taken at once: an in-place operation behind the layer would change the layer's own output.
    """

    def __init__(self, plan: _Plan) -> None:
        self.layer, self.channel = plan.layer, plan.channel
        self.value: Tensor | None = None

    def __call__(self, _: nn.Module, __: Any, output: Any) -> None:
        where = f"layer {self.layer!r}"
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() not in (2, 3, 4):
            got = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise InvalidInputError(
                f"{where} gives {got}, not a float tensor [n, c, h, w], [n, t, c] or [n, c]: choose a layer within it, "
                "or behind it"
            )
        axis = {2: 1, 3: 2, 4: 1}[output.dim()]
        if output.dim() == 4 and output.shape[1] == output.shape[2] != output.shape[3]:
            axis = 3  # channels last: a square image gives square maps
        count = output.shape[axis]
        if self.channel >= count:
            raise InvalidInputError(
                f"{where} has {count} channels, and {self.channel} is none of them: pass one within 0..{count - 1}"
            )
        chosen = output.select(axis, self.channel)
        self.value = chosen.to(torch.promote_types(chosen.dtype, torch.float32)).mean()


def _activation(plan: _Plan, image: Tensor, where: str) -> tuple[Tensor, Any]:
    """Activation of the neuron for an image [1, 3, h, w] on any device, and what the network gave."""
    kind = type(plan.module).__name__
    activation = _Activation(plan)
    try:
        with plan.submodule.register_forward_hook(activation):
            # A copy, since a network that begins in place cannot do so on what gradients are asked for.
            inputs = like_weights(plan.preprocess(image.to(plan.device)), plan.module).clone()
            answer = plan.module(inputs)
    except InvalidInputError:
        raise
    except Exception as error:  # networks and their preprocessing raise what they like
        raise InvalidInputError(
            f"{kind} fails {where}, on an image of {image.shape[2]} x {image.shape[3]} pixels "
            f"({first_line(error)}): does it take inputs of this size?"
        ) from error
    if activation.value is None:
        raise InvalidInputError(
            f"layer {plan.layer!r} is not called when {kind} runs: choose one that takes part in its answer"
        )
    if not activation.value.isfinite():
        raise InvalidInputError(f"layer {plan.layer!r} of {kind} gives NaN or infinite values {where}")
    return activation.value, answer


def _gradient(plan: _Plan, value: Tensor, parameter: Tensor) -> Tensor:
    # Not `backward`, which would add to the gradients of the network's parameters as well.
    try:
        (gradient,) = torch.autograd.grad(value, [parameter], allow_unused=True) if value.requires_grad else (None,)
    except RuntimeError as error:
        raise InvalidInputError(
            f"no gradient can be taken through {type(plan.module).__name__} up to layer {plan.layer!r} "
            f"({first_line(error)})"
        ) from error
    if gradient is None:
        raise InvalidInputError(
            f"no gradient flows from layer {plan.layer!r} to the image: {type(plan.module).__name__}, its "
            "preprocessing or a transform detaches it or runs under no_grad"
        )
    return gradient


def _ascend(plan: _Plan, arm: str, bar: Any) -> tuple[Tensor, float]:
    """Images [thresholds, 3, size, size], and the activation for the last one."""
    images: list[Tensor] = []
    answered = False
    with _running(plan):
        parameter, draw = _canvas(plan)
        optimizer = torch.optim.Adam([parameter], lr=plan.learning_rate, maximize=True)
        for step in range(1, plan.thresholds[-1] + 1):
            value, _ = _activation(plan, _transformed(plan, draw()), f"in step {step} for {arm}")
            parameter.grad = _gradient(plan, value, parameter)
            answered |= bool(parameter.grad.any())
            with torch.device("cpu"):
                optimizer.step()
            if step in plan.thresholds:
                images.append(draw().detach()[0])
            bar.update()
        with torch.no_grad():
            score, _ = _activation(plan, images[-1][None], f"on the finished image for {arm}")
    if not answered:
        warnings.warn(
            f"channel {plan.channel} of layer {plan.layer!r} answers to nothing in {arm}: its image is the noise it "
            "began as",
            stacklevel=4,  # the caller of `visualize`, behind the wrapper of `without_autocast`
        )
    return torch.stack(images), float(score)


def _probe(plan: _Plan) -> str:
    """Go through one step of the dense network, to see whether it works, and tell what kind of neuron it is."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs[:] = [output.detach().clone()] if isinstance(output, Tensor) else []

    with _running(plan), plan.submodule.register_forward_hook(keep):
        parameter, draw = _canvas(plan)
        value, answer = _activation(plan, _transformed(plan, draw()), f"in a first trial of {_DENSE_ARM}")
        _gradient(plan, value, parameter)
    output = outputs[0]
    if output.dim() == 4:
        return "channel"
    is_answer = isinstance(answer, Tensor) and torch.equal(output.nan_to_num(), answer.nan_to_num())
    return "class" if is_answer and output.dim() == 2 else "unit"


@contextlib.contextmanager
def _running(plan: _Plan) -> Iterator[None]:
    """Evaluation mode, gradients whatever the caller is in, random numbers from the seed; all put back at the end."""
    with (
        evaluation_mode(plan.module),
        torch.inference_mode(False),
        torch.enable_grad(),
        seeded(plan.seed, plan.device),
        _deterministic(plan.device),
    ):
        yield


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Have cuDNN take algorithms that give equal bits, as its own choice need not."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


# What is lucent's


@dataclass(frozen=True)
class _Lucent:
    """The parts of lucent that we use, on the CPU."""

    spatial: ModuleType
    transform: ModuleType
    colours: Tensor  # [3, 3]: from uncorrelated colours (rows) to red, green and blue


@functools.cache
def _lucent() -> _Lucent:
    """Import lucent.

    Its modules bind to the first GPU when they are imported, if there is one, whatever device the model is on. So these
    are copies of our own, bound to the CPU, which is also where gradients of resampled images have equal bits each
    time. They cost 10 ms a step at 224 pixels.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    with warnings.catch_warnings():
        # kornia 0.4, which lucent asks for, scripts some of its functions when it is imported.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is ", DeprecationWarning)
        require("lucent.optvis.transform", "visualize")
        colour = require("lucent.optvis.param.color", "visualize")
        spatial, transform = _bound_to_cpu("lucent.optvis.param.spatial"), _bound_to_cpu("lucent.optvis.transform")
    return _Lucent(spatial, transform, torch.from_numpy(colour.color_correlation_normalized.T.copy()))


def _bound_to_cpu(name: str) -> ModuleType:
    spec = importlib.util.find_spec(name)
    assert spec is not None  # the package was imported
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.device = torch.device("cpu")  # type: ignore[attr-defined]
    return module


def _canvas(plan: _Plan) -> tuple[Tensor, Callable[[], Tensor]]:
    """What is optimised, and a function that makes float32 [1, 3, size, size] in 0..1 of it, all on the CPU."""
    lucent = _lucent()
    paint = lucent.spatial.fft_image if plan.fourier else lucent.spatial.pixel_image
    with torch.device("cpu"):  # against another default device
        (parameter,), pixels = paint([1, 3, plan.size, plan.size])

    def draw() -> Tensor:
        with torch.device("cpu"):
            image: Tensor = pixels().to(torch.float32)
            # As lucent.optvis.param.color, which takes the first GPU even when it is called.
            if plan.decorrelate:
                image = (image.permute(0, 2, 3, 1) @ lucent.colours).permute(0, 3, 1, 2)
            return image.sigmoid()

    return parameter, draw


def _transformed(plan: _Plan, image: Tensor) -> Tensor:
    """The image after all transforms, cut to its centre where they enlarged it."""
    if plan.transforms is None:
        with torch.device("cpu"):
            for standard in _lucent().transform.standard_transforms:
                image = standard(image)
    else:
        image = image.to(plan.device)
        for transform in plan.transforms:
            try:
                image = transform(image)
            except Exception as error:
                raise InvalidInputError(f"transform {_described(transform)} fails ({first_line(error)})") from error
            if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[:2] != (1, 3) or not image.numel():
                got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise InvalidInputError(f"transform {_described(transform)} must give a batch [1, 3, h, w], got {got}")
    height, width = (min(side, plan.size) for side in image.shape[2:])
    top, left = (image.shape[2] - height) // 2, (image.shape[3] - width) // 2
    return image[:, :, top : top + height, left : left + width]


# Arguments


def _check_flag(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidInputError(f"{what} must be True or False, got {value!r}")
    return value


def _check_layer(module: nn.Module, layer: str) -> str:
    # A module with two names has both.
    names = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    if layer in names:
        return layer
    nearest = difflib.get_close_matches(str(layer), names, n=4, cutoff=0.5) or names[-4:]
    hint = f"nearest: {', '.join(map(repr, nearest))}" if names else "it has none: wrap it in nn.Sequential, layer '0'"
    raise InvalidInputError(f"{type(module).__name__} has no layer {layer!r}; {hint}")


def _check_traces(trace: Trace | Sequence[Trace] | None) -> tuple[Trace, ...]:
    if trace is None:
        return ()
    traces = (trace,) if isinstance(trace, Trace) else trace
    if not isinstance(traces, Sequence):
        raise InvalidInputError(f"trace must be a spade_fast.Trace or a sequence of them, got a {type(trace).__name__}")
    for position, one in enumerate(traces):
        if not isinstance(one, Trace):
            raise InvalidInputError(f"trace[{position}] is a {type(one).__name__}: pass what spade_fast.trace returns")
    return tuple(traces)


def _check_thresholds(thresholds: Sequence[int]) -> tuple[int, ...]:
    if isinstance(thresholds, int) or not isinstance(thresholds, Sequence) or not thresholds:
        raise InvalidInputError(
            f"thresholds must be a sequence of numbers of steps, such as (512,), got {thresholds!r}"
        )
    counts = tuple(check_whole("each of thresholds", count, 1) for count in thresholds)
    if any(later <= earlier for earlier, later in itertools.pairwise(counts)):
        raise InvalidInputError(f"thresholds must increase, got {list(counts)}")
    return counts


def _check_transforms(transforms: Sequence[Transform] | None) -> tuple[Transform, ...] | None:
    if transforms is None:
        if torch.get_default_dtype() != torch.float32:
            raise InvalidInputError(
                f"the standard transforms need torch's default dtype to be float32, not {torch.get_default_dtype()}: "
                "set it (torch.set_default_dtype), or pass transforms="
            )
        return None
    if not isinstance(transforms, Sequence) or not all(map(callable, transforms)):
        raise InvalidInputError(
            f"transforms must be a sequence of functions of a batch [1, 3, h, w], got {transforms!r}"
        )
    return tuple(transforms)


def _check_rate(rate: float) -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate <= 0:
        raise InvalidInputError(f"learning_rate must be a finite number above 0, got {rate!r}")
    return float(rate)


def _input_size(model: nn.Module | LoadedModel, preprocess: Callable[[Tensor], Tensor]) -> int:
    known = preprocess
    if not isinstance(known, Preprocess):
        try:
            known = resolve_model(model, None)[1]  # the model may know its size even so
        except InvalidInputError as error:
            raise InvalidInputError(
                "the network's input size is not known: pass size=, in pixels, or a spade_fast.Preprocess"
            ) from error
    assert isinstance(known, Preprocess)  # the only kind that models come with
    return known.input_size


def _check_photos(photos: Sequence[Image.Image | Tensor] | None, count: int) -> list[Tensor]:
    if photos is None:
        return []
    if len(photos) != count:
        raise InvalidInputError(
            f"{len(photos)} photos for {count} traces: pass one for each, in the order of the traces"
        )
    return [image_tensor(photo).cpu() for photo in photos]


def _described(function: Transform) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


# The figure

# Inches.
_MARGIN, _SIDE, _GAP, _ROW_LABEL, _COLUMN_TITLE, _SCORE, _LINE = 0.3, 2.6, 0.12, 0.3, 0.32, 0.3, 0.17
_LETTERS_PER_INCH = 12  # of text in 9 points


def _figure(found: Visualization, photos: Sequence[Tensor]) -> Figure:
    """The page; see `Visualization.figure`."""
    from spade_fast.figures import DENSE, NOTE, SPADE, TEXT, Page, shortened

    columns = [("Dense network", DENSE, found.dense, found.dense_score)]
    for number, (images, score) in enumerate(zip(found.spade, found.spade_scores, strict=True), 1):
        title = "SPADE trace" if len(found.spade) == 1 else f"SPADE trace {number}"
        columns.append((title, SPADE, images, score))
    width = 2 * _MARGIN + _ROW_LABEL + len(columns) * (_SIDE + _GAP) - _GAP
    model = shortened(str(found.settings.get("model", "the network")), 40)
    layer = shortened(found.layer, 40, keep_end=True)
    if found.settings.get("kind") == "class":
        title = f"“{shortened(found.name, 32)}”"
        subtitle = f"class neuron {found.channel} (layer {layer}) of {model}"
    else:
        title = found.name.capitalize()
        subtitle = f"of layer {layer} of {model}"
    caption = "The image that the neuron answers to most, found by gradient ascent from noise"
    if found.spade:
        caption += "; the same noise and transformations in all columns"
    subtitles, captions = (
        textwrap.wrap(text, int((width - 2 * _MARGIN) * _LETTERS_PER_INCH)) for text in (subtitle, caption)
    )
    head = 0.5 + _LINE * len(subtitles) + 0.05
    photo_height = max((_SIDE * min(1, photo.shape[1] / photo.shape[2]) for photo in photos), default=0)
    grid = head + (_COLUMN_TITLE + photo_height if photos else 0) + _COLUMN_TITLE
    rows = len(found.thresholds)
    bottom = grid + rows * (_SIDE + _GAP) - _GAP + _SCORE + 0.05
    page = Page(width=width, height=bottom + _LINE * len(captions) + 0.12)
    fontsize = min(16, 100 * (width - 2 * _MARGIN) / len(title))
    page.text(_MARGIN, 0.42, title, fontsize=fontsize, weight="bold", color=TEXT)
    for index, line in enumerate(subtitles):
        page.text(_MARGIN, 0.5 + _LINE * (index + 0.8), line, fontsize=9, color=NOTE)
    for column, (name, colour, images, score) in enumerate(columns):
        left = _MARGIN + _ROW_LABEL + column * (_SIDE + _GAP)
        if photos and column:
            axes = page.axes(left, head + _COLUMN_TITLE, _SIDE, photo_height)
            axes.imshow(photos[column - 1].permute(1, 2, 0).numpy())
            axes.set_anchor("N")  # titles in line
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_title(f"Photograph {column}" if len(photos) > 1 else "Photograph", fontsize=11, color=TEXT)
        for row, (threshold, image) in enumerate(zip(found.thresholds, images, strict=True)):
            axes = page.axes(left, grid + row * (_SIDE + _GAP), _SIDE, _SIDE)
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(name, fontsize=11, weight="bold", color=colour)
            if row == rows - 1:
                axes.set_xlabel(f"activation {score:.3g}", fontsize=9, color=NOTE, labelpad=4)
            if column == 0:
                unit = "step" if threshold == 1 else "steps"
                axes.set_ylabel(f"{threshold:,} {unit}", fontsize=9, color=NOTE, labelpad=4)
    for index, line in enumerate(captions):
        page.text(_MARGIN, bottom + _LINE * (index + 0.8), line, fontsize=9, color=NOTE)
    return page.figure
