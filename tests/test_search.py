"""The search's rules, on a tuner whose figures are given: which moves and which plan are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from spade_fast.search import SEARCHED, Candidate, Found, Search, Values

SEEN = tuple(f"seen {i}" for i in range(6))
APART = ("apart 0", "apart 1")
DENSE: Candidate = (0.0, 0.0)
UNTUNED: Candidate = (0.5, 0.5)
MOVED: Candidate = (0.5, 0.9)


class Figures:
    """A tuner of two blocks with one plan that needs no tuning, and one move for the last block."""

    layers = ("first", "last")
    blocks: Mapping[str, tuple[str, ...]] = {"first": ("first",), "last": ("last",)}
    metric = "given"

    def __init__(self, points: Callable[[Candidate, str], float]) -> None:
        self.cases, self.held_out = ([SimpleNamespace(name=name) for name in names] for names in (SEEN, APART))
        self._points = points

    def untuned_plans(self) -> dict[str, dict[str, Candidate]]:
        return {"uniform": {"all blocks at 0.5": UNTUNED}}

    def moves(self, candidate: Candidate, block: str, *, neighbours: bool) -> dict[str, Candidate]:
        return {"last at 0.9": MOVED} if block == "last" and candidate == UNTUNED and not neighbours else {}

    def told(self, candidate: Candidate) -> dict[str, float]:
        return dict(zip(self.layers, candidate, strict=True))

    def maps(self, case: Any, _: str, candidates: Sequence[Candidate]) -> list[Tensor]:
        return [torch.tensor(0.0 if each == DENSE else self._points(each, case.name) / 100) for each in candidates]

    def score(self, _: Any, maps: Sequence[Tensor]) -> list[float]:
        return [float(each) for each in maps]


def run(points: Callable[[Candidate, str], float], *, search: bool = True) -> Found:
    figures: Any = Figures(points)
    with tqdm(disable=True) as bar:
        return Search(figures, "a method", Values(None, {}), bar).run(search=search)


def chosen(found: Found, stage: str) -> list[str]:
    return [step.name for step in found.history if step.stage == stage and step.chosen]


@pytest.mark.parametrize(("gain", "taken"), [(0.3, []), (0.5, ["last at 0.9"])])
def test_a_move_is_taken_for_more_than_a_standard_error(gain: float, taken: list[str]) -> None:
    """Of plus and minus one on six images the standard error is 0.45 points."""

    def points(candidate: Candidate, name: str) -> float:
        spread = 1.0 if name in SEEN[::2] else -1.0
        return 5.0 if candidate == UNTUNED else 5.0 + gain + spread

    assert chosen(run(points), "search") == taken


@pytest.mark.parametrize(("apart", "name"), [(-2.0, "dense"), (1.0, "all blocks at 0.5")])
def test_a_plan_that_needs_no_tuning_is_judged_on_all_images(apart: float, name: str) -> None:
    found = run(lambda _, image: apart if image in APART else 1.0, search=False)
    assert found.name == name
    assert len(found.gains) == len(SEEN) + len(APART)


@pytest.mark.parametrize(("apart", "name"), [(-0.1, "dense"), (0.1, SEARCHED)])
def test_what_was_searched_for_is_no_worse_than_the_dense_network_on_other_images(apart: float, name: str) -> None:
    """However sure its gain on all of them is, where no other plan's is."""

    def points(candidate: Candidate, image: str) -> float:
        if candidate == MOVED:
            return apart if image in APART else 10.0
        return 3.1 if image in (*SEEN[::2], APART[0]) else -3.0

    assert run(points).name == name


@pytest.mark.parametrize(("apart", "name"), [(3.9, "all blocks at 0.5"), (4.1, SEARCHED)])
def test_nor_worse_than_a_plan_that_needs_no_tuning(apart: float, name: str) -> None:
    def points(candidate: Candidate, image: str) -> float:
        if candidate == MOVED:
            return apart if image in APART else 10.0
        return 4.0

    found = run(points)
    assert found.name == name
    assert found.gains.tolist() == pytest.approx([apart] * 2 if name == SEARCHED else [4.0] * 8)
