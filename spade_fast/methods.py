"""The attribution methods: what each computes, by which library, and how a map of pixels comes from that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast.errors import InvalidInputError, require
from spade_fast.models import Runner, put_back
from spade_fast.preparation import Prepared, prepare
from spade_fast.randomness import seeded
from spade_fast.relevance import relevance
from spade_fast.rules import deep_lift, guided_backprop

#: (model, inputs [1, c, h, w], target) to a map [h, w] or attributions [1, c, h, w].
AttributionFunction: TypeAlias = Callable[[nn.Module, Tensor, int], Tensor]

_IG_STEPS = 50
_SHAP_SAMPLES = 64
_SHAP_NOISE = 0.1
_LIME_SEGMENTS = 64
_LIME_SAMPLES = 1000
_LIME_KERNEL_WIDTH = 0.25
# Occlusion: windows across the longer side of the image, each overlapping the next by half.
_OCCLUSION_WINDOWS = 14


@dataclass(frozen=True, eq=False)
class Question:
    """What a method is asked: how much does each pixel of this input count for this class?

    Attributes
    ----------
    module
        The network, in evaluation mode: [n, c, h, w] to [n, classes].
    inputs
        Model inputs [1, c, h, w], on the device and in the dtype of the network.
    target
        The class, an index into the outputs.
    batch_size
        Inputs that go through the network at a time.
    seed
        Of methods that draw at random.
    progress
        Whether to show progress bars on stderr.
    prepared_before
        What :attr:`prepared` is, where it was made before.
    """

    module: nn.Module
    inputs: Tensor
    target: int
    batch_size: int = 16
    seed: int = 0
    progress: bool = False
    prepared_before: Prepared | None = None

    @cached_property
    def prepared(self) -> Prepared:
        """The network with a module for each activation; made once, from the weights it has then."""
        return self.prepared_before or prepare(self.module, self.inputs)

    @cached_property
    def _run(self) -> Runner:
        return Runner(self.module, fold=True)

    def forward(self, batch: Tensor) -> Tensor:
        """Outputs of a copy of the batch, since a network that begins in place would write on it.

        In the dtype of the inputs: captum makes float32 of others.
        """
        outputs: Tensor = self._run(batch.to(self.inputs.dtype))
        if outputs.dim() != 2 or len(outputs) != len(batch):
            raise InvalidInputError(
                f"{type(self.module).__name__} gives scores {list(outputs.shape)} for a batch of {len(batch)} images: "
                "it must take any number of images, or be asked with batch_size=1"
            )
        return outputs

    def scores(self, batches: Iterator[Tensor], count: int, title: str) -> Tensor:
        """The target's scores of so many inputs, without gradients, as their batches go through the network."""
        found = []
        with torch.no_grad(), tqdm(total=count, desc=title, disable=not self.progress, leave=False) as bar:
            for batch in batches:
                found.append(self.forward(batch)[:, self.target])
                bar.update(len(batch))
        return torch.cat(found)


@dataclass(frozen=True)
class Method:
    """An attribution method.

    Attributes
    ----------
    title
        As it is written above a map.
    compute
        Its answer to a :class:`Question`: attributions [1, c, h, w], or a map [1, 1, h, w].
    reduction
        How a map of pixels comes from that. "absolute": the sum over channels of the absolute values, as the sign of
        an attribution to one channel means little. "positive": the mean over channels, where it is positive, of methods
        that take away all channels at once and measure what that costs.
    """

    title: str
    compute: Callable[[Question], Tensor]
    reduction: Literal["absolute", "positive"] = "absolute"

    def reduce(self, attributions: Tensor) -> Tensor:
        """The map [h, w], at least 0, of attributions [1, c, h, w]."""
        if self.reduction == "positive":
            return attributions[0].mean(dim=0).clamp(min=0)
        return attributions[0].abs().sum(dim=0)


def _saliency(question: Question) -> Tensor:
    # Signed, as the sum over channels takes the absolute values itself.
    return _tensor(captum().Saliency(question.forward).attribute(question.inputs, question.target, abs=False))


def _input_x_gradient(question: Question) -> Tensor:
    return _tensor(captum().InputXGradient(question.forward).attribute(question.inputs, question.target))


def _integrated_gradients(question: Question) -> Tensor:
    bar = tqdm(total=_IG_STEPS, desc="Integrated gradients", disable=not question.progress, leave=False)

    def forward(batch: Tensor) -> Tensor:
        bar.update(len(batch))
        return question.forward(batch)

    with bar:
        method = captum().IntegratedGradients(forward)
        found = method.attribute(
            question.inputs, target=question.target, n_steps=_IG_STEPS, internal_batch_size=question.batch_size
        )
    return _tensor(found)


def _gradient_shap(question: Question) -> Tensor:
    method = captum().GradientShap(question.forward)
    total = torch.zeros_like(question.inputs)
    bar = tqdm(total=_SHAP_SAMPLES, desc="GradientSHAP", disable=not question.progress, leave=False)
    with seeded(question.seed, question.inputs.device), bar:
        # In batches of our own, as captum would run all samples at once.
        for start in range(0, _SHAP_SAMPLES, question.batch_size):
            count = min(question.batch_size, _SHAP_SAMPLES - start)
            found = method.attribute(
                question.inputs,
                baselines=torch.zeros_like(question.inputs),
                n_samples=count,
                stdevs=_SHAP_NOISE * question.inputs.std().item(),
                target=question.target,
            )
            total += count * _tensor(found)
            bar.update(count)
    return total / _SHAP_SAMPLES


def _deep_lift(question: Question) -> Tensor:
    return deep_lift(question.prepared, question.inputs, torch.zeros_like(question.inputs), question.target)


def _lrp(question: Question) -> Tensor:
    return relevance(question.prepared, question.inputs, question.target)


def _guided_backprop(question: Question) -> Tensor:
    return guided_backprop(question.prepared, question.inputs, question.target)


def _guided_grad_cam(question: Question) -> Tensor:
    question.prepared.report.require("guided_grad_cam")
    # Products of small numbers, which half precision would make zero.
    wide = torch.promote_types(question.inputs.dtype, torch.float32)
    return _guided_backprop(question).to(wide) * _grad_cam(question).to(wide)


def _grad_cam(question: Question) -> Tensor:
    maps, score = _last_maps(question, "grad_cam")
    (gradients,) = torch.autograd.grad(score, maps)
    coarse = (gradients.mean(dim=(2, 3), keepdim=True) * maps.detach()).sum(dim=1, keepdim=True)
    return _enlarged(coarse.clamp(min=0), question)


def _score_cam(question: Question) -> Tensor:
    maps = _last_maps(question, "score_cam")[0].detach()[0]  # [channels, h, w]

    def masked() -> Iterator[Tensor]:
        for chunk in torch.split(maps, question.batch_size):
            large = _enlarged(chunk[:, None], question)
            low, high = large.amin(dim=(2, 3), keepdim=True), large.amax(dim=(2, 3), keepdim=True)
            yield question.inputs * (large - low) / (high - low).clamp_min(torch.finfo(large.dtype).tiny)

    scores = question.scores(masked(), len(maps), "Score-CAM")
    is_flat = maps.flatten(1).amax(dim=1) == maps.flatten(1).amin(dim=1)
    if is_flat.all():
        raise InvalidInputError("method 'score_cam' finds nothing but flat maps in the last layer that gives maps")
    weights = scores.masked_fill(is_flat, -torch.inf).softmax(dim=0)  # a flat map hides nothing, so it says nothing
    return _enlarged((weights[:, None, None] * maps).sum(dim=0).clamp(min=0)[None, None], question)


def _occlusion(question: Question) -> Tensor:
    channels, height, width = question.inputs.shape[1:]
    stride = max(1, max(height, width) // (2 * _OCCLUSION_WINDOWS))
    window = min(2 * stride, height, width)
    windows = math.ceil((height - window) / stride + 1) * math.ceil((width - window) / stride + 1)
    method = captum().Occlusion(question.forward)
    with torch.no_grad():
        return _tensor(
            method.attribute(
                question.inputs,
                sliding_window_shapes=(channels, window, window),
                strides=(channels, stride, stride),
                target=question.target,
                perturbations_per_eval=min(question.batch_size, windows),  # captum would make room for all of them
                show_progress=question.progress,
            )
        )


def _lime(question: Question) -> Tensor:
    linear = require("captum._utils.models.linear_model", "interpret")
    require("sklearn", "interpret")
    segments = _segments(question.inputs)

    method = captum().Lime(question.forward, linear.SkLearnRidge(alpha=1.0), similarity_func=_closeness)
    with torch.no_grad(), seeded(question.seed, question.inputs.device):
        return _tensor(
            method.attribute(
                question.inputs,
                target=question.target,
                feature_mask=segments,
                n_samples=_LIME_SAMPLES,
                perturbations_per_eval=min(question.batch_size, _LIME_SAMPLES),
                show_progress=question.progress,
            )
        )


def _closeness(_: Tensor, __: Tensor, kept: Tensor, **___: Any) -> Tensor:
    """How much a choice of superpixels counts: a kernel of its cosine distance from all (Ribeiro et al. 2016)."""
    distance = 1 - kept.float().mean().sqrt()
    return (-(distance**2) / (2 * _LIME_KERNEL_WIDTH**2)).exp()


def _segments(inputs: Tensor) -> Tensor:
    """Superpixels [1, 1, h, w] (SLIC, about 64), numbered from 0."""
    slic = require("skimage.segmentation", "interpret").slic
    pixels = inputs[0].detach().float().cpu().numpy()
    spread = pixels.max() - pixels.min()
    scaled = (pixels - pixels.min()) / (spread if spread else 1.0)
    found = slic(scaled, n_segments=_LIME_SEGMENTS, compactness=10, start_label=0, channel_axis=0)
    if found.max() < _LIME_SEGMENTS // 4:  # of noise it makes a single one: squares instead
        side = int(_LIME_SEGMENTS**0.5)
        rows, columns = (np.arange(size) * side // size for size in found.shape)
        _, flat = np.unique(rows[:, None] * side + columns, return_inverse=True)
        found = flat.reshape(found.shape)
    return torch.from_numpy(np.ascontiguousarray(found))[None, None].to(inputs.device)


_METHODS: dict[str, Method] = {
    "saliency": Method("Gradient", _saliency),
    "input_x_gradient": Method("Input \N{MULTIPLICATION SIGN} gradient", _input_x_gradient),
    "integrated_gradients": Method("Integrated gradients", _integrated_gradients),
    "gradient_shap": Method("GradientSHAP", _gradient_shap),
    "deep_lift": Method("DeepLIFT", _deep_lift),
    "lrp": Method("LRP", _lrp),
    "guided_backprop": Method("Guided backprop", _guided_backprop),
    "guided_grad_cam": Method("Guided Grad-CAM", _guided_grad_cam),
    "lime": Method("LIME", _lime, "positive"),
    "occlusion": Method("Occlusion", _occlusion, "positive"),
    "grad_cam": Method("Grad-CAM", _grad_cam, "positive"),
    "score_cam": Method("Score-CAM", _score_cam, "positive"),
}
#: The methods by name: the ten of the SPADE paper, Grad-CAM and Score-CAM, and those of :func:`register_method`.
#:
#: ====================  ============================================================================================
#: saliency              the gradient of the class score (Simonyan et al. 2014)
#: input_x_gradient      its product with the model's input (Shrikumar et al. 2016)
#: integrated_gradients  the gradient's mean on the way from zero model inputs to the image, times the input, in 50
#:                       steps (Sundararajan et al. 2017)
#: gradient_shap         the same at 64 random places of the way, of inputs with normal noise of a tenth of their
#:                       spread (Lundberg and Lee 2017)
#: deep_lift             the rescale rule, against zero model inputs (Shrikumar et al. 2017)
#: lrp                   layer-wise relevance propagation: see :func:`spade_fast.relevance.relevance`
#: guided_backprop       the gradient, of which each ReLU passes what is positive (Springenberg et al. 2015)
#: guided_grad_cam       that times the Grad-CAM (Selvaraju et al. 2017)
#: lime                  a ridge regression on 1,000 random choices of about 64 superpixels (Ribeiro et al. 2016)
#: occlusion             the fall of the score when a square, a fourteenth of the image wide, is set to zero model
#:                       input (Zeiler and Fergus 2014)
#: grad_cam              the channels of the last map, weighted by their mean gradients (Selvaraju et al. 2017)
#: score_cam             the same channels, weighted by what the score is where they alone let the image through
#:                       (Wang et al. 2020)
#: ====================  ============================================================================================
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
#: Those that take seconds.
DEFAULT_METHODS = ("saliency", "input_x_gradient", "integrated_gradients")


def register_method(name: str, function: AttributionFunction, *, title: str | None = None) -> None:
    """Add a method of one's own, to be asked for by its name like the others.

    Parameters
    ----------
    name
        A Python identifier that no other method has: maps are stored under it.
    function
        (model, inputs [1, c, h, w], target) to a map [h, w] or attributions [1, c, h, w], of which the absolute values
        are summed over channels. It is called with the dense network and with a copy that has the trace's weights, in
        evaluation mode, and may not change their weights; whatever else it does to them is undone.
    title
        As it is written above a map. Default: the name.

    Raises
    ------
    InvalidInputError
        If the name is taken or no identifier, or `function` cannot be called.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise InvalidInputError(f"a method's name must be a Python identifier, got {name!r}")
    if name in _METHODS:
        raise InvalidInputError(f"there is a method {name!r} already: choose another name")
    if title is not None and not isinstance(title, str):
        raise InvalidInputError(f"a method's title must be a text, got {title!r}")
    if not callable(function):
        raise InvalidInputError(f"a method must be a function (model, inputs, target) to a map, got {function!r}")

    def compute(question: Question) -> Tensor:
        # Copies, and random numbers of its own: the methods after it find everything as it was.
        inputs, wanted = question.inputs.detach().clone().requires_grad_(), tuple(question.inputs.shape)
        with put_back(question.module) as changed, seeded(question.seed, inputs.device):
            found = function(question.module, inputs, question.target)
        if changed:
            raise InvalidInputError(
                f"method {name!r} changes {changed[0]!r} of the model, which was put back: let it work on a copy"
            )
        if isinstance(found, Tensor) and found.shape == wanted[2:]:
            found = found[None, None]
        fits = isinstance(found, Tensor) and found.dim() == 4 and len(found) == 1 and found.shape[2:] == wanted[2:]
        if not fits or found.is_complex() or found.layout != torch.strided or found.is_meta:
            got = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise InvalidInputError(
                f"method {name!r} gives {got}: it must give a map {list(wanted[2:])} or attributions {list(wanted)}"
            )
        return found

    _METHODS[name] = Method(title or name, compute)


def unregister_method(name: str) -> None:
    """Take a method away that :func:`register_method` added.

    Raises
    ------
    InvalidInputError
        If none was added by that name.
    """
    if name not in _METHODS or name in _BUILT_IN:
        raise InvalidInputError(f"no method {name!r} was registered")
    del _METHODS[name]


_BUILT_IN = frozenset(_METHODS)


def captum() -> Any:
    """The package ``captum.attr``, imported when first needed.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    return require("captum.attr", "interpret")


def _last_maps(question: Question, method: str) -> tuple[Tensor, Tensor]:
    """The last maps [1, channels, h, w] that the network makes of its input, and the class score that follows."""
    report = question.prepared.report
    report.require(method)
    assert report.spatial_map is not None  # or the report would have refused
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()  # what follows may work in place

    handle = question.prepared.module.get_submodule(report.spatial_map).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            score = question.prepared.module(question.inputs.clone())[0, question.target]
    finally:
        handle.remove()
    return kept[report.spatial_call], score


def _enlarged(maps: Tensor, question: Question) -> Tensor:
    """Maps [n, 1, h, w] in the size of the inputs."""
    size = question.inputs.shape[2:]
    return F.interpolate(maps, (size[0], size[1]), mode="bilinear", align_corners=False)


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)  # captum has no types: one tensor in, one tensor out
    return value.detach()
