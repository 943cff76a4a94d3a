"""A participant that is none: takes the patch whose features are nearer to the visualization's, in another network.

It tells whether the loop from images to a table works, and gives a first number. It is no person: what it finds alike
is not what people find alike.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from spade_fast.autocast import without_autocast
from spade_fast.errors import InvalidInputError, check_whole
from spade_fast.files import held_file
from spade_fast.images import image_tensor
from spade_fast.models import LoadedModel
from spade_fast.sparse_classifier import penultimate_features
from spade_fast.study.bundle import OpenBundle, open_bundle
from spade_fast.study.journal import ANSWERS, Choice, Journal, Participant

_SIDE = 96  # of pictures as the untrained filters see them, in pixels
_FILTERS, _SIZES = 64, (3, 7, 15)
UNTRAINED = "untrained filters"


@without_autocast
def simulate(
    bundle: str | os.PathLike[str],
    answers: str | os.PathLike[str] | None = None,
    *,
    model: LoadedModel | None = None,
    participants: int = 2,
    margin: float = 0.02,
) -> Journal:
    """Have simulated participants answer a study: they are called so in the answers, and counted apart from people.

    A participant takes the patch whose features have the larger cosine with those of the visualization. Before, the
    features of all patches of the study are centred on their mean, and those of all visualizations on theirs, so that
    what all pictures of a kind have in common does not decide. Participants that are shown the same answer the same:
    two of them see each image by both networks, and more tell nothing new.

    Parameters
    ----------
    bundle
        The folder that :func:`spade_fast.study.build` wrote.
    answers
        The file that answers are added to. Default: ``answers.jsonl`` in the bundle.
    model
        A network that is not the one that the study is about, whose penultimate features are compared. Default: means
        and spreads of the responses of 192 random filters of 3 to 15 pixels, which are alike for textures that are
        (Ustyuzhaninov et al. 2017, "What does it take to generate natural textures?"): they know nothing of classes.
    participants
        How many.
    margin
        The participant is undecided where the two cosines differ by less.

    Returns
    -------
    Journal
        With the answers, each on the disk.

    Raises
    ------
    InvalidInputError
        If bundle or answers cannot be used, `model` is the network that the study is about, or another process writes
        to the answers.
    """
    check_whole("participants", participants, 1)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin <= 2:
        raise InvalidInputError(f"margin must be a difference of cosines within 0..2, got {margin!r}")
    study = open_bundle(bundle)
    name = UNTRAINED if model is None else f"{model.name} ({model.source})"
    if model is not None and (model.name, model.source) == (
        study.bundle.settings.get("model"),
        study.bundle.settings.get("weights"),
    ):
        raise InvalidInputError(f"the study is about {name} itself: pass another network, which knows nothing of it")
    alike = _similarities(study, _untrained_features if model is None else functools.partial(_features, model))
    file = study.path / ANSWERS if answers is None else Path(answers)
    with held_file(file):
        journal = Journal(file, study)
        for _ in range(participants):
            _answer_all(journal, journal.join(simulated=name), alike, study, margin)
    return journal


def _answer_all(
    journal: Journal,
    participant: Participant,
    alike: Callable[[str, str], float],
    study: OpenBundle,
    margin: float,
) -> None:
    bundle = study.bundle
    for number, question in enumerate(participant.joined.questions):
        if question.kind == "task":
            task = bundle.tasks[question.index]
            shown = task.dense if question.arm == "dense" else task.spade
        else:
            check = bundle.checks[question.index]
            task = bundle.tasks[check.task]
            shown = task.high.medium if check.right == "high" else task.low.medium
        leaning = alike(shown, task.high.medium) - alike(shown, task.low.medium)
        choice: Choice = "undecided"
        if abs(leaning) >= margin:
            choice = "left" if (leaning > 0) == (question.left == "high") else "right"
        journal.answer(participant, number, choice, None)


def _similarities(study: OpenBundle, features: Callable[[list[Tensor]], Tensor]) -> Callable[[str, str], float]:
    """A function that gives the cosine of what is shown and of a patch, after both kinds were centred."""
    tasks = study.bundle.tasks
    patches = list(dict.fromkeys(patch.medium for task in tasks for patch in (task.high, task.low)))
    pictures = list(dict.fromkeys(medium for task in tasks for medium in (task.dense, task.spade)))
    directions: dict[str, Tensor] = {}
    for kind in (pictures, patches):
        found = features([_read(study, medium) for medium in kind]).double()
        directions |= dict(zip(kind, F.normalize(found - found.mean(dim=0), dim=1), strict=True))
    return lambda shown, patch: float(directions[shown] @ directions[patch])


def _read(study: OpenBundle, medium: str) -> Tensor:
    with Image.open(io.BytesIO(study.picture(medium))) as picture:
        return image_tensor(picture.convert("RGB"))


def _features(model: LoadedModel, images: list[Tensor]) -> Tensor:
    """The inputs of the network's classifier [n, d], each picture in the network's size."""
    side = model.preprocess.input_size
    sized = [
        F.interpolate(image[None], (side, side), mode="bicubic", antialias=True).clamp(0, 1)[0] for image in images
    ]
    return penultimate_features(model, sized, views=1).values


def _untrained_features(images: list[Tensor]) -> Tensor:
    """Mean and standard deviation of what random filters of several sizes make of each picture, [n, 6 * filters]."""
    generator = torch.Generator().manual_seed(0)
    banks = [nn.Conv2d(3, _FILTERS, size, stride=2, bias=False) for size in _SIZES]
    found = []
    with torch.no_grad():
        for bank in banks:
            filters = torch.randn(bank.weight.shape, generator=generator)
            bank.weight.copy_(filters / filters.flatten(1).norm(dim=1)[:, None, None, None])
        for image in images:
            sized = F.interpolate(image[None], (_SIDE, _SIDE), mode="bilinear", antialias=True) - 0.5
            responses = [bank(sized)[0].relu().flatten(1) for bank in banks]
            found.append(torch.cat([part for each in responses for part in (each.mean(dim=1), each.std(dim=1))]))
    return torch.stack(found)
