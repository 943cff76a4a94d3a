"""Explaining one answer: maps of the dense network and of its trace, side by side."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast import attribution, tracer
from spade_fast.attribution import answer, asked, find_method
from spade_fast.autocast import without_autocast
from spade_fast.cases import class_scores, make_case
from spade_fast.errors import InvalidInputError
from spade_fast.files import write_folder
from spade_fast.methods import DEFAULT_METHODS, METHODS
from spade_fast.models import LoadedModel, resolve_model
from spade_fast.operations import INSIDE_METHODS
from spade_fast.preprocessing import Preprocess
from spade_fast.readonly import ReadOnlyMappings
from spade_fast.traces import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PNG_DPI = 160


@dataclass(frozen=True)
class Prediction:
    """A class that the network considers.

    Attributes
    ----------
    index
        Position in the outputs.
    name
        Name of the class, ``"class 281"`` where it has none.
    probability
        Softmax of the outputs, 0..1.
    """

    index: int
    name: str
    probability: float


@dataclass(frozen=True, eq=False)
class Explanation(ReadOnlyMappings):
    """Why a network gave its answer: attribution maps of the dense network and of its trace.

    Attributes
    ----------
    image
        The pixels that were explained, float32 [3, h, w] in 0..1.
    target, target_name
        The class that all maps are about, and its name.
    dense, spade
        Maps by method, float32 [h, w], at least 0: see :func:`spade_fast.attribution.attribute`.
    dense_predictions, spade_predictions
        The most probable classes of either network, the first one first.
    dense_probability, spade_probability
        Of the target, by either network, 0..1.
    trace
        What SPADE left of the network.
    settings
        How the explanation was made: plain JSON values.
    layer_order
        Names of all layers of the trace, pruned or dense, in the order of the model.
    """

    image: Tensor
    target: int
    target_name: str
    dense: Mapping[str, Tensor]
    spade: Mapping[str, Tensor]
    dense_predictions: tuple[Prediction, ...]
    spade_predictions: tuple[Prediction, ...]
    dense_probability: float
    spade_probability: float
    trace: Trace
    settings: Mapping[str, Any] = field(default_factory=dict)
    layer_order: tuple[str, ...] = ()

    def figure(self) -> Figure:
        """The picture: photograph, predictions, maps, sparsity; see :func:`spade_fast.figures.explanation_figure`."""
        from spade_fast.figures import explanation_figure

        return explanation_figure(self)

    def report(self) -> dict[str, Any]:
        """Everything but the maps, as plain JSON values."""
        return {
            "target": {
                "index": self.target,
                "name": self.target_name,
                "probability": {"dense": self.dense_probability, "spade": self.spade_probability},
            },
            "predictions": {
                "dense": [asdict(prediction) for prediction in self.dense_predictions],
                "spade": [asdict(prediction) for prediction in self.spade_predictions],
            },
            "layers": self.trace.rows(),
            "dense_layers": dict(self.trace.dense),
            "trace_settings": dict(self.trace.settings),
            "settings": dict(self.settings),
            "versions": {
                "spade_fast": version("spade-fast"),
                "torch": torch.__version__,
                "captum": version("captum"),
                "python": platform.python_version(),
            },
        }

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write figure, maps and report into a folder, each file whole or not at all.

        Parameters
        ----------
        folder
            Made where it is missing. Files of the same names are replaced.

        Returns
        -------
        dict[str, Path]
            What was written, by its path within the folder: ``explanation.png``; ``maps.safetensors`` with the
            float32 maps under the keys ``dense.saliency``, ``spade.saliency``, ...; the same maps one by one,
            ``maps/dense_saliency.npy``, ...; and, last, ``report.json``.

        Raises
        ------
        InvalidInputError
            If the folder cannot be made or a file cannot be written.
        """
        maps = {
            (arm, method): heat.contiguous()
            for arm, found in (("dense", self.dense), ("spade", self.spade))
            for method, heat in found.items()
        }
        png = io.BytesIO()
        self.figure().savefig(png, format="png", dpi=_PNG_DPI)
        arrays = {key: io.BytesIO() for key in maps}
        for key, stream in arrays.items():
            np.save(stream, maps[key].numpy())
        report = json.dumps(self.report(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        contents = {
            "explanation.png": png.getvalue(),
            "maps.safetensors": safetensors.torch.save({".".join(key): heat for key, heat in maps.items()}),
            **{f"maps/{'_'.join(key)}.npy": stream.getvalue() for key, stream in arrays.items()},
            "report.json": report.encode(),
        }
        return write_folder(folder, contents)


@without_autocast
def explain(
    model: nn.Module | LoadedModel,
    image: Image.Image | Tensor,
    *,
    methods: Sequence[str] | Literal["all"] = DEFAULT_METHODS,
    target: int | None = None,
    trace: Trace | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    top: int = 5,
    seed: int = 0,
    progress: bool = False,
    **trace_settings: Any,
) -> Explanation:
    """Explain a network's answer to one image, by the dense network and by its trace (SPADE sections 3 and 4).

    The model is left as it was, bit for bit.

    Parameters
    ----------
    model
        The network, or what :func:`spade_fast.load_model` returned.
    image
        A photograph, or pixel values [3, H, W] in 0..1 as float tensor. What is explained is what the network sees
        of it: the centre of a photograph, as its preprocessing cuts it, or the whole tensor.
    methods
        Names in :data:`spade_fast.METHODS`, or "all" of them (a minute or two for EfficientNet-Lite0 on two cores).
    target
        The class to explain, for both networks. Default: the answer of the dense one.
    trace
        A trace of this model. Default: one is made for `image`.
    preprocess
        As in :func:`spade_fast.trace`.
    top
        Number of most probable classes to keep.
    seed
        Of methods that draw at random, and of the trace that is made where none is given.
    progress
        Show progress bars on stderr.
    trace_settings
        For :func:`spade_fast.trace`, where no `trace` is given: ``sparsity``, ``num_augmentations``, ...

    Returns
    -------
    Explanation

    Raises
    ------
    InvalidInputError
        For arguments that cannot be used; what can be checked is checked before the trace is made.
    MissingDependencyError
        If captum is not installed.
    """
    methods = attribution.check_methods(tuple(METHODS) if methods == "all" else methods)
    if trace is not None and trace_settings:
        given = ", ".join(trace_settings)
        raise InvalidInputError(f"both trace= and settings for making one ({given}) are given: leave one of them out")
    if trace is not None and not isinstance(trace, Trace):
        raise InvalidInputError(f"trace is a {type(trace).__name__}: pass what spade_fast.trace returns")
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise InvalidInputError(f"top must be a positive whole number, got {top!r}")
    attribution.captum()  # first, since making a trace takes a while
    module, preprocess = resolve_model(model, preprocess)

    # Parameters made in inference mode, as those of an applied trace would be, could not take part in a gradient.
    with torch.inference_mode(False):
        case = make_case(model, image, target=target, preprocess=preprocess)
        inputs, explained, dense_scores = case.inputs, case.target, case.scores
        _check_validity(module, inputs, explained, methods)
        if trace is None:
            trace = tracer.trace(model, image, preprocess=preprocess, seed=seed, progress=progress, **trace_settings)
        with tqdm(total=2 * len(methods), desc="attribution", disable=not progress, leave=False) as bar:
            dense = _maps(module, inputs, explained, methods, seed, bar)
            with _sparse(module, trace) as sparse:
                spade_scores = class_scores(sparse, inputs)
                spade = _maps(sparse, inputs, explained, methods, seed, bar)
    for method, found in spade.items():
        if not found.any() and dense[method].any():
            warnings.warn(
                f"the trace's map by {method!r} is zero everywhere: nothing of the image reaches the class any more; "
                "prune less",
                stacklevel=3,  # behind the wrapper of `without_autocast`
            )

    known = {*trace.layers, *trace.dense}
    order = [layer for layer, _ in module.named_modules() if layer in known]
    return Explanation(
        image=case.pixels.detach().cpu().clone(),
        target=explained,
        target_name=class_name(model, explained),
        dense=dense,
        spade=spade,
        dense_predictions=most_probable(model, dense_scores, top),
        spade_predictions=most_probable(model, spade_scores, top),
        dense_probability=dense_scores.softmax(dim=0)[explained].item(),
        spade_probability=spade_scores.softmax(dim=0)[explained].item(),
        trace=trace,
        settings={
            "model": model.name if isinstance(model, LoadedModel) else type(module).__name__,
            "weights": model.source if isinstance(model, LoadedModel) else None,
            "methods": list(methods),
            "seed": seed,
            "target_is": "the answer of the dense network" if target is None else "as asked for",
            "image_size": list(case.pixels.shape[1:]),
            "preprocess": preprocess.to_dict() if isinstance(preprocess, Preprocess) else None,
        },
        layer_order=tuple(dict.fromkeys((*order, *trace.layers, *trace.dense))),
    )


def class_name(model: nn.Module | LoadedModel, index: int) -> str:
    """The name of a class, ``"class 281"`` where it has none."""
    return model.category(index) if isinstance(model, LoadedModel) else f"class {index}"


def most_probable(model: nn.Module | LoadedModel, scores: Tensor, top: int) -> tuple[Prediction, ...]:
    """The classes of the highest scores [classes], at most `top`, the first one first."""
    best = scores.softmax(dim=0).topk(min(top, len(scores)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(Prediction(index, class_name(model, index), probability) for index, probability in pairs)


@contextlib.contextmanager
def _sparse(module: nn.Module, trace: Trace) -> Iterator[nn.Module]:
    """The network with a trace's weights: a copy, so that other threads have theirs, unless it cannot be copied."""
    try:
        sparse = trace.pruned_copy(module)
    except (TypeError, RuntimeError, pickle.PickleError):
        with trace.applied(module):
            yield module
        return
    yield sparse


def _check_validity(module: nn.Module, inputs: Tensor, target: int, methods: Sequence[str]) -> None:
    """Refuse methods that are not valid on the network, before anything takes long."""
    inside = [name for name in methods if name in INSIDE_METHODS]
    if inside:
        with asked(module, inputs, target) as question:
            for name in inside:
                question.prepared.report.require(name)


def _maps(
    module: nn.Module, inputs: Tensor, target: int, methods: Sequence[str], seed: int, bar: Any
) -> dict[str, Tensor]:
    maps = {}
    with asked(module, inputs, target, seed=seed, progress=not bar.disable) as question:
        for name in methods:
            maps[name] = answer(question, name, find_method(name))
            bar.update()
    return maps
