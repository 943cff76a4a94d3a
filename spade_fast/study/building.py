"""Making a study: for each image two patches, and what the answer's neuron wants to see by either network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast import attribution, presets, tracer
from spade_fast.cases import Case, class_scores, make_case
from spade_fast.errors import InvalidInputError, by_reason, check_whole, first_line
from spade_fast.explanation import class_name
from spade_fast.files import append_line, held_file, held_folder, read_lines, write_folder
from spade_fast.images import decoded_image, read_image_file
from spade_fast.imagesets import ListedImage, listed_images
from spade_fast.models import LoadedModel
from spade_fast.running import Images
from spade_fast.sparse_classifier import classifier_name
from spade_fast.study.bundle import STUDY, Bundle, Patch, Task, described, medium_of, picture_file, read_picture
from spade_fast.study.journal import ANSWERS
from spade_fast.tracer import Sparsity
from spade_fast.visualization import visualize
from spade_fast.worker import Recipe

#: What is done already, a line for each image, so that a build that was cut short goes on.
_DONE = "tasks.jsonl"
_METHOD = "score_cam"
# Of the places that do not meet the high patch: from those that Score-CAM ranks lowest, chance takes one.
_LOW_SHARE = 0.1
_MOST_PATCH = 1 / 3  # so that beside any square there is room for another


def build(
    model: nn.Module | LoadedModel,
    images: Images,
    folder: str | os.PathLike[str],
    sparsity: Sparsity = presets.default,
    *,
    limit: int | None = None,
    checks: int = 4,
    patch: float = 0.3,
    steps: int = 512,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
    **trace_settings: Any,
) -> Bundle:
    """Make the tasks of a study (SPADE section 4.2, Table 3), into a folder that needs nothing else.

    A build that was cut short goes on when it is called again with the same settings.

    Parameters
    ----------
    model
        The network, or what :func:`spade_fast.load_model` returned. Its class scores must be the output of a linear
        layer, whose neurons are visualized.
    images
        A folder, a manifest (.csv, .parquet), paths of files, or paths by name, as in :func:`spade_fast.run`. What is
        asked about is the network's own answer to each, so that a manifest must name no targets.
    folder
        Where to: a new folder, or one of a build to go on with.
    sparsity, trace_settings
        As in :func:`spade_fast.trace`.
    limit
        Number of tasks; chance chooses the images. Default: all.
    checks
        Number of questions to see whether a participant looks at all: one of the patches itself stands where the
        visualization would. At most as many as there are tasks.
    patch
        Side of a patch, as a share of the image's shorter side, above 0 and at most a third. The high patch is the
        square with the largest mean of the Score-CAM map; the low one is drawn from the tenth with the smallest means
        of those squares that do not meet it.
    steps
        Of gradient ascent for a visualization.
    seed
        Of all that is random: views, visualizations, patches, and what each participant is shown.
    root
        The folder that a manifest's images are in. Default: the manifest's own.
    preprocess
        A :class:`spade_fast.Preprocess`. Default: the model's own, where it is known.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    Bundle
        What was written, with the images that could not be used and why.

    Raises
    ------
    InvalidInputError
        For arguments that cannot be used, a folder that holds something else or a study that was answered, and where
        no image can be used.
    MissingDependencyError
        If captum or torch-lucent is not installed.
    """
    listed = listed_images(images, root=root)
    if asked := next((image.name for image in listed if image.target is not None), None):
        raise InvalidInputError(
            f"the manifest names a target of {asked!r}, but a study asks about the network's own answers: leave the "
            "column 'target' out"
        )
    check_numbers(limit=limit, checks=checks, patch=patch, steps=steps, seed=seed)
    limit = len(listed) if limit is None else limit
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise InvalidInputError(f"folder is {folder!r}: pass the name of a new folder")
    recipe = Recipe(
        model=model,
        sparsity=sparsity,
        methods={_METHOD: attribution.find_method(_METHOD)},
        metrics=(),
        steps=1,
        preprocess=preprocess,
        seed=seed,
        threads=torch.get_num_threads(),
        trace_settings=trace_settings,
    )
    recipe.check()
    settings = {
        **{name: value for name, value in recipe.settings().items() if name not in ("metrics", "methods")},
        "patch": patch,
        "visualization_steps": steps,
    }
    random.Random(f"images {seed}").shuffle(listed)
    _check_folder(Path(folder))
    with held_folder(folder):
        maker = _Maker(recipe, settings, Path(folder), patch, steps)
        tasks: list[Task] = []
        with tqdm(total=min(limit, len(listed)), desc="tasks", disable=not progress) as bar:
            for image in listed:
                if len(tasks) == limit:
                    break
                task = maker.task_of(image)
                if task is not None:
                    tasks.append(task)
                    bar.update()
        if not tasks:
            raise InvalidInputError(f"no image can be used ({by_reason(maker.refused)[0]})")
        return _written(Path(folder), tasks, checks, maker, seed)


def check_numbers(*, limit: int | None, checks: int, patch: float, steps: int, seed: int) -> None:
    """Refuse what :func:`build` would, before a network is loaded."""
    check_whole("limit", 1 if limit is None else limit, 1)
    check_whole("checks", checks, 0)
    check_whole("steps", steps, 1)
    check_whole("seed", seed, 0)
    if isinstance(patch, bool) or not isinstance(patch, (int, float)) or not 0 < patch <= _MOST_PATCH:
        raise InvalidInputError(f"patch must be a share above 0 and at most a third, got {patch!r}")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir() or (folder / _DONE).exists():
        return
    if other := next((each.name for each in folder.iterdir() if not each.name.startswith(".")), None):
        raise InvalidInputError(f"{os.fspath(folder)!r} is no study, but holds {other!r}: choose a new folder")


def _written(folder: Path, tasks: list[Task], checks: int, maker: _Maker, seed: int) -> Bundle:
    bundle = Bundle(
        format=1,
        tasks=tuple(tasks),
        checks=min(checks, len(tasks)),
        seed=seed,
        settings=dict(maker.settings),
        versions=maker.versions,
        refused=maker.refused,
    )
    file = folder / STUDY
    if file.exists() and file.read_bytes() == bundle.content():
        return bundle
    with held_file(folder / ANSWERS):  # nobody is asked the old questions meanwhile
        if read_lines(folder / ANSWERS):
            raise InvalidInputError(
                f"{os.fspath(folder)!r} holds a study that was answered already, of other tasks: choose a new folder"
            )
        write_folder(folder, {STUDY: bundle.content()})
    return bundle


@dataclass
class _Maker:
    """Makes tasks, or finds them in the folder, where they were made with the same settings."""

    recipe: Recipe
    settings: Mapping[str, Any]
    folder: Path
    patch: float
    steps: int
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings = json.loads(json.dumps(self.settings))
        device = next(self._module.parameters()).device
        self.versions = {name: str(value) for name, value in self.recipe.environment(device).items()}
        self._layer: str | None = None
        self._done = {}
        lines = read_lines(self.folder / _DONE)
        for number, line in enumerate(lines, 1):
            try:
                known = json.loads(line)
                if number == 1:
                    self._check_settings(known["settings"])
                    continue
                task = Task.model_validate_json(json.dumps(known["task"]))
                self._done[known["image_sha256"], task.name] = task
            except InvalidInputError:
                raise
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise InvalidInputError(
                    f"line {number} of {os.fspath(self.folder / _DONE)!r} is no task of a study ({first_line(error)}): "
                    "choose a new folder"
                ) from error
        self._is_begun = bool(lines)
        self._dense = {task.target: task.dense for task in self._done.values() if self._are_whole(task.dense)}

    def _check_settings(self, known: Mapping[str, Any]) -> None:
        names = [name for name in {**known, **self.settings} if known.get(name) != self.settings.get(name)]
        if names:
            raise InvalidInputError(
                f"the tasks in {os.fspath(self.folder)!r} were made with other settings ({', '.join(names)}): choose a "
                "new folder, or the same settings"
            )

    @property
    def _module(self) -> nn.Module:
        model = self.recipe.model
        return model.module if isinstance(model, LoadedModel) else model

    def task_of(self, image: ListedImage) -> Task | None:
        """The task about an image; None where it cannot be used, for the reason in `refused`."""
        try:
            content = read_image_file(image.path)
            digest = hashlib.sha256(content).hexdigest()
            known = self._done.get((digest, image.name))
            if known is not None and self._are_whole(*known.media()):
                return known
            photo = decoded_image(content, image.path)
            case = make_case(self.recipe.model, photo, name=image.name, preprocess=self.recipe.preprocess)
        except InvalidInputError as error:
            self.refused[image.name] = str(error)
            return None
        if self._layer is None:  # a network that cannot be asked is no image's fault
            self._layer = self._checked(case)
        try:
            task = self._made(case, photo)
        except InvalidInputError as error:
            self.refused[image.name] = str(error)
            return None
        if not self._is_begun:
            append_line(self.folder / _DONE, json.dumps({"settings": self.settings}))
            self._is_begun = True
        line = {"image_sha256": digest, "task": json.loads(described(task))}
        append_line(self.folder / _DONE, json.dumps(line))
        return task

    def _are_whole(self, *media: str) -> bool:
        """Whether pictures are there as they were written."""
        try:
            for medium in media:
                read_picture(self.folder, medium)
        except InvalidInputError:
            return False
        return True

    def _checked(self, case: Case) -> str:
        """The name of the layer that gives the class scores, if the network can be asked all that is needed."""
        with attribution.asked(self._module, case.inputs, case.target) as question:
            question.prepared.report.require(_METHOD)
        return classifier_name(self._module, case.inputs)

    def _made(self, case: Case, photo: Image.Image) -> Task:
        recipe = self.recipe
        relevance = attribution.attribute(recipe.model, case.inputs, case.target, _METHOD)
        high, low = self._patches(relevance, case)
        trace = tracer.trace(recipe.model, photo, recipe.sparsity, **recipe.of_traces())
        if case.target not in self._dense:
            self._dense[case.target] = self._visualized(case.target)
        with trace.applied(self._module):
            spade = self._visualized(case.target)
            trace_scores = class_scores(self._module, case.inputs)
        return Task(
            name=case.name,
            photo=self._saved(case.pixels),
            target=case.target,
            target_name=class_name(recipe.model, case.target),
            probability=case.scores.softmax(dim=0)[case.target].item(),
            high=high,
            low=low,
            dense=self._dense[case.target],
            spade=spade,
            sparsity=trace.sparsity,
            trace_agrees=int(trace_scores.argmax()) == case.target,
        )

    def _patches(self, relevance: Tensor, case: Case) -> tuple[Patch, Patch]:
        drawn = random.Random(f"patch {self.recipe.seed} {case.photograph}")
        side = max(1, round(self.patch * min(relevance.shape)))
        height, width = relevance.shape
        found = []
        for top, left in chosen_squares(relevance, side, drawn):
            square = slice(top, top + side), slice(left, left + side)
            found.append(
                Patch(
                    medium=self._saved(case.pixels[:, square[0], square[1]]),
                    left=left / width,
                    top=top / height,
                    width=side / width,
                    height=side / height,
                    relevance=min(1.0, (relevance[square].double().mean() / relevance.max().double()).item()),
                )
            )
        return found[0], found[1]

    def _visualized(self, target: int) -> str:
        """The picture of what the class's neuron wants to see, in the network as it is now."""
        assert self._layer is not None
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".* answers to nothing in ")
            try:
                found = visualize(
                    self.recipe.model,
                    self._layer,
                    target,
                    preprocess=self.recipe.preprocess,
                    thresholds=(self.steps,),
                    seed=self.recipe.seed,
                )
            except UserWarning as error:
                raise InvalidInputError(f"there is nothing to show: {error}") from error
        return self._saved(found.dense[0])

    def _saved(self, pixels: Tensor) -> str:
        """Write pixels [3, h, w] in 0..1 as a picture, and give its name."""
        eight_bit = (255 * pixels.detach().cpu().float()).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        png = io.BytesIO()
        Image.fromarray(eight_bit).save(png, format="png")
        medium = medium_of(png.getvalue())
        file = picture_file(self.folder, medium)
        write_folder(file.parent, {file.name: png.getvalue()})
        return medium


def chosen_squares(relevance: Tensor, side: int, chance: random.Random) -> tuple[tuple[int, int], tuple[int, int]]:
    """Top and left of the square of the largest mean relevance, and of one of the lowest that does not meet it.

    Parameters
    ----------
    relevance
        [h, w], at least 0.
    side
        Of the squares, in pixels; at most a third of h and w.
    chance
        Draws from the tenth of the squares beside the high one whose means are smallest.

    Raises
    ------
    InvalidInputError
        If all squares are alike.
    """
    means = F.avg_pool2d(relevance.double()[None, None], side, stride=1)[0, 0]
    columns = means.shape[1]
    top, left = divmod(int(means.argmax()), columns)
    rows_apart = (torch.arange(means.shape[0]) - top).abs() >= side
    columns_apart = (torch.arange(columns) - left).abs() >= side
    apart = (rows_apart[:, None] | columns_apart[None, :]).flatten().nonzero()[:, 0]
    of_apart = means.flatten()[apart]
    # All that are as low as the last of the tenth, so that of equal ones none comes first.
    least = of_apart.sort().values[max(1, int(_LOW_SHARE * len(apart))) - 1]
    low = int(chance.choice(apart[of_apart <= least].tolist()))
    if means.flatten()[low] >= means[top, left]:
        raise InvalidInputError("Score-CAM ranks all of it alike, so that there is nothing to choose between")
    return (top, left), divmod(low, columns)
