"""What each participant is asked, in which order, with which network's visualization, and which patch on which side."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from spade_fast.study.bundle import Arm, Bundle, Count, Record


class Question(Record):
    """A question as one participant is asked it.

    Attributes
    ----------
    kind, index
        Which task or check of the bundle.
    arm
        Whose visualization is shown; None for a check.
    left
        The patch on the left; the other one is on the right.
    """

    kind: Literal["task", "check"]
    index: Count
    arm: Arm | None
    left: Literal["high", "low"]


def questions_of(bundle: Bundle, number: int) -> tuple[Question, ...]:
    """The questions of a participant, all tasks and checks of the bundle.

    Half of the tasks are shown with the dense network's visualization, the others with the trace's; the participant
    after an even-numbered one has the same tasks the other way round. Of either half the high patch is on the left in
    one half. Where a half is odd, chance gives the one that is left over to either side. Tasks come in random order,
    checks spread among them, none first.

    Parameters
    ----------
    bundle
        The study.
    number
        Of the participant, from 0 in the order in which they came.
    """
    pair, is_second = divmod(number, 2)
    places = list(range(len(bundle.tasks)))
    dense_first = set(_half(places, random.Random(f"arms {bundle.seed} {pair}")))
    chance = random.Random(f"order {bundle.seed} {number}")
    shown: dict[Arm, list[int]] = {"dense": [], "spade": []}
    for place in places:
        shown["dense" if (place in dense_first) != bool(is_second) else "spade"].append(place)
    asked = []
    for arm, those in shown.items():
        left = set(_half(those, chance))
        asked += [Question(kind="task", index=i, arm=arm, left="high" if i in left else "low") for i in those]
    chance.shuffle(asked)
    checks = [
        Question(kind="check", index=i, arm=None, left=chance.choice(("high", "low")))
        for i in range(len(bundle.checks))
    ]
    chance.shuffle(checks)
    for count, check in enumerate(checks):
        # One in each equal part of the tasks; those that are in already have moved the others on.
        first, last = (round(part * len(bundle.tasks) / len(checks)) for part in (count, count + 1))
        asked.insert(count + chance.randint(min(first + 1, last), last), check)
    return tuple(asked)


def _half(places: Sequence[int], chance: random.Random) -> list[int]:
    """Half of them, at random; where they are odd, chance rounds."""
    count = (len(places) + chance.randrange(2)) // 2
    return chance.sample(places, count)
