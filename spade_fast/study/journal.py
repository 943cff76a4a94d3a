"""What participants answered: a file to which a line is added for each, on the disk before it is acknowledged."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from spade_fast.errors import InvalidInputError
from spade_fast.files import append_line, read_lines
from spade_fast.study.bundle import Count, OpenBundle, Record, described, first_fault
from spade_fast.study.schedule import Question, questions_of

#: The default name of the file, in the folder of the bundle.
ANSWERS = "answers.jsonl"
#: What a participant takes: the patch on that side, or neither.
Choice: TypeAlias = Literal["left", "right", "undecided"]

# Without letters and digits that are taken for each other.
_LETTERS = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"
_CODE_LENGTH = 8
_LONGEST = 7 * 24 * 3600 * 1000
Milliseconds: TypeAlias = Annotated[int, Field(ge=0, le=_LONGEST)]


class Joined(Record):
    """A participant, and all that he or she will be asked.

    Attributes
    ----------
    participant
        A random code: all that is known of a person.
    study
        SHA-256 of the study's ``study.json``.
    number
        Participants before this one.
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
        From the question's being shown until it was answered, as the participant's browser measured it; None where
        it did not.
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
        A file of lines of JSON: :class:`Joined` for each participant, and :class:`Answer` for each answer. It is made
        when the first participant comes. A last line that was cut short was never acknowledged, and is left out.
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
        for number, line in enumerate(read_lines(self.path), 1):
            try:
                self._take(_LINE.validate_json(line))
            except ValueError as error:  # ValidationError among them
                reason = first_fault(error) if isinstance(error, ValidationError) else str(error)
                raise InvalidInputError(
                    f"line {number} of {os.fspath(path)!r} is no answer to this study ({reason}): choose another file"
                ) from error

    @property
    def participants(self) -> Mapping[str, Participant]:
        """All participants, by their codes, in the order in which they came."""
        return self._participants

    def find(self, code: str) -> Participant | None:
        """The participant of a code, however it is spelt; None where there is none."""
        return self._participants.get("".join(each for each in code.upper() if each.isalnum()))

    def join(self, simulated: str | None = None) -> Participant:
        """Take in a participant, who is on the disk when this returns.

        Raises
        ------
        InvalidInputError
            If the file cannot be written; nobody has joined then.
        """
        with self._lock:
            code = "".join(secrets.choice(_LETTERS) for _ in range(_CODE_LENGTH))
            while code in self._participants:
                code = "".join(secrets.choice(_LETTERS) for _ in range(_CODE_LENGTH))
            number = len(self._participants)
            joined = Joined(
                participant=code,
                study=self._study.digest,
                number=number,
                simulated=simulated,
                questions=questions_of(self._study.bundle, number),
            )
            append_line(self.path, described(joined))
            self._take(joined)
            return self._participants[code]

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
            append_line(self.path, described(answer))
            self._take(answer)
            return True

    def _take(self, line: Joined | Answer) -> None:
        """ValueError where a line does not go with the study, or with those before."""
        if isinstance(line, Joined):
            if line.study != self._study.digest:
                raise ValueError("it is about another study")
            if line.participant in self._participants:
                raise ValueError(f"participant {line.participant} joins twice")
            bundle = self._study.bundle
            for question in line.questions:
                if question.index >= len(bundle.tasks if question.kind == "task" else bundle.checks):
                    raise ValueError(f"there is no {question.kind} {question.index}")
            self._participants[line.participant] = Participant(line)
            return
        if line.participant not in self._participants:
            raise ValueError(f"participant {line.participant} has not joined")
        participant = self._participants[line.participant]
        if line.question >= len(participant.joined.questions):
            raise ValueError(f"participant {line.participant} has no question {line.question}")
        # The last one counts: one that could not be synced was not acknowledged, but may be there.
        participant.answers[line.question] = line
