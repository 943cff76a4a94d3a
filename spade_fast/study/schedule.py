"""What each participant is asked, in which order, with which network's visualization, and which patch on which side."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, TypeAlias

from spade_fast.study.bundle import ARMS, Arm, Bundle, Count, Record

#: One of a task's two patches.
Which: TypeAlias = Literal["high", "low"]


class Question(Record):
    """A question as one participant is asked it.

    Attributes
    ----------
    task
        Index of the bundle's task whose photograph and patches are shown.
    shown
        What stands where participants look for the network's reasons: a network's visualization or, in a check, one of
        the patches, which is then the right answer.
    left
        The patch on the left; the other one is on the right.
    """

    task: Count
    shown: Arm | Which
    left: Which

    @property
    def is_check(self) -> bool:
        """Whether anybody can answer who looks."""
        return self.shown in ("high", "low")


def questions_of(bundle: Bundle, number: int) -> tuple[Question, ...]:
    """The questions of a participant: all tasks of the bundle, in random order, and checks.

    Half of the tasks are shown with the dense network's visualization, the others with the trace's, and in half of
    either half the high patch is on the left; where a half is odd, chance rounds. The participant after one of an even
    number has the other network and the other side for each task.

    A check comes in each equal part of the tasks, after the first one of that part, and is about a task that was asked
    before, each at most once. Of four in a row each combination of high or low patch, and right answer on the left or
    on the right, comes once.

    Parameters
    ----------
    bundle
        The study.
    number
        Of the participant, from 0.
    """
    pair, is_second = divmod(number, 2)
    tasks = _asked_of_pair(len(bundle.tasks), random.Random(f"pair {bundle.seed} {pair}"))
    if is_second:
        tasks = [_mirrored(question) for question in tasks]
    chance = random.Random(f"order {bundle.seed} {number}")
    chance.shuffle(tasks)
    kinds: list[tuple[Which, bool]] = [("high", True), ("low", True), ("high", False), ("low", False)]
    chance.shuffle(kinds)
    asked: list[Question] = []
    checked: set[int] = set()
    for part in range(bundle.checks):
        first, last = (round(each * len(tasks) / bundle.checks) for each in (part, part + 1))
        place = chance.randint(first + 1, last)
        asked += tasks[first:place]
        about = chance.choice([question.task for question in tasks[:place] if question.task not in checked])
        checked.add(about)
        shown, is_left = kinds[part % len(kinds)]
        asked.append(Question(task=about, shown=shown, left=shown if is_left else _other(shown)))
        asked += tasks[place:last]
    return tuple(asked or tasks)


def _asked_of_pair(count: int, chance: random.Random) -> list[Question]:
    """The tasks of the first of two participants, in the order of the bundle."""
    dense = set(_half(range(count), chance))
    left: dict[Arm, set[int]] = {
        arm: set(_half([i for i in range(count) if (i in dense) == (arm == "dense")], chance)) for arm in ARMS
    }
    arms: list[Arm] = ["dense" if i in dense else "spade" for i in range(count)]
    return [Question(task=i, shown=arm, left="high" if i in left[arm] else "low") for i, arm in enumerate(arms)]


def _mirrored(question: Question) -> Question:
    """A task with the other network's visualization and the patches on the other sides."""
    shown: Arm = "spade" if question.shown == "dense" else "dense"
    return Question(task=question.task, shown=shown, left=_other(question.left))


def _other(which: Which) -> Which:
    return "low" if which == "high" else "high"


def _half(places: Sequence[int], chance: random.Random) -> list[int]:
    """Half of them, at random; where they are odd, chance rounds."""
    return chance.sample(places, (len(places) + chance.randrange(2)) // 2)
