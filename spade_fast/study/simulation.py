"""A participant that is none: takes the patch whose features are nearer to the visualization's, in another network.

It tells whether the loop from images to a table works, and gives a first number. It is no person: what it finds alike
is not what people find alike.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.autocast import without_autocast
from spade_fast.errors import InvalidInputError, check_whole
from spade_fast.files import digest, held_file
from spade_fast.images import decoded_image, image_tensor
from spade_fast.models import LoadedModel
from spade_fast.sparse_classifier import penultimate_features
from spade_fast.study.bundle import OpenBundle, open_bundle
from spade_fast.study.journal import Choice, Journal, answers_file
from spade_fast.study.schedule import Question

_LEAST_TASKS = 3
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
    features of patches are centred on the mean of all patches of the other tasks, and those of visualizations on the
    mean of theirs, so that what all pictures of a kind have in common does not decide. Participants that are shown the
    same answer the same: two of them see each image by both networks, and more tell nothing new.

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
        If bundle or answers cannot be used, the study has too few tasks, `model` is the network that it is about, the
        same has answered before, or another process writes to the answers.
    """
    check_whole("participants", participants, 1)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin <= 2:
        raise InvalidInputError(f"margin must be a difference of cosines within 0..2, got {margin!r}")
    if model is not None and not isinstance(model, LoadedModel):
        raise InvalidInputError(f"model is a {type(model).__name__}: pass what spade_fast.load_model returned")
    study = open_bundle(bundle)
    if len(study.bundle.tasks) < _LEAST_TASKS:
        raise InvalidInputError(
            f"the study has {len(study.bundle.tasks)} tasks, and features are compared with those of others: build one "
            f"of at least {_LEAST_TASKS}"
        )
    name = UNTRAINED if model is None else f"{model.name} ({model.source})"
    if model is not None and digest(model.module.state_dict()) == study.bundle.settings.get("weights_sha256"):
        raise InvalidInputError(f"the study is about {name} itself: pass another network, which knows nothing of it")
    called = f"{name}, margin {margin:g}"
    file = answers_file(study, answers)
    with held_file(file):
        journal = Journal(file, study)
        if any(each.joined.simulated == called for each in journal.participants.values()):
            raise InvalidInputError(
                f"{os.fspath(file)!r} has answers of {called!r} already, which would be the same: name another file"
            )
        leanings = _leanings(study, _untrained_features if model is None else functools.partial(_features, model))
        for _ in range(participants):
            participant = journal.join(simulated=called)
            assert participant is not None
            for number, question in enumerate(participant.joined.questions):
                journal.answer(participant, number, _choice(question, leanings, margin), None)
    return journal


def _choice(question: Question, leanings: Mapping[str, Tensor], margin: float) -> Choice:
    leaning = float(leanings[question.shown][question.task])
    if abs(leaning) < margin:
        return "undecided"
    return "left" if (leaning > 0) == (question.left == "high") else "right"


def _leanings(study: OpenBundle, features: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """By how much more each picture that may be shown is like the high patch than like the low one, float64 [tasks]."""
    tasks = study.bundle.tasks
    found = {
        kind: features([_read(study, medium) for medium in media]).double()
        for kind, media in (
            ("dense", [task.dense for task in tasks]),
            ("spade", [task.spade for task in tasks]),
            ("high", [task.high.medium for task in tasks]),
            ("low", [task.low.medium for task in tasks]),
        )
    }
    centred = {
        kind: F.normalize(found[kind] - _mean_of_others(found[pair[0]], found[pair[1]]), dim=1)
        for pair in (("dense", "spade"), ("high", "low"))
        for kind in pair
    }
    return {kind: ((each * (centred["high"] - centred["low"])).sum(dim=1)) for kind, each in centred.items()}


def _mean_of_others(first: Tensor, second: Tensor) -> Tensor:
    """For each row of two [n, d] the mean of all other rows of both.

    A task's own are left out: they would pull the two networks' answers to it apart.
    """
    both = first + second
    return (both.sum(dim=0) - both) / (2 * (len(both) - 1))


def _read(study: OpenBundle, medium: str) -> Tensor:
    return image_tensor(decoded_image(study.picture(medium), medium))


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
    banks = [torch.randn(_FILTERS, 3, size, size, generator=generator) for size in _SIZES]
    banks = [bank / bank.flatten(1).norm(dim=1)[:, None, None, None] for bank in banks]
    found = []
    for image in images:
        sized = F.interpolate(image[None], (_SIDE, _SIDE), mode="bilinear", antialias=True) - 0.5
        responses = [F.conv2d(sized, bank, stride=2)[0].relu().flatten(1) for bank in banks]
        found.append(torch.cat([part for each in responses for part in (each.mean(dim=1), each.std(dim=1))]))
    return torch.stack(found)
