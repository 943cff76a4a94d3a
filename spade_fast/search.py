"""The search for a plan: which candidates are tried, on which images, and which one is taken."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from spade_fast.cases import Case
from spade_fast.comparison import Metric
from spade_fast.errors import InvalidInputError, told
from spade_fast.files import append_line, read_lines

if TYPE_CHECKING:
    from spade_fast.tuning import Tuner

#: A target for each layer that may be pruned.
Candidate: TypeAlias = tuple[float, ...]

# Of the images to tune on, the share on which all candidates of a race run; the best few run on the others too.
_HEAT = 1 / 3
_LEAST_IN_HEAT = 4
FINALISTS = 3
#: The name of the plan that a search comes to.
SEARCHED = "tuned"
# A block's target is changed where the gain is above so many standard errors; a plan taken in the place of the dense
# network, above so many: it is the best of a few dozen.
_STANDARD_ERRORS, _SURE = 1.0, 2.0


@dataclass(frozen=True)
class Step:
    """One candidate of a tuning.

    Attributes
    ----------
    stage
        "untuned", "search" or "refinement"; or "choice", among what they found.
    name
        What was tried: a block and its target, or the kind of a plan.
    targets
        By block.
    images
        How many it was tried on; at the choice all, but for what was searched for only those held out.
    gain
        Mean over those of the metric minus that of the dense network, in points: the larger, the better. Minus infinity
        where the method fails on one of them.
    error
        Its standard error; infinite where that cannot be told.
    chosen
        Whether it was taken.
    """

    stage: str
    name: str
    targets: Mapping[str, float]
    images: int
    gain: float
    error: float
    chosen: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: None stands for what is infinite."""
        finite = {key: getattr(self, key) if math.isfinite(getattr(self, key)) else None for key in ("gain", "error")}
        return {**asdict(self), "targets": dict(self.targets), **finite}


@dataclass(frozen=True, eq=False)
class Found:
    """What a search comes to.

    Attributes
    ----------
    name, candidate
        What was taken.
    gains
        Its points above the dense network on the images of the choice.
    history
        All that was tried, in order.
    evaluations
        Maps that it took.
    """

    name: str
    candidate: Candidate
    gains: NDArray[np.float64]
    history: tuple[Step, ...]
    evaluations: int


class Values:
    """The metric of every map that was made, by candidate and case; on the disk too, where there is a log."""

    def __init__(self, log: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self._log = None if log is None else Path(log)
        self._known: dict[tuple[Candidate, str], float | None] = {}
        if self._log is None:
            return
        wanted = json.loads(json.dumps(settings))
        most = 1.0 if settings["metric"] in get_args(Metric) else sys.float_info.max
        lines = read_lines(self._log)
        if (
            not lines
            and self._log.exists()
            and not self._log.read_bytes().startswith(b'{"settings"'[: self._log.stat().st_size])
        ):
            raise InvalidInputError(
                f"{os.fspath(self._log)!r} is another file, not the log of a tuning: choose another name"
            )
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if number == 1:
                    different = [key for key in wanted if record["settings"].get(key) != wanted[key]]
                else:
                    values = {tuple(targets): value for targets, value in record["values"]}
                    for value in values.values():
                        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                            raise ValueError(f"{value!r} is no number")
                        if value is not None and not -most <= value <= most:
                            raise ValueError(f"{value!r} is no {settings['metric']}")
                    self._take(record["image"], values)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidInputError(
                    f"line {number} of {os.fspath(self._log)!r} is no record ({told(error)}): "
                    "delete that file to begin anew"
                ) from error
            if number == 1 and different:
                raise InvalidInputError(
                    f"{os.fspath(self._log)!r} is of a run whose {different[0]!r} differs: delete it to begin anew"
                )
        if not lines:
            append_line(self._log, json.dumps({"settings": wanted}))

    def __contains__(self, place: tuple[Candidate, str]) -> bool:
        return place in self._known

    def __getitem__(self, place: tuple[Candidate, str]) -> float | None:
        return self._known[place]

    def add(self, image: str, values: Mapping[Candidate, float | None]) -> None:
        """What was measured together: in one line, so that a run that goes on measures the same together again."""
        if self._log is not None and values:
            append_line(self._log, json.dumps({"image": image, "values": list(values.items())}))
        self._take(image, values)

    def _take(self, image: str, values: Mapping[Candidate, float | None]) -> None:
        self._known.update({(candidate, image): value for candidate, value in values.items()})


class Search:
    """The search for one method."""

    def __init__(self, tuner: Tuner, method: str, values: Values, bar: Any) -> None:
        self._tuner, self._method, self._values, self._bar = tuner, method, values, bar
        self._history: list[Step] = []
        self._asked: set[tuple[Candidate, str]] = set()
        self._dense: Candidate = (0.0,) * len(tuner.layers)

    def run(self, *, search: bool) -> Found:
        """Compare plans that need no search, `search` from the best of them, and choose."""
        named = {"dense": self._dense, **self._untuned()}
        if search:
            best = max(named.values(), key=self._mean_gain)
            found = self._pass_over_blocks("search", best, neighbours=False)
            named[SEARCHED] = self._pass_over_blocks("refinement", found, neighbours=True)
        name, gains = self._choose(named)
        return Found(name, named[name], gains, tuple(self._history), len(self._asked))

    def _gains(self, candidates: Sequence[Candidate], cases: Sequence[Case]) -> NDArray[np.float64]:
        """Points above the dense network, [candidates, cases]; minus infinity where the method fails."""
        gains = np.empty((len(candidates), len(cases)))
        for j, case in enumerate(cases):
            new = [each for each in dict.fromkeys([self._dense, *candidates]) if (each, case.name) not in self._asked]
            self._asked |= {(each, case.name) for each in new}
            missing = [each for each in new if (each, case.name) not in self._values]
            maps = dict(zip(missing, self._tuner.maps(case, self._method, missing), strict=True))
            good = {each: found for each, found in maps.items() if found is not None}
            scores = dict(zip(good, self._tuner.score(case, list(good.values())), strict=True)) if good else {}
            self._values.add(case.name, {each: scores.get(each) for each in missing})
            self._bar.update(len(new))
            dense = self._values[self._dense, case.name]
            if dense is None:
                raise InvalidInputError(f"{case.name}, dense network: {self._tuner.metric} is NaN or infinite")
            for i, candidate in enumerate(candidates):
                value = self._values[candidate, case.name]
                gains[i, j] = -math.inf if value is None else 100 * (value - dense)
        return gains

    def _mean_gain(self, candidate: Candidate) -> float:
        return float(self._gains([candidate], self._tuner.cases).mean())

    def _race(self, stage: str, named: Mapping[str, Candidate]) -> str:
        """The name of the best; after a part of the images only a few go on."""
        cases = self._tuner.cases
        heat = cases[: in_heat(len(cases))]
        gains = dict(zip(named, self._gains(list(named.values()), heat), strict=True))
        finalists = sorted(named, key=lambda name: -gains[name].mean())[:FINALISTS]
        gains |= dict(zip(finalists, self._gains([named[name] for name in finalists], cases), strict=True))
        winner = max(finalists, key=lambda name: gains[name].mean())
        for name, candidate in named.items():
            self._tell(stage, name, candidate, gains[name], chosen=False)
        return winner

    def _tell(self, stage: str, name: str, candidate: Candidate, gains: NDArray[np.float64], *, chosen: bool) -> None:
        targets = self._tuner.told(candidate)
        gain, error = _mean(gains)
        self._history.append(Step(stage, name, targets, len(gains), gain, error, chosen))

    def _untuned(self) -> dict[str, Candidate]:
        """The best plan of each kind that needs no tuning, by its name."""
        best = {}
        for named in map(_distinct, self._tuner.untuned_plans().values()):
            if named:
                winner = self._race("untuned", named)
                best[winner] = named[winner]
                self._mark(winner)
        return best

    def _mark(self, name: str) -> None:
        """Tell in the history that the last candidate of that name was chosen."""
        last = max(i for i, step in enumerate(self._history) if step.name == name)
        self._history[last] = replace(self._history[last], chosen=True)

    def _pass_over_blocks(self, stage: str, candidate: Candidate, *, neighbours: bool) -> Candidate:
        """Change the target of one block after the other, from the last to the first, wherever that is a sure gain."""
        for block in reversed(self._tuner.blocks):
            moves = self._tuner.moves(candidate, block, neighbours=neighbours)
            if not moves:
                continue
            name = self._race(stage, moves)
            cases = self._tuner.cases
            ahead, behind = self._gains([moves[name], candidate], cases)
            gain, error = _mean(ahead - behind)
            if gain > _STANDARD_ERRORS * error:
                candidate = moves[name]
                self._mark(name)
        return candidate

    def _choose(self, named: Mapping[str, Candidate]) -> tuple[str, NDArray[np.float64]]:
        """The name of what does best on all images, if that is sure, and its gains.

        What was searched for fits the images that the search has seen: it is taken only if it does best on the others.
        """
        candidates = list(named.values())
        apart = dict(zip(named, self._gains(candidates, self._tuner.held_out), strict=True))
        seen = dict(zip(named, self._gains(candidates, self._tuner.cases), strict=True))
        whole = {name: np.concatenate([seen[name], apart[name]]) for name in named}
        sure = {"dense": 0.0}
        for name, gains in whole.items():
            gain, error = _mean(gains)
            if gain > _SURE * error:
                sure[name] = gain
        if SEARCHED in sure and apart[SEARCHED].mean() < max(apart[name].mean() for name in sure):
            del sure[SEARCHED]
        winner = max(sure, key=sure.__getitem__)
        judged = {**whole, **({SEARCHED: apart[SEARCHED]} if SEARCHED in named else {})}
        for name, candidate in named.items():
            self._tell("choice", name, candidate, judged[name], chosen=name == winner)
        return winner, judged[winner]


def _distinct(named: Mapping[str, Candidate]) -> dict[str, Candidate]:
    """Each candidate once, by its first name, without those that prune nothing."""
    names: dict[Candidate, str] = {}
    for name, candidate in named.items():
        if any(candidate):
            names.setdefault(candidate, name)
    return {name: candidate for candidate, name in names.items()}


def in_heat(images: int) -> int:
    """On how many of the images all candidates of a race run."""
    return min(images, max(_LEAST_IN_HEAT, math.ceil(_HEAT * images)))


def _mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """The mean and its standard error."""
    if not np.isfinite(values).all():
        return -math.inf, math.inf
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), error
