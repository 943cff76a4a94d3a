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

from spade_fast.errors import InvalidInputError, check_whole
from spade_fast.files import write_folder
from spade_fast.study.bundle import ARMS, Arm, OpenBundle, open_bundle
from spade_fast.study.journal import Choice, Journal, Participant, answers_file
from spade_fast.study.schedule import Which

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
#: The group of those that are none of a program's.
PEOPLE = "people"
_RESAMPLES, _AT_A_TIME = 10_000, 2**22
_COLUMNS = (
    "participant", "simulated", "excluded", "question", "image", "target", "target_name", "trace_agrees", "shown",
    "left", "choice", "verdict", "milliseconds",
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
    left
        Participants who began and answered nothing.
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
        By network: "share" of pairs of answers by two participants to one image that say the same, 0..1; and
        Krippendorff's "alpha", which is 0 for what chance would give and 1 for full agreement. NaN where no two people
        were asked the same, and of simulated participants, which are one program.
    """

    group: str
    participants: int
    finished: int
    left: int
    excluded: Mapping[str, str]
    images: int
    answers: Mapping[str, int]
    rows: Mapping[str, Mapping[str, Estimate]]
    seconds: Mapping[str, Estimate]
    agreement: Mapping[str, Mapping[str, float]]

    def table(self) -> list[list[str]]:
        """Cells of a table: a head, :data:`ROWS`, and time; of people with what the paper found beside."""
        arms, beside = (*ARMS, "difference"), self.group == PEOPLE
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
        uncounted = f"not counted: {len(self.excluded)} excluded, {self.left} without an answer"
        told = f"{who} ({self.finished} finished; {uncounted})"
        agreement = "; ".join(
            f"{arm} {_number(found['share'], 2)} of pairs, Krippendorff's alpha {_number(found['alpha'], 2)}"
            for arm, found in self.agreement.items()
        )
        agreement = f" Agreement of participants: {agreement}." if self.group == PEOPLE else ""
        return f"{told}, {counts}.{agreement} In brackets: 95 % bootstrap intervals."


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
    least_checks: float = 0.75,
    seed: int = 0,
) -> Score:
    """Count the answers to a study (SPADE Table 3).

    Intervals come from 10,000 bootstrap samples in which participants and images are both drawn anew (Owen 2007), so
    that they hold for other people and other images; of a single participant, and of simulated ones, which are one
    program, images alone. Images of one class are drawn together, as the dense network's visualization of them is the
    same. Where all answers say the same, an interval has no width, however few they are. People and simulated
    participants are never counted together.

    Parameters
    ----------
    bundle
        The folder that :func:`spade_fast.study.build` wrote.
    answers
        The file of the answers. Default: ``answers.jsonl`` in the bundle.
    least_checks
        Share of the checks that a person must have right, 0..1, for the answers to count. Of four checks one who
        always takes the same side has two right, and one who guesses three or more in 5 cases of 16. Of one who left
        before the first check answers count.
    seed
        Of the bootstrap samples.

    Raises
    ------
    InvalidInputError
        If bundle or answers cannot be used, or nothing was answered.
    """
    if isinstance(least_checks, bool) or not isinstance(least_checks, (int, float)) or not 0 <= least_checks <= 1:
        raise InvalidInputError(f"least_checks must be a share within 0..1, got {least_checks!r}")
    check_whole("seed", seed, 0)
    study = open_bundle(bundle)
    file = answers_file(study, answers)
    journal = Journal(file, study)
    groups: dict[str, list[Participant]] = {}
    for participant in journal.participants.values():
        simulated = participant.joined.simulated
        groups.setdefault(PEOPLE if simulated is None else f"simulated: {simulated}", []).append(participant)
    if not any(participant.answers for participant in journal.participants.values()):
        raise InvalidInputError(f"{os.fspath(file)!r} has no answers: serve or simulate the study first")
    scores, lines = [], []
    for name, members in groups.items():
        excluded = {
            member.joined.participant: reason
            for member in members
            if name == PEOPLE and (reason := _failed(member, least_checks))
        }
        told = [line for member in members for line in _lines(study, member, excluded)]
        scores.append(_scored(name, members, excluded, [line for line in told if not line["excluded"]], seed))
        lines += told
    return Score(tuple(scores), tuple(lines))


def _failed(participant: Participant, least: float) -> str | None:
    """Why a participant's answers do not count; None if they do."""
    asked = [
        (question.shown == question.left, participant.answers[number].choice)
        for number, question in enumerate(participant.joined.questions)
        if question.is_check and number in participant.answers
    ]
    right = sum(choice == ("left" if is_left else "right") for is_left, choice in asked)
    if not asked or right >= least * len(asked):
        return None
    return f"{right} of {len(asked)} checks right"


def _verdict(left: Which, choice: Choice) -> Verdict:
    if choice == "undecided":
        return "undecided"
    return "agree" if (choice == "left") == (left == "high") else "disagree"


def _lines(study: OpenBundle, participant: Participant, excluded: Mapping[str, str]) -> list[dict[str, Any]]:
    """The participant's answers, one a line, in the order of the questions; those to checks without a verdict."""
    found = []
    for number, answer in sorted(participant.answers.items()):
        question = participant.joined.questions[number]
        task = study.bundle.tasks[question.task]
        line = (
            answer.participant, participant.joined.simulated, excluded.get(answer.participant), number, task.name,
            task.target, task.target_name, task.trace_agrees, question.shown, question.left, answer.choice,
            None if question.is_check else _verdict(question.left, answer.choice), answer.milliseconds,
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
    counted = [line for line in lines if line["verdict"] is not None]
    by_arm = {arm: [line for line in counted if line["shown"] == arm] for arm in ARMS}
    samples = _Samples(counted, seed, of_people=name == PEOPLE)
    shares = {arm: samples.shares(those) for arm, those in by_arm.items()}
    answered = [member for member in members if member.answers]
    return GroupScore(
        group=name,
        participants=len(answered) - len(excluded),
        finished=sum(member.next_question is None and member.joined.participant not in excluded for member in answered),
        left=len(members) - len(answered),
        excluded=dict(excluded),
        images=len({line["image"] for line in counted}),
        answers={arm: len(those) for arm, those in by_arm.items()},
        rows={row: _estimates({arm: found[row] for arm, found in shares.items()}) for row in ROWS},
        seconds=_estimates({arm: samples.medians(those) for arm, those in by_arm.items()}),
        agreement={arm: _agreement(those if name == PEOPLE else ()) for arm, those in by_arm.items()},
    )


class _Samples:
    """Bootstrap samples of participants and of images by class: the first row is the answers as they are.

    In each other row an answer counts as often as its participant is drawn, times as often as its image's class is.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]], seed: int, *, of_people: bool) -> None:
        generator = np.random.default_rng(seed)
        # Simulated participants are one program, so that none of them could be another.
        persons = (line["participant"] if of_people else "" for line in lines)
        self._person = {code: i for i, code in enumerate(dict.fromkeys(persons))}
        self._class = {target: i for i, target in enumerate(dict.fromkeys(line["target"] for line in lines))}
        self._people, self._classes = (_drawn(generator, len(each)) for each in (self._person, self._class))

    def shares(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
        """:data:`ROWS` of these answers, in percent, [samples] each."""
        verdicts: tuple[Verdict, ...] = ("undecided", "disagree", "agree")
        counts = {verdict: np.zeros((len(self._person), len(self._class))) for verdict in verdicts}
        for line in lines:
            counts[line["verdict"]][self._place(line)] += 1
        totals = {verdict: ((self._people @ each) * self._classes).sum(axis=1) for verdict, each in counts.items()}
        decided = totals["agree"] + totals["disagree"]
        found = {verdict: 100 * _ratio(total, decided + totals["undecided"]) for verdict, total in totals.items()}
        return found | {f"{each}_of_decided": 100 * _ratio(totals[each], decided) for each in ("disagree", "agree")}

    def medians(self, lines: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Of the times of these answers, in seconds, [samples], each counted as often as it is there."""
        timed = sorted((line for line in lines if line["milliseconds"] is not None), key=itemgetter("milliseconds"))
        if not timed:
            return np.full(len(self._people), np.nan)
        times = np.array([line["milliseconds"] / 1000 for line in timed])
        people, classes = map(list, zip(*(self._place(line) for line in timed), strict=True))
        found = []
        rows = max(1, _AT_A_TIME // len(timed))
        for start in range(0, len(self._people), rows):
            weights = self._people[start : start + rows, people] * self._classes[start : start + rows, classes]
            reached = weights.cumsum(axis=1)
            half = reached[:, -1:] / 2
            # The two in the middle, which are the same one but for an even count.
            medians = (times[(reached >= half).argmax(axis=1)] + times[(reached > half).argmax(axis=1)]) / 2
            found.append(np.where(reached[:, -1] > 0, medians, np.nan))
        return np.concatenate(found)

    def _place(self, line: Mapping[str, Any]) -> tuple[int, int]:
        return self._person.get(line["participant"], 0), self._class[line["target"]]


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
    """Share of equal pairs, and Krippendorff's alpha for names (Krippendorff 2004, section 11.3), of one network."""
    units: dict[str, list[str]] = {}
    for line in lines:
        units.setdefault(line["image"], []).append(line["verdict"])
    verdicts = sorted({line["verdict"] for line in lines})
    coincidences = np.zeros((len(verdicts), len(verdicts)))
    equal = pairs = 0
    for answers in units.values():
        if len(answers) < 2:
            continue
        counts = np.array([answers.count(verdict) for verdict in verdicts], float)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(answers) - 1)
        equal += int((counts * (counts - 1)).sum())
        pairs += len(answers) * (len(answers) - 1)
    if not pairs:
        return {"share": math.nan, "alpha": math.nan}
    totals = coincidences.sum(axis=0)
    pairable = float(totals.sum())
    observed = 1 - float(np.trace(coincidences)) / pairable
    expected = 1 - float((totals * (totals - 1)).sum()) / (pairable * (pairable - 1))
    return {"share": equal / pairs, "alpha": 1 - observed / expected if expected else math.nan}


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
