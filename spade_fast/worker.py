"""What makes the stored traces and maps of one image after another."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from spade_fast import metrics, ops, tracer
from spade_fast.arms import check_trace_settings, plain_settings, plain_sparsity
from spade_fast.attribution import Method, answer, asked, captum
from spade_fast.autocast import without_autocast
from spade_fast.cases import Case, class_scores, make_case
from spade_fast.errors import InvalidInputError, check_whole
from spade_fast.explanation import class_name, most_probable
from spade_fast.files import digest
from spade_fast.imagesets import ListedImage
from spade_fast.interruption import checkpoint
from spade_fast.memory import memory_errors
from spade_fast.models import LoadedModel, resolve_model
from spade_fast.operations import INSIDE_METHODS, twin
from spade_fast.preparation import Prepared, prepare
from spade_fast.preprocessing import Preprocess
from spade_fast.store import image_bytes
from spade_fast.tracer import Sparsity
from spade_fast.traces import Trace

#: What maps are measured by.
Measure = Literal["insertion", "deletion"]

_TOP = 5
# Inputs that go through the network at a time: of methods; of metrics on a CPU, and elsewhere.
_ASKED, _MEASURED, _MEASURED_ON_GPU = 16, 16, 128

_MEASURES: dict[Measure, Callable[..., metrics.Curves]] = {
    "insertion": metrics.insertion,
    "deletion": metrics.deletion,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that an image's file depends on beside the image: what every worker is given."""

    model: nn.Module | LoadedModel
    sparsity: Sparsity
    methods: Mapping[str, Method]  # not names alone: those registered here are unknown elsewhere
    metrics: tuple[Measure, ...]
    steps: int
    preprocess: Callable[[Tensor], Tensor] | None
    seed: int
    threads: int
    trace_settings: Mapping[str, Any]

    def check(self) -> None:
        """Refuse what no image's file could be made with."""
        if unknown := [each for each in self.metrics if each not in get_args(Measure)]:
            raise InvalidInputError(f"metric {unknown[0]!r} is unknown: choose from {', '.join(get_args(Measure))}")
        if self.metrics and not self.methods:
            raise InvalidInputError("metrics are of maps: name methods too")
        check_whole("steps", self.steps, 1)
        check_whole("threads", self.threads, 1)
        if self.methods:
            captum()
        if not isinstance(resolve_model(self.model, self.preprocess)[1], Preprocess):
            raise InvalidInputError(
                "photographs come in all sizes: pass a spade_fast.Preprocess as preprocess, which tells the network's"
            )
        check_trace_settings(self.model, self.sparsity, self.of_traces())

    def of_traces(self) -> dict[str, Any]:
        """The settings of :func:`spade_fast.trace`."""
        return {**self.trace_settings, "preprocess": self.preprocess, "seed": self.seed}

    def environment(self, device: torch.device) -> dict[str, Any]:
        """What bits depend on beside the settings: versions, device, instruction set and threads."""
        capability = ops._C.cpu_capability if ops._C is not None else "none"
        on_gpu = device.type == "cuda"
        packages = ("numpy", "pillow", *(("captum", "zennit") if self.methods else ()))
        return {
            "spade_fast": version("spade-fast"),
            "torch": torch.__version__,  # with what it was built for
            **{name: installed for name in packages if (installed := _version(name))},
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} {capability}",
            "threads": self.threads,
        }

    def settings(self) -> dict[str, Any]:
        """The same as JSON values, by which a later run can tell whether it goes on with the same ones."""
        module, preprocess = resolve_model(self.model, self.preprocess)
        assert isinstance(preprocess, Preprocess)
        loaded = self.model if isinstance(self.model, LoadedModel) else None
        # Defaults too, which another version may have others of; but not what stands elsewhere.
        elsewhere = ("preprocess", "seed", "device", "progress")
        defaults = {name: value for name, value in (tracer.trace.__kwdefaults__ or {}).items() if name not in elsewhere}
        return {
            "model": loaded.name if loaded else type(module).__name__,
            "weights": loaded.source if loaded else None,
            "weights_sha256": digest(module.state_dict()),
            "modules_sha256": _modules_digest(module),
            "preprocess": preprocess.to_dict(),
            "sparsity": plain_sparsity(self.model, self.sparsity),
            "methods": sorted(self.methods),
            "metrics": {each: {"steps": self.steps} for each in self.metrics},
            "seed": self.seed,
            "trace": plain_settings({**defaults, **self.trace_settings}),
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # one that only some methods need
        return None


def _modules_digest(module: nn.Module) -> str:
    """Of the kinds of all modules, what they say of themselves, and how many hooks they have."""
    told = []
    for name, each in module.named_modules():
        hooks = len(each._forward_pre_hooks) + len(each._forward_hooks)
        told.append(f"{name} {type(each).__qualname__} {each.extra_repr()} {hooks}")
    lasting = re.sub(" at 0x[0-9a-f]+", "", "\n".join(told))
    return hashlib.sha256(lasting.encode()).hexdigest()


class Worker:
    """Makes images' files, one at a time; several workers of one recipe make the same bits.

    Parameters
    ----------
    recipe
        What to do.
    own_modules
        Work on modules of its own, around the same weights: so that others may work beside it in this process.
    device
        Where to. Default: where the model is.

    Raises
    ------
    InvalidInputError
        If a method is not valid on the network, or the network cannot be asked or copied.
    """

    def __init__(self, recipe: Recipe, *, own_modules: bool = False, device: torch.device | str | None = None) -> None:
        module, preprocess = resolve_model(recipe.model, recipe.preprocess)
        assert isinstance(preprocess, Preprocess)
        module = tracer.on_device(module, device)
        module = twin(module) if own_modules else module
        self._recipe, self._module, self._preprocess = recipe, module, preprocess
        self._model = replace(recipe.model, module=module) if isinstance(recipe.model, LoadedModel) else module
        self.device = next(module.parameters()).device
        # So that what several workers ask of one GPU overlaps.
        self._stream: torch.cuda.Stream | None = None
        if own_modules and self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._batch_size = recipe.trace_settings.get("batch_size") or tracer.default_batch_size(self.device)
        self._measured = _MEASURED if self.device.type == "cpu" else _MEASURED_ON_GPU
        self._prepared: Prepared | None = None
        side = preprocess.input_size
        inputs = preprocess(torch.full((1, 3, side, side), 0.5, device=self.device))
        if inside := [each for each in recipe.methods if each in INSIDE_METHODS]:
            self._prepared = prepare(self._model, inputs)
            for method in inside:
                self._prepared.report.require(method)
        if recipe.methods:
            with asked(module, inputs, 0):  # which checks the network once for all
                pass

    @without_autocast
    def make(self, listed: ListedImage, image: Image.Image, known: Mapping[str, Any], *, halvings: int = 0) -> bytes:
        """The content of an image's file.

        Parameters
        ----------
        listed, image
            What the image is called, and the image.
        known
            What is to stand in its record as well.
        halvings
            How often to halve the batches in which views and inputs go through the network: changes results by
            rounding.

        Raises
        ------
        InvalidInputError
            If the image cannot be used.
        torch.OutOfMemoryError
            If memory runs out, of the device or of this process.
        """
        recipe = self._recipe
        settings = recipe.of_traces()
        if halvings:
            settings["batch_size"] = max(1, self._batch_size >> halvings)
        with (
            _threads(recipe.threads),
            torch.inference_mode(False),
            memory_errors(self.device),
            torch.cuda.stream(self._stream),
        ):
            case = make_case(self._model, image, name=listed.name, target=listed.target, preprocess=self._preprocess)
            trace = tracer.trace(self._model, image, recipe.sparsity, **settings)
            with trace.applied(self._module):
                spade_scores = class_scores(self._module, case.inputs)
            dense = self._maps(case, Trace({}), halvings)
            spade = self._maps(case, trace, halvings)
            record = {
                **known,
                "target": case.target,
                "target_name": class_name(self._model, case.target),
                "sparsity": trace.sparsity,
                "probability": {
                    network: scores.softmax(dim=0)[case.target].item()
                    for network, scores in (("dense", case.scores), ("spade", spade_scores))
                },
                "answers": {
                    network: [asdict(each) for each in most_probable(self._model, scores, _TOP)]
                    for network, scores in (("dense", case.scores), ("spade", spade_scores))
                },
                "metrics": self._metrics(case, dense, spade, halvings),
                **({"halvings": halvings} if halvings else {}),
                "environment": recipe.environment(self.device),
            }
            return image_bytes(record, trace, dense, spade)

    @property
    def largest_batch(self) -> int:
        """Views or inputs that go through the network at a time, at most: halved until 1 is left."""
        methods, measures = self._recipe.methods, self._recipe.metrics
        return max(self._batch_size, _ASKED if methods else 1, self._measured if measures else 1)

    def _maps(self, case: Case, trace: Trace, halvings: int) -> dict[str, Tensor]:
        if not self._recipe.methods:
            return {}
        prepared = self._prepared
        with (
            trace.applied(self._module),
            contextlib.nullcontext() if prepared is None else trace.applied(prepared.module),
            asked(
                self._module,
                case.inputs,
                case.target,
                batch_size=max(1, _ASKED >> halvings),
                seed=self._recipe.seed,
                again=True,
                prepared=prepared,
            ) as question,
        ):
            maps = {}
            for name, method in self._recipe.methods.items():
                checkpoint()
                maps[name] = answer(question, name, method)
            return maps

    def _metrics(
        self, case: Case, dense: Mapping[str, Tensor], spade: Mapping[str, Tensor], halvings: int
    ) -> dict[str, Any]:
        """By metric, network and method: of the maps of either network, as the dense one sees them."""
        found: dict[str, Any] = {}
        if not self._recipe.metrics:
            return found
        stack = torch.stack([*dense.values(), *spade.values()])
        for name in self._recipe.metrics:
            curves = _MEASURES[name](
                self._module,
                case.inputs,
                stack,
                case.target,
                steps=self._recipe.steps,
                batch_size=max(1, self._measured >> halvings),
                seed=self._recipe.seed,
            )
            values = curves.auc.tolist()
            found[name] = {
                "dense": dict(zip(dense, values[: len(dense)], strict=True)),
                "spade": dict(zip(spade, values[len(dense) :], strict=True)),
            }
        return found


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for each operation of this thread."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
