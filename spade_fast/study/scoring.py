"""What came of a study: how often people take the patch that Score-CAM ranks highest, by whose visualization."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spade_fast.errors import InvalidInputError
from spade_fast.files import write_folder
from spade_fast.study.bundle import ARMS, Arm, OpenBundle, open_bundle
from spade_fast.study.journal import ANSWERS, Choice, Journal, Participant

#: What an answer says of a task.
Verdict: TypeAlias = Literal["agree", "disagree", "undecided"]
#: The rows of Table 3, in percent of all answers, and of those that are decided: agree or disagree with Score-CAM.
ROWS: Mapping[str, str] = {
    "undecided": "undecided",
    "disagree": "disagree",
    "agree": "agree",
    "disagree_of_decided": "disagree, of decided",
    "agree_of_decided": "agree, of decided",
}
#: What the paper found with people (ResNet-50 on ImageNet), in percent, dense and SPADE; the last two rows follow.
PUBLISHED: Mapping[str, tuple[float, float]] = {
    "undecided": (22.9, 12.6),
    "disagree": (20.4, 17.8),
    "agree": (56.7, 69.8),
    "disagree_of_decided": (26.5, 20.3),
    "agree_of_decided": (73.5, 79.7),
}
_RESAMPLES, _AT_A_TIME = 10_000, 2**22
_COLUMNS = (
    "participant", "simulated", "excluded", "question", "kind", "image", "target", "target_name", "arm", "left",
    "choice", "verdict", "milliseconds",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A figure, and the interval that holds 95 % of the bootstrap samples; NaN for what is not there."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_number(self.value)} ({_number(self.low)} to {_number(self.high)})"


@dataclass(frozen=True)
class GroupScore:
    """What came of the people's answers, or of those of one simulated participant.

    Attributes
    ----------
    group
        "people", or what was simulated.
    participants, finished
        Those whose answers count, and those of them who answered every question.
    excluded
        Participants whose answers do not count, by code: why.
    images
        Tasks that were answered.
    answers
        Answers to tasks, by network.
    rows
        :data:`ROWS` by network, and "difference", SPADE's less the dense network's: percent, points.
    seconds
        Median time of an answer to a task, by network, and the difference.
    agreement
        Share of pairs of answers by two participants, to one image by one network's visualization, that say the same,
        0..1; and Krippendorff's alpha, which is 0 for what chance would give and 1 for full agreement. NaN where no two
        participants were asked the same.
    """

    group: str
    participants: int
    finished: int
    excluded: Mapping[str, str]
    images: int
    answers: Mapping[str, int]
    rows: Mapping[str, Mapping[str, Estimate]]
    seconds: Mapping[str, Estimate]
    agreement: Mapping[str, float]

    def table(self) -> list[list[str]]:
        """Cells of a table: a head, :data:`ROWS`, and time; of people with what the paper found beside."""
        arms, beside = (*ARMS, "difference"), self.group == "people"
        head = ["%", "dense", "SPADE", "difference", *(["paper: dense", "paper: SPADE"] if beside else [])]
        rows = [
            [title, *(str(self.rows[row][arm]) for arm in arms), *(map(str, PUBLISHED[row]) if beside else ())]
            for row, title in ROWS.items()
        ]
        times = ["seconds (median)", *(str(self.seconds[arm]) for arm in arms), *(("", "") if beside else ())]
        return [head, *rows, times]

    def told(self) -> str:
        """How many answered, and how far they agree."""
        who = f"{self.participants} participant{'' if self.participants == 1 else 's'}"
        counts = f"{self.answers['dense']} + {self.answers['spade']} answers to {self.images} images"
        share, alpha = (_number(self.agreement[name], 2) for name in ("share", "alpha"))
        return (
            f"{who} ({self.finished} finished; {len(self.excluded)} more excluded), {counts}. Agreement of "
            f"participants: {share} of pairs, Krippendorff's alpha {alpha}. In brackets: 95 % bootstrap intervals."
        )


@dataclass(frozen=True)
class Score:
    """What came of a study: one :class:`GroupScore` for people, and one for each that was simulated."""

    groups: tuple[GroupScore, ...]
    lines: tuple[Mapping[str, Any], ...]

    def summary(self) -> dict[str, Any]:
        """All figures as plain JSON values, None for what is not there."""
        found: dict[str, Any] = _plain({"groups": [asdict(group) for group in self.groups], "published": PUBLISHED})
        return found

    def tables(self) -> str:
        """A table for each group, in Markdown."""
        return "\n".join(_markdown(group) for group in self.groups)

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write ``answers.csv`` (a line for each answer), ``tables.md`` and ``score.json``."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.lines)
        summary = json.dumps(self.summary(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        contents = {"answers.csv": stream.getvalue(), "tables.md": self.tables(), "score.json": summary}
        return write_folder(folder, {name: text.encode() for name, text in contents.items()})


def score(
    bundle: str | os.PathLike[str],
    answers: str | os.PathLike[str] | None = None,
    *,
    checks: float = 0.5,
    seed: int = 0,
) -> Score:
    """Count the answers to a study (SPADE Table 3).

    Intervals come from 10,000 bootstrap samples in which participants and images are both drawn anew (Owen 2007), so
    that they hold for other people and other images; of a single participant, images alone. People and simulated
    participants are never counted together.

    Parameters
    ----------
    bundle
        The folder that :func:`spade_fast.study.build` wrote.
    answers
        The file of the answers. Default: ``answers.jsonl`` in the bundle.
    checks
        Share of the checks that a participant must have right, 0..1, for the answers to count. Of one who left before
        the first check they count.
    seed
        Of the bootstrap samples.

    Raises
    ------
    InvalidInputError
        If bundle or answers cannot be used, or nothing was answered.
    """
    if isinstance(checks, bool) or not isinstance(checks, (int, float)) or not 0 <= checks <= 1:
        raise InvalidInputError(f"checks must be a share within 0..1, got {checks!r}")
    study = open_bundle(bundle)
    file = study.path / ANSWERS if answers is None else Path(answers)
    journal = Journal(file, study)
    groups: dict[str, list[Participant]] = {}
    for participant in journal.participants.values():
        if participant.answers:
            simulated = participant.joined.simulated
            groups.setdefault("people" if simulated is None else f"simulated: {simulated}", []).append(participant)
    if not groups:
        raise InvalidInputError(f"{os.fspath(file)!r} has no answers: serve or simulate the study first")
    scores, lines = [], []
    for name, members in groups.items():
        excluded = {
            member.joined.participant: reason for member in members if (reason := _failed(study, member, checks))
        }
        told = [line for member in members for line in _lines(study, member, excluded)]
        scores.append(_scored(name, members, excluded, [line for line in told if not line["excluded"]], seed))
        lines += told
    return Score(tuple(scores), tuple(lines))


def _failed(study: OpenBundle, participant: Participant, least: float) -> str | None:
    """Why a participant's answers do not count; None if they do."""
    asked = [
        (study.bundle.checks[question.index].right, question.left, participant.answers[number].choice)
        for number, question in enumerate(participant.joined.questions)
        if question.kind == "check" and number in participant.answers
    ]
    right = sum(choice != "undecided" and (choice == "left") == (left == which) for which, left, choice in asked)
    if not asked or right >= least * len(asked):
        return None
    return f"{right} of {len(asked)} checks right"


def _verdict(left: Literal["high", "low"], choice: Choice) -> Verdict:
    if choice == "undecided":
        return "undecided"
    return "agree" if (choice == "left") == (left == "high") else "disagree"


def _lines(study: OpenBundle, participant: Participant, excluded: Mapping[str, str]) -> list[dict[str, Any]]:
    """The participant's answers, one a line, in the order of the questions."""
    bundle = study.bundle
    found = []
    for number, answer in sorted(participant.answers.items()):
        question = participant.joined.questions[number]
        is_task = question.kind == "task"
        task = bundle.tasks[question.index if is_task else bundle.checks[question.index].task]
        line = (
            participant.joined.participant, participant.joined.simulated, excluded.get(answer.participant), number,
            question.kind, task.name, task.target, task.target_name, question.arm, question.left, answer.choice,
            _verdict(question.left, answer.choice) if is_task else None, answer.milliseconds,
        )  # fmt: skip
        found.append(dict(zip(_COLUMNS, line, strict=True)))
    return found


def _scored(
    name: str,
    members: Sequence[Participant],
    excluded: Mapping[str, str],
    lines: Sequence[Mapping[str, Any]],
    seed: int,
) -> GroupScore:
    counted = [line for line in lines if line["kind"] == "task"]
    by_arm = {arm: [line for line in counted if line["arm"] == arm] for arm in ARMS}
    samples = _Samples(counted, seed)
    shares = {arm: samples.shares(those) for arm, those in by_arm.items()}
    return GroupScore(
        group=name,
        participants=len(members) - len(excluded),
        finished=sum(member.next_question is None and member.joined.participant not in excluded for member in members),
        excluded=dict(excluded),
        images=len({line["image"] for line in counted}),
        answers={arm: len(those) for arm, those in by_arm.items()},
        rows={row: _estimates({arm: found[row] for arm, found in shares.items()}) for row in ROWS},
        seconds=_estimates({arm: samples.medians(those) for arm, those in by_arm.items()}),
        agreement=_agreement(counted),
    )


class _Samples:
    """Bootstrap samples of participants and images: the first row is the answers as they are, each other one a sample.

    An answer counts as often as its participant is drawn, times as often as its image is.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]], seed: int) -> None:
        generator = np.random.default_rng(seed)
        self._person = {code: i for i, code in enumerate(dict.fromkeys(line["participant"] for line in lines))}
        self._image = {image: i for i, image in enumerate(dict.fromkeys(line["image"] for line in lines))}
        self._people, self._images = (_drawn(generator, len(each)) for each in (self._person, self._image))

    def shares(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
        """:data:`ROWS` of these answers, in percent, [samples] each."""
        verdicts: tuple[Verdict, ...] = ("undecided", "disagree", "agree")
        counts = {verdict: np.zeros((len(self._person), len(self._image))) for verdict in verdicts}
        for line in lines:
            counts[line["verdict"]][self._person[line["participant"]], self._image[line["image"]]] += 1
        totals = {verdict: ((self._people @ each) * self._images).sum(axis=1) for verdict, each in counts.items()}
        decided = totals["agree"] + totals["disagree"]
        found = {verdict: 100 * _ratio(total, decided + totals["undecided"]) for verdict, total in totals.items()}
        return found | {f"{each}_of_decided": 100 * _ratio(totals[each], decided) for each in ("disagree", "agree")}

    def medians(self, lines: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Of the times of these answers, in seconds, [samples]: the least up to which half of the weight lies."""
        timed = sorted((line for line in lines if line["milliseconds"] is not None), key=itemgetter("milliseconds"))
        if not timed:
            return np.full(len(self._people), np.nan)
        times = np.array([line["milliseconds"] / 1000 for line in timed])
        people = [self._person[line["participant"]] for line in timed]
        images = [self._image[line["image"]] for line in timed]
        found = []
        rows = max(1, _AT_A_TIME // len(timed))
        for start in range(0, len(self._people), rows):
            weights = self._people[start : start + rows, people] * self._images[start : start + rows, images]
            reached = weights.cumsum(axis=1)
            medians = times[(reached >= reached[:, -1:] / 2).argmax(axis=1)]
            found.append(np.where(reached[:, -1] > 0, medians, np.nan))
        return np.concatenate(found)


def _drawn(generator: np.random.Generator, count: int) -> NDArray[np.float64]:
    """How often each of so many is there, and is drawn in each sample of as many; a single one is always there."""
    if count < 2:
        return np.ones((1 + _RESAMPLES, count))
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    return np.concatenate([np.ones((1, count)), drawn])


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def _estimates(samples: Mapping[Arm, NDArray[np.float64]]) -> dict[str, Estimate]:
    """Of each network, and of the difference."""
    difference = samples["spade"] - samples["dense"]
    return {name: _estimate(found) for name, found in (*samples.items(), ("difference", difference))}


def _estimate(samples: NDArray[np.float64]) -> Estimate:
    value, rest = float(samples[0]), samples[1:][~np.isnan(samples[1:])]
    if math.isnan(value) or len(rest) < len(samples) / 2:
        return Estimate(value, math.nan, math.nan)
    low, high = np.percentile(rest, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _agreement(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of equal pairs, and Krippendorff's alpha for names (Krippendorff 2004, section 11.3)."""
    units: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        units.setdefault((line["image"], line["arm"]), []).append(line["verdict"])
    verdicts = sorted({line["verdict"] for line in lines})
    coincidences = np.zeros((len(verdicts), len(verdicts)))
    for answers in units.values():
        if len(answers) < 2:
            continue
        counts = np.array([answers.count(verdict) for verdict in verdicts], float)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(answers) - 1)
    totals = coincidences.sum(axis=0)
    pairable = float(totals.sum())
    if not pairable:
        return {"share": math.nan, "alpha": math.nan}
    share = float(np.trace(coincidences) / pairable)
    expected = (pairable**2 - float((totals**2).sum())) / (pairable * (pairable - 1))
    return {"share": share, "alpha": 1 - (1 - share) / expected if expected else math.nan}


def _markdown(group: GroupScore) -> str:
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in group.table())
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"## {group.group}\n\n{table}\n\n{group.told()}\n"


def _number(value: float, digits: int = 1) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
