"""A folder of traces and maps, a file for each image: what :func:`spade_fast.run` writes, and how to read it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spade_fast.errors import InvalidInputError, require
from spade_fast.files import read_header, read_tensors, tensor_bytes, write_folder, write_whole
from spade_fast.imagesets import IMAGES, MANIFEST, ListedImage
from spade_fast.readonly import ReadOnlyMappings
from spade_fast.traces import PackedMask, Trace

INDEX = "index.parquet"
_KEY, _WHAT, _WRITER = "spade_fast_image", "an image of a store", "spade_fast.run"
_FORMAT = 1
_SUFFIX = ".safetensors"
_MOST_CHARACTERS = 60
# What `tempfile` ends the names of folders in.
_TEMPORARY = re.compile(r"\.[a-z0-9_]{8}")
# Columns of the index that are text, beside labels.
_TEXTS = ("name", "file", "refused", "image_sha256", "target_name", "dense_answer_name", "spade_answer_name")
# Parts of the names of tensors in a file, before a layer's or a method's.
_TRACE, _DENSE, _SPADE = "trace:", "dense:", "spade:"


@dataclass(frozen=True, eq=False)
class StoredImage(ReadOnlyMappings):
    """What a store holds of an image.

    Attributes
    ----------
    record
        What is known of it beside trace and maps, plain JSON values: "target" and "target_name", the class that was
        explained; "probability" of that class and "answers" by both networks; "metrics" by name, network and method;
        "labels" of the list that it came from; "image_sha256" of its file; "environment", what it was made with.
    trace
        What SPADE left of the network.
    dense, spade
        Maps by method, float32 [h, w], at least 0: see :func:`spade_fast.attribute`.
    """

    record: Mapping[str, Any]
    trace: Trace
    dense: Mapping[str, Tensor]
    spade: Mapping[str, Tensor]


class Store(Mapping[str, StoredImage]):
    """The images of a store by name, read as they are asked for.

    A view of the folder as it was when it was first looked at, finished or not; reading takes no lock. Files whose
    record is damaged are left out, with a warning: see :attr:`damaged`.

    Parameters
    ----------
    path
        The folder that :func:`spade_fast.run` wrote.

    Raises
    ------
    InvalidInputError
        If it is no store. Also from reading an image that was refused, with the reason, or whose file is damaged; the
        message names the file. KeyError for one that is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise InvalidInputError(f"{path!r} is no store: pass the folder that run wrote")
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self._settings_sha256 = _settings_digest(self.settings)

    @property
    def settings(self) -> Mapping[str, Any]:
        """How everything in the store was made: plain JSON values."""
        found: Mapping[str, Any] = self.manifest["settings"]
        return found

    @cached_property
    def records(self) -> Mapping[str, Mapping[str, Any]]:
        """Of all images, those that were refused too, by name in order: see :class:`spade_fast.store.StoredImage`."""
        return self._scanned[0]

    @property
    def damaged(self) -> Mapping[str, str]:
        """The files whose record cannot be read, or that are another image's, by their own names: why.

        A run makes those of the images in its list anew.
        """
        return self._scanned[1]

    @cached_property
    def _scanned(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        found: dict[str, dict[str, Any]] = {}
        damaged: dict[str, str] = {}
        for file in sorted((self.path / IMAGES).glob(f"*{_SUFFIX}")):
            try:
                record = _read_record(file)
                if record["settings_sha256"] != self._settings_sha256:
                    raise InvalidInputError(f"{os.fspath(file)!r} was made with other settings than the store's")
            except InvalidInputError as error:
                damaged[file.name] = str(error)
            else:
                found[record["name"]] = record
        if damaged:
            count = "" if len(damaged) == 1 else f" (one of {len(damaged)} such files)"
            warnings.warn(
                f"{next(iter(damaged.values()))}: left out{count}; run again on its image, or delete it", stacklevel=2
            )
        return {name: found[name] for name in sorted(found)}, damaged

    @cached_property
    def refused(self) -> Mapping[str, str]:
        """The images that could not be used, by name: why."""
        return {name: each["refused"] for name, each in self.records.items() if "refused" in each}

    def file_of(self, name: str) -> Path:
        """The file of an image."""
        return self.path / IMAGES / file_name(name)

    def get(self, name: str, default: Any = None) -> Any:
        """An image, or the default for one that has no trace."""
        return self[name] if name in self else default  # noqa: SIM401

    def __getitem__(self, name: str) -> StoredImage:
        file = self.traced_file(name)
        with _advised():
            return read_image(file)

    def masks(self, name: str) -> tuple[dict[str, PackedMask], Mapping[str, str]]:
        """The masks of an image's trace, and the layers left dense: all that comparing traces needs, and sooner."""
        file = self.traced_file(name)
        with _advised(), read_tensors(file, _KEY, _WHAT, _WRITER) as (header, tensors):
            held = {key.removeprefix(_TRACE): tensor for key, tensor in tensors.items() if key.startswith(_TRACE)}
            return Trace.masks_from_tensors(header["trace"], held), dict(header["trace"]["dense"])

    def traced_file(self, name: str) -> Path:
        """The file of an image that has a trace; refusals as of reading it."""
        if not isinstance(name, str):
            raise KeyError(name)
        file = self.file_of(name)
        if name in self.refused:
            raise InvalidInputError(f"{name!r} has no trace: {self.refused[name]}")
        if file.name in self.damaged:
            with _advised():
                raise InvalidInputError(self.damaged[file.name])
        if name not in self.records:
            raise KeyError(name)
        return file

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.records if name not in self.refused)

    def __len__(self) -> int:
        return len(self.records) - len(self.refused)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.records and name not in self.refused

    def rows(self) -> list[dict[str, Any]]:
        """The index: a row for each image, refused ones too, in the order of their names."""
        return [_row(name, record) for name, record in self.records.items()]


@contextlib.contextmanager
def _advised() -> Iterator[None]:
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{error}; run again on its image, or delete it") from error


def _read_record(file: Path) -> dict[str, Any]:
    with read_header(file, _KEY, _WHAT, _WRITER) as record:
        _check_record(record)
    if file_name(record["name"]) != file.name:
        raise InvalidInputError(f"{os.fspath(file)!r} is another image's file, renamed")
    return {key: value for key, value in record.items() if key != "trace"}


def _check_record(record: Mapping[str, Any]) -> None:
    """LookupError, TypeError, AttributeError or ValueError where a record is not what readers of stores rest on."""
    needed = ("name", "refused") if "refused" in record else ("name", "target", "sparsity", "dense_answer")
    if not isinstance(record["settings_sha256"], str):
        raise TypeError(f"its settings_sha256 is {record['settings_sha256']!r}")
    for column, value in _row(record["name"], record).items():
        if value is None and column not in needed:
            continue
        kind = _kind(column)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"its {column} is {value!r}")
        if isinstance(value, int) and not 0 <= value < 2**63:
            raise ValueError(f"its {column} is {value}")
        if isinstance(value, str):
            value.encode()
    if "refused" not in record and (not isinstance(record["trace"], dict) or "target_name" not in record):
        raise TypeError("it has no trace, or no target_name")


def read_image(file: Path) -> StoredImage:
    """An image's file, whole; InvalidInputError if it is damaged, or says that the image was refused."""
    with read_tensors(file, _KEY, _WHAT, _WRITER) as (header, tensors):
        held: dict[str, dict[str, Tensor]] = {_TRACE: {}, _DENSE: {}, _SPADE: {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(":")
            held[f"{part}:"][rest] = tensor
        trace = Trace.from_tensors(header.pop("trace"), held[_TRACE])
        return StoredImage(header, trace, held[_DENSE], held[_SPADE])


def image_bytes(
    record: Mapping[str, Any], trace: Trace, dense: Mapping[str, Tensor], spade: Mapping[str, Tensor]
) -> bytes:
    """The content of an image's file."""
    header, tensors = trace.to_tensors()
    held = {f"{_TRACE}{name}": tensor for name, tensor in tensors.items()}
    held |= {f"{_DENSE}{method}": heat.clone(memory_format=torch.contiguous_format) for method, heat in dense.items()}
    held |= {f"{_SPADE}{method}": heat.clone(memory_format=torch.contiguous_format) for method, heat in spade.items()}
    return tensor_bytes(_KEY, {**record, "trace": header}, held)


def refusal_bytes(record: Mapping[str, Any], reason: str) -> bytes:
    """The content of the file of an image that cannot be used."""
    return tensor_bytes(_KEY, {**record, "refused": reason}, {})


def file_name(name: str) -> str:
    """The name of an image's file: to be recognised by, and no two the same, whatever characters the image's has."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-_MOST_CHARACTERS:].lstrip(".")
    return f"{readable}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}{_SUFFIX}"


def check_folder(path: Path) -> None:
    """Refuse a folder that is no store and holds something else."""
    if not os.path.isdir(path) or (path / MANIFEST).exists():
        return
    if other := next((each.name for each in path.iterdir() if not each.name.startswith(".")), None):
        raise InvalidInputError(f"{os.fspath(path)!r} is no store, but holds {other!r}: choose a new folder")


class StoreWriter:
    """Writes to a store, which the caller holds (:func:`spade_fast.files.held_folder`).

    Parameters
    ----------
    path
        A folder that is there: empty, or a store of the same settings.
    settings
        How all images are made: plain JSON values.
    environment
        What they are made with, as the first writer has it; each image's file says it for itself.

    Raises
    ------
    InvalidInputError
        If the folder holds something else, or a store of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        self._path = path
        manifest = json.loads(json.dumps({"format": _FORMAT, "settings": settings, "environment": environment}))
        check_folder(path)
        if (path / MANIFEST).exists():
            known = _read_manifest(path)
            _check_same(path, known["settings"], manifest["settings"])
            _tell_other_environment(path, known["environment"], manifest["environment"])
        else:
            write_folder(path, {MANIFEST: (json.dumps(manifest, indent=2) + "\n").encode()})
        self._settings_sha256 = _settings_digest(manifest["settings"])

    def clear(self) -> None:
        """Remove what writers that were killed left behind."""
        leftovers = (f".{MANIFEST}.*", f".{INDEX}.*", f"{IMAGES}/.*{_SUFFIX}.*")  # of `write_whole`
        for leftover in chain.from_iterable(map(self._path.glob, leftovers)):
            if leftover.is_dir() and _TEMPORARY.fullmatch(leftover.suffix):
                shutil.rmtree(leftover, ignore_errors=True)

    def has(self, listed: ListedImage, image_sha256: str) -> bool:
        """Whether an image's file is there, is whole, and is about this image and question.

        Raises
        ------
        InvalidInputError
            If there is one that is damaged, or about another image or question; the message says why it must be made
            anew.
        """
        file = self._path / IMAGES / file_name(listed.name)
        if not file.exists():
            return False
        with read_tensors(file, _KEY, _WHAT, _WRITER) as (header, _):
            if "refused" in header:  # perhaps it can be used now
                return False
        asked = {**self.known(listed), "image_sha256": image_sha256}
        if different := next((key for key, value in asked.items() if header.get(key) != value), None):
            raise InvalidInputError(f"it had another {different} when {os.fspath(file)!r} was written")
        return True

    def known(self, listed: ListedImage) -> dict[str, Any]:
        """What an image's record begins with: what the list asks, and with which settings it is answered."""
        asked = {"name": listed.name, "asked_target": listed.target, "labels": dict(listed.labels)}
        return {**asked, "settings_sha256": self._settings_sha256}

    def refuse(self, listed: ListedImage, content: bytes, image_sha256: str | None = None) -> None:
        """Write the file of an image that cannot be used now, unless there is one with a trace, of then.

        That one stays, as the image may come back; but not where it is of the same `image_sha256`, and so answers
        another question.
        """
        file = self._path / IMAGES / file_name(listed.name)
        with contextlib.suppress(InvalidInputError), read_tensors(file, _KEY, _WHAT, _WRITER) as (header, _):
            if "refused" not in header and header["image_sha256"] != image_sha256:
                return
        self.put(listed, content)

    def put(self, listed: ListedImage, content: bytes) -> None:
        """Write an image's file, whole or not at all."""
        write_folder(self._path / IMAGES, {file_name(listed.name): content})

    def write_index(self) -> Store:
        """Write the index of all files that are there."""
        store = Store(self._path)
        write_whole(self._path / INDEX, _parquet(store.rows()))
        return store


def _settings_digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not os.path.isfile(file):  # which no name makes fail
        raise InvalidInputError(f"{os.fspath(path)!r} is no store: it has no {MANIFEST}; pass a folder that run wrote")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        if found.get("format") != _FORMAT:
            raise ValueError(f"format {found.get('format')!r}, this version reads {_FORMAT}")
        if not isinstance(found.get("settings"), dict) or not isinstance(found.get("environment"), dict):
            raise ValueError("its settings or environment are no object")
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"cannot read {os.fspath(file)!r} ({error}): restore it from a store of the same settings, or choose "
            "another folder"
        ) from error
    return found


def _check_same(path: Path, known: Mapping[str, Any], wanted: Mapping[str, Any], of: str = "") -> None:
    for key in {**known, **wanted}:
        here, there = known.get(key), wanted.get(key)
        if here != there and isinstance(here, dict) and isinstance(there, dict):
            _check_same(path, here, there, f"{of}{key}.")
        elif here != there:
            raise InvalidInputError(
                f"{os.fspath(path)!r} is a store of {of}{key} {here!r}, not {there!r}: choose another folder, or the "
                "same settings"
            )


def _tell_other_environment(path: Path, known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if different := [key for key in {**known, **now} if known.get(key) != now.get(key)]:
        told = ", ".join(f"{key} {known.get(key)!r}, now {now.get(key)!r}" for key in different)
        warnings.warn(
            f"{os.fspath(path)!r} was begun with {told}: new bits may differ; each image's record tells its own",
            stacklevel=4,
        )


def _row(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "file": f"{IMAGES}/{file_name(name)}"}
    row |= {key: record.get(key) for key in ("refused", "image_sha256", "target", "target_name", "sparsity")}
    for network in ("dense", "spade"):
        first = {"index": None, "name": None} if "refused" in record else record["answers"][network][0]
        row |= {
            f"{network}_answer": first["index"],
            f"{network}_answer_name": first["name"],
            f"{network}_probability": record.get("probability", {}).get(network),
        }
    for metric, by_network in record.get("metrics", {}).items():
        for network, by_method in by_network.items():
            row |= {f"{metric}_{network}_{method}": value for method, value in by_method.items()}
    return row | {f"label_{key}": value for key, value in record["labels"].items()}


def _kind(column: str) -> type:
    """Of the values of a column of the index, beside None."""
    if column in ("target", "dense_answer", "spade_answer"):
        return int
    return str if column.startswith("label_") or column in _TEXTS else float


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    arrow, parquet = require("pyarrow", "run"), require("pyarrow.parquet", "run")
    kinds = {int: arrow.int64(), float: arrow.float64(), str: arrow.string()}
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: arrow.array([row.get(name) for row in rows], type=kinds[_kind(name)]) for name in names}
    stream = io.BytesIO()
    parquet.write_table(arrow.table(columns), stream)
    return stream.getvalue()
