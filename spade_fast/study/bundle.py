"""What a study asks: a folder with ``study.json`` and the pictures that it names by their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spade_fast.errors import InvalidInputError

#: The two networks whose visualizations are shown.
Arm: TypeAlias = Literal["dense", "spade"]
ARMS: tuple[Arm, ...] = ("dense", "spade")

STUDY = "study.json"
_MEDIA = "media"
_MOST_BYTES = 32 * 2**20  # of study.json, and of a picture
_MEDIUM = re.compile(r"[0-9a-f]{64}\.png")

#: The name of a picture: the SHA-256 of its content. It tells nobody what the picture is, and names no other file.
Medium: TypeAlias = Annotated[str, Field(pattern=f"^{_MEDIUM.pattern}$")]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Count: TypeAlias = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """A part of a file, of exactly these fields, each of its own type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Patch(Record):
    """A square of an image.

    Attributes
    ----------
    medium
        Its picture.
    left, top, width, height
        Where it is, as shares of the image's width and height, 0..1.
    relevance
        Mean of the Score-CAM map within it, as a share of the map's maximum, 0..1.
    """

    medium: Medium
    left: Share
    top: Share
    width: Share
    height: Share
    relevance: Share


class Task(Record):
    """An image that the study asks about.

    Attributes
    ----------
    name
        The image's.
    photo
        What the network sees of it.
    target, target_name, probability
        The dense network's answer, which everything is about, and its softmax.
    high, low
        The patch that Score-CAM ranks highest for that answer, and one that it ranks low.
    dense, spade
        What the neuron of that answer wants to see, in the dense network and in the image's trace.
    sparsity
        Of the trace: the share of all weights in pruned layers that are gone.
    trace_agrees
        Whether the trace gives that answer itself.
    """

    name: str
    photo: Medium
    target: Count
    target_name: str
    probability: Share
    high: Patch
    low: Patch
    dense: Medium
    spade: Medium
    sparsity: Share
    trace_agrees: bool

    def media(self) -> tuple[str, ...]:
        """The names of all pictures."""
        return self.photo, self.high.medium, self.low.medium, self.dense, self.spade


class Bundle(Record):
    """All that a study asks, and how it was made.

    Attributes
    ----------
    format
        Of the file.
    tasks
        Each participant is asked about all of them.
    checks
        How many questions each is asked beside that anybody can answer who looks.
    seed
        Of what each participant is shown.
    settings, versions
        How the tasks were made, and with what: plain JSON values.
    refused
        Images that could not be used, by name: why.
    """

    format: Literal[1]
    tasks: Annotated[tuple[Task, ...], Field(min_length=1, max_length=10_000, strict=False)]
    checks: Count
    seed: Count
    settings: dict[str, Any]
    versions: dict[str, str]
    refused: dict[str, str]

    def media(self) -> Iterator[str]:
        """The names of all pictures."""
        for task in self.tasks:
            yield from task.media()

    def content(self) -> bytes:
        """What ``study.json`` holds."""
        return (self.model_dump_json(indent=2) + "\n").encode()


@dataclass(frozen=True)
class OpenBundle:
    """A bundle in a folder, whose pictures were all there, and what they should be, when it was opened.

    Attributes
    ----------
    path
        The folder.
    bundle
        What ``study.json`` says.
    digest
        SHA-256 of ``study.json``: which study answers are to.
    """

    path: Path
    bundle: Bundle
    digest: str

    @cached_property
    def _media(self) -> frozenset[str]:
        return frozenset(self.bundle.media())

    def picture(self, medium: str) -> bytes:
        """The content of a picture.

        Raises
        ------
        InvalidInputError
            If the bundle has no such picture, or it has been changed.
        """
        if medium not in self._media:
            raise InvalidInputError(f"{os.fspath(self.path)!r} has no picture {medium!r}")
        return read_picture(self.path, medium)


def picture_file(folder: Path, medium: str) -> Path:
    """The file of a picture."""
    return folder / _MEDIA / medium


def medium_of(png: bytes) -> str:
    """The name of a picture of that content."""
    return f"{hashlib.sha256(png).hexdigest()}.png"


def open_bundle(path: str | os.PathLike[str]) -> OpenBundle:
    """Read a bundle, and see that it is whole.

    Parameters
    ----------
    path
        The folder that :func:`spade_fast.study.build` wrote.

    Raises
    ------
    InvalidInputError
        If it is no such folder, or a file of it is missing or damaged; the message says which.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidInputError(f"{path!r} is no bundle: pass the folder that study build wrote")
    folder = Path(path)
    file = folder / STUDY
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no regular file")
        if not file.exists() and folder.is_dir():
            raise ValueError("the folder has no such file: was the building of the study cut short?")
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        content = file.read_bytes()
        bundle = Bundle.model_validate_json(content)
        if bundle.checks > len(bundle.tasks):
            raise ValueError(f"it has {bundle.checks} checks, and {len(bundle.tasks)} tasks to check with")
        names = [task.name for task in bundle.tasks]
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            raise ValueError(f"two tasks are called {twice!r}")
    except (OSError, ValueError) as error:  # ValidationError is a ValueError
        raise InvalidInputError(
            f"cannot read {os.fspath(file)!r} as a study ({_reason(error)}): pass the folder that study build wrote, "
            "or build it again"
        ) from error
    for medium in dict.fromkeys(bundle.media()):
        read_picture(folder, medium)
    return OpenBundle(folder, bundle, hashlib.sha256(content).hexdigest())


def read_picture(folder: Path, medium: str) -> bytes:
    """The content of a picture; InvalidInputError if it is missing or is not what its name says."""
    file = picture_file(folder, medium)
    try:
        if not file.is_file():
            raise ValueError("it is missing, or no regular file")
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        content = file.read_bytes()
        if medium_of(content) != medium:
            raise ValueError("it has been changed")
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"cannot read the picture {os.fspath(file)!r} of a study ({_reason(error)}): build it again"
        ) from error
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return first_fault(error)
    return str(getattr(error, "strerror", None) or error)


def first_fault(error: ValidationError) -> str:
    """What pydantic finds wrong first, and where."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, fault["loc"]))
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])


def described(record: Record) -> str:
    """A record as a line of JSON."""
    return json.dumps(record.model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
