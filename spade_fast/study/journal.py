"""What participants answered: a file to which a line is added for each, on the disk before it is acknowledged."""

from __future__ import annotations

import itertools
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from spade_fast.errors import InvalidInputError
from spade_fast.files import append_line, held_file, read_lines, write_whole
from spade_fast.study.bundle import Count, OpenBundle, Record, described, first_fault, open_bundle
from spade_fast.study.schedule import Question, questions_of

#: The default name of the file, in the folder of the bundle.
ANSWERS = "answers.jsonl"
#: What a participant takes: the patch on that side, or neither.
Choice: TypeAlias = Literal["left", "right", "undecided"]

# Without letters and digits that are taken for each other.
_LETTERS = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"
_CODE_LENGTH = 8
# Seconds after which somebody who began and answered nothing is taken to have left.
_LEFT = 600.0
#: The longest time an answer may have taken, in milliseconds: a day.
LONGEST = 24 * 3600 * 1000
Milliseconds: TypeAlias = Annotated[int, Field(ge=0, le=LONGEST)]


class Joined(Record):
    """A participant, and all that he or she will be asked.

    Attributes
    ----------
    participant
        A random code: all that is known of a person.
    study
        SHA-256 of the study's ``study.json``.
    number
        By which the questions were drawn: the first that nobody else of this kind has, people or simulated ones; that
        of somebody who left without an answer is given again.
    simulated
        What answers in a person's place; None for a person.
    questions
        In order.
    """

    kind: Literal["joined"] = "joined"
    participant: str
    study: str
    number: Count
    simulated: str | None
    questions: Annotated[tuple[Question, ...], Field(strict=False)]


class Answer(Record):
    """An answer.

    Attributes
    ----------
    participant
        Who gave it.
    question
        To which of the participant's questions, from 0.
    choice
        What was taken.
    milliseconds
        For which the question was seen before it was answered, as the participant's browser measured it, reloads
        included; None where it did not.
    """

    kind: Literal["answer"] = "answer"
    participant: str
    question: Count
    choice: Choice
    milliseconds: Milliseconds | None


_LINE: TypeAdapter[Joined | Answer] = TypeAdapter(Annotated[Joined | Answer, Field(discriminator="kind")])


@dataclass
class Participant:
    """A participant, and the answers so far, by the index of the question."""

    joined: Joined
    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def next_question(self) -> int | None:
        """The index of the first question without an answer; None where all have one."""
        return next((i for i in range(len(self.joined.questions)) if i not in self.answers), None)


class Journal:
    """The answers to a study, in memory and in a file, which is the one that counts.

    Safe to be used by several threads; the file must be this process's (`spade_fast.files.held_file` holds it).

    Parameters
    ----------
    path
        A file of lines of JSON: :class:`Joined` for each participant, and :class:`Answer` for each answer. It need not
        exist. A last line that was cut short was never acknowledged, and is left out.
    study
        The study that it is about.

    Raises
    ------
    InvalidInputError
        If it cannot be read, holds something else, or answers to another study; the message names the line.
    """

    def __init__(self, path: str | os.PathLike[str], study: OpenBundle) -> None:
        self.path = Path(path)
        self._study = study
        self._lock = threading.Lock()
        self._participants: dict[str, Participant] = {}
        self._came: dict[str, float] = {}  # to this journal, by a clock of this process
        self._file = _identity(self.path)
        if self._file is not None:
            with self.path.open("rb") as file:  # what is taken for answered must outlast a loss of power
                os.fsync(file.fileno())
        for number, line in enumerate(read_lines(self.path), 1):
            try:
                self._take(_LINE.validate_json(line))
            except ValueError as error:  # ValidationError among them
                reason = first_fault(error) if isinstance(error, ValidationError) else str(error)
                raise InvalidInputError(
                    f"line {number} of {os.fspath(path)!r} is no answer to this study ({reason}): delete that line, or "
                    "choose another file"
                ) from error

    @property
    def participants(self) -> Mapping[str, Participant]:
        """All participants, by their codes, in the order in which they came."""
        return self._participants

    def find(self, code: str) -> Participant | None:
        """The participant of a code, however it is spelt; None where there is none."""
        return self._participants.get("".join(each for each in code.upper() if each.isalnum()))

    def people(self) -> int:
        """How many participants are people."""
        return sum(participant.joined.simulated is None for participant in self._participants.values())

    def join(self, simulated: str | None = None, *, most: int | None = None) -> Participant | None:
        """Take in a participant, who is on the disk when this returns.

        Parameters
        ----------
        simulated
            What answers in a person's place.
        most
            When so many people have come, take in nobody, and return None.

        Raises
        ------
        InvalidInputError
            If the file cannot be written; nobody has joined then.
        """
        with self._lock:
            if most is not None and self.people() >= most:
                return None
            code = self._new_code()
            number = self._free_number(simulated)
            joined = Joined(
                participant=code,
                study=self._study.digest,
                number=number,
                simulated=simulated,
                questions=questions_of(self._study.bundle, number),
            )
            self._append(joined)
            self._came[code] = time.monotonic()
            return self._participants[code]

    def _new_code(self) -> str:
        while True:
            code = "".join(secrets.choice(_LETTERS) for _ in range(_CODE_LENGTH))
            if code not in self._participants:
                return code

    def _free_number(self, simulated: str | None) -> int:
        """The first number that no other participant of this kind has, unless he or she has left."""
        now = time.monotonic()
        taken = {
            other.joined.number
            for code, other in self._participants.items()
            if other.joined.simulated == simulated and (other.answers or now - self._came.get(code, -_LEFT) < _LEFT)
        }
        return next(number for number in itertools.count() if number not in taken)

    def forget(self, code: str) -> None:
        """Delete a participant, and all that he or she answered, from the file.

        Raises
        ------
        InvalidInputError
            If nobody has the code, or the file cannot be written.
        """
        with self._lock:
            participant = self.find(code)
            if participant is None:
                raise InvalidInputError(f"nobody has the code {code!r} in {os.fspath(self.path)!r}: check it")
            others = [other for other in self._participants.values() if other is not participant]
            kept = [line for other in others for line in (other.joined, *other.answers.values())]
            write_whole(self.path, "".join(f"{described(line)}\n" for line in kept).encode())
            self._file = _identity(self.path)
            del self._participants[participant.joined.participant]

    def answer(self, participant: Participant, question: int, choice: Choice, milliseconds: int | None) -> bool:
        """Take an answer, which is on the disk when this returns.

        Returns
        -------
        bool
            Whether it was taken. It is not where the question is not the participant's next one: has an answer
            already, which stays, or is not to be asked yet.

        Raises
        ------
        InvalidInputError
            If the file cannot be written; the question has no answer then.
        """
        with self._lock:
            if question != participant.next_question:
                return False
            answer = Answer(
                participant=participant.joined.participant,
                question=question,
                choice=choice,
                milliseconds=milliseconds,
            )
            self._append(answer)
            return True

    def _append(self, line: Joined | Answer) -> None:
        """Add a line to the file, and then to what is known."""
        if self._file is not None and _identity(self.path) != self._file:
            raise InvalidInputError(
                f"{os.fspath(self.path)!r} was moved, deleted or replaced since it was opened: put it back, or start "
                "again"
            )
        append_line(self.path, described(line))
        self._file = _identity(self.path)
        self._take(line)

    def _take(self, line: Joined | Answer) -> None:
        """ValueError where a line does not go with the study, or with those before."""
        if isinstance(line, Joined):
            if line.study != self._study.digest:
                raise ValueError("it is about another study")
            if line.participant in self._participants:
                raise ValueError(f"participant {line.participant} joins twice")
            bundle = self._study.bundle
            if missing := [question.task for question in line.questions if question.task >= len(bundle.tasks)]:
                raise ValueError(f"there is no task {missing[0]}")
            self._participants[line.participant] = Participant(line)
            return
        if line.participant not in self._participants:
            raise ValueError(f"participant {line.participant} has not joined")
        participant = self._participants[line.participant]
        if line.question >= len(participant.joined.questions):
            raise ValueError(f"participant {line.participant} has no question {line.question}")
        if line.question > len(participant.answers):
            raise ValueError(f"question {line.question} of participant {line.participant} was not to be answered yet")
        # The last one counts: one that could not be synced was not acknowledged, but may be there.
        participant.answers[line.question] = line


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is, whatever it is called; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def forget(bundle: str | os.PathLike[str], code: str, answers: str | os.PathLike[str] | None = None) -> None:
    """Delete a participant, and all that he or she answered.

    Parameters
    ----------
    bundle
        The folder that :func:`spade_fast.study.build` wrote.
    code
        The participant's.
    answers
        The file of the answers. Default: ``answers.jsonl`` in the bundle.

    Raises
    ------
    InvalidInputError
        If bundle or answers cannot be used, nobody has the code, or a server writes to the answers.
    """
    if not isinstance(code, str):
        raise InvalidInputError(f"code is {code!r}: pass the participant's eight letters and digits")
    study = open_bundle(bundle)
    file = answers_file(study, answers)
    with held_file(file):
        Journal(file, study).forget(code)


def answers_file(study: OpenBundle, answers: str | os.PathLike[str] | None) -> Path:
    """Where the answers to a study are: in its own folder, unless another file is named.

    Raises
    ------
    InvalidInputError
        If what is named is no name.
    """
    if answers is None:
        return study.path / ANSWERS
    if not isinstance(answers, (str, os.PathLike)) or not os.fspath(answers):
        raise InvalidInputError(f"answers is {answers!r}: pass the name of a file")
    return Path(answers)
