"""Folders and lists of photographs, and the classes that their names tell."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spade_fast.errors import InvalidInputError, first_line, quoted, require

# No longer than that: names of phones' photographs begin with a date.
_INDEX = re.compile(r"(\d{1,5})_")
#: In a store: the file by which it is known, and the folder of its images' files.
MANIFEST, IMAGES = "manifest.json", "images"
_MANIFESTS = (".csv", ".parquet")
_EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def image_files(folder: str | os.PathLike[str], *, classes: int | None = None) -> list[tuple[Path, int | None]]:
    """The photographs below a folder, in the order of their names, with the class index of each.

    A file's name may begin with it, ``0281_tabby.jpg``. Otherwise, if all files are in subfolders, the index is that of
    the subfolder among those in order, as torchvision's ``ImageFolder`` has it; if `classes` are given, only where
    there are as many subfolders. Otherwise it is None.

    Hidden files are left out, and so are stores (:class:`spade_fast.Store`), with whatever is in them.

    Raises
    ------
    InvalidInputError
        If there is no such folder, or no file in it that by its extension is an image.
    """
    root = Path(folder)
    if not os.path.isdir(root):  # which no name makes fail
        raise InvalidInputError(f"{os.fspath(folder)!r} is no folder: pass one with photographs")
    stores = {each.parent for each in root.rglob(MANIFEST) if _is_of_a_store(each)}
    found = sorted(
        each
        for each in root.rglob("*")
        if each.suffix.lower() in _EXTENSIONS
        and not any(part.startswith(".") for part in each.relative_to(root).parts)
        and stores.isdisjoint(each.parents)
        and (each.is_file() or (each.is_symlink() and not each.exists()))  # which is told to be unreadable
    )
    if not found:
        raise InvalidInputError(f"no file in {os.fspath(folder)!r} has the extension of an image, such as .jpg or .png")
    names = [_INDEX.match(each.name) for each in found]
    if all(names):
        return [(each, int(name[1])) for each, name in zip(found, names, strict=True) if name]
    names_of_classes = sorted({each.relative_to(root).parts[0] for each in found})
    if classes in (None, len(names_of_classes)) and all(len(each.relative_to(root).parts) > 1 for each in found):
        return [(each, names_of_classes.index(each.relative_to(root).parts[0])) for each in found]
    return [(each, None) for each in found]


def _is_of_a_store(manifest: Path) -> bool:
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"format", "settings", "environment"} <= found.keys()


def named_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The photographs below a folder by their paths in it, with slashes: see :func:`image_files`."""
    return {path.relative_to(folder).as_posix(): path for path, _ in image_files(folder)}


@dataclass(frozen=True)
class ListedImage:
    """An image file of a list.

    Attributes
    ----------
    name
        What it is called: no two of a list are called the same.
    path
        The file, which need not exist.
    target
        The class to be explained; None for the network's answer.
    labels
        What else the list says of it, by column.
    """

    name: str
    path: Path
    target: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def listed_images(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
    *,
    root: str | os.PathLike[str] | None = None,
) -> list[ListedImage]:
    """The images that a folder, a manifest or a list names.

    Parameters
    ----------
    images
        A folder, whose images are called by their paths in it, those of subfolders with the label "folder". Or a
        manifest, a .csv or .parquet file, with a row for each image: the column "image" has its path, relative to
        `root`; "name", if there is such a column, what it is called, otherwise its path; "target" the index of the
        class to be explained, or nothing; all others are labels. Or paths; or paths by names.
    root
        For a manifest: the folder that its images are in. Default: the manifest's own.

    Raises
    ------
    InvalidInputError
        If there are no images, two have one name, or a manifest cannot be read, has no such column, or names a file
        outside of `root`; the message says in which row.
    """
    if isinstance(images, Mapping):
        found = [ListedImage(_text(name), _path(path, f"images[{name!r}]")) for name, path in images.items()]
    elif isinstance(images, (str, os.PathLike)):
        path = Path(images)
        if not os.fspath(images):
            raise InvalidInputError("images is empty: pass a folder, a manifest, or paths")
        if path.suffix.lower() in _MANIFESTS and not os.path.isdir(path):
            return _read_manifest(path, path.parent if root is None else Path(root))
        if os.path.isfile(path):
            raise InvalidInputError(
                f"{os.fspath(path)!r} is neither a folder of images nor a manifest: pass a .csv or .parquet file with "
                "a column 'image'"
            )
        found = [
            ListedImage(name, file, labels={"folder": folder} if (folder := name.rpartition("/")[0]) else {})
            for name, file in ((_text(name), file) for name, file in named_files(path).items())
        ]
    elif isinstance(images, Sequence) and not isinstance(images, bytes):
        paths = [_path(path, f"images[{place}]") for place, path in enumerate(images)]
        found = [ListedImage(_text(os.fspath(path)), path) for path in paths]
    else:
        raise InvalidInputError(f"images is a {type(images).__name__}: pass a folder, a manifest, or paths")
    if root is not None:
        raise InvalidInputError("root is for a manifest, a .csv or .parquet file: leave it out")
    if not found:
        raise InvalidInputError("no image is named: pass some")
    names = [each.name for each in found]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise InvalidInputError(f"image {twice!r} is named twice: leave one out")
    return found


def _text(name: object) -> str:
    """An image's name as text that can be written: what is none in it is shown as such."""
    if not isinstance(name, str) or not name:
        raise InvalidInputError(f"{name!r} is no name of an image: pass text")
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace").decode()


def _path(path: object, where: str) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise InvalidInputError(f"{where} is a {type(path).__name__}: pass the path of an image file")
    return Path(path)


def _read_manifest(path: Path, root: Path) -> list[ListedImage]:
    if not os.path.isdir(root):
        raise InvalidInputError(f"{os.fspath(root)!r} is no folder: pass as root the one that the images are in")
    where = f"manifest {os.fspath(path)!r}"
    rows = _csv_rows(path, where) if path.suffix.lower() == ".csv" else _parquet_rows(path, where)
    inside = root.resolve()
    found: dict[str, ListedImage] = {}
    for number, row in rows:
        try:
            listed = _listed(row, root, inside)
            if listed.name in found:
                raise InvalidInputError(
                    f"{listed.name!r} is named twice: leave one out, or give each a name in a column 'name'"
                )
        except InvalidInputError as error:
            raise InvalidInputError(f"row {number} of {where}: {error}") from error
        found[listed.name] = listed
    if not found:
        raise InvalidInputError(f"{where} names no image: add a row for each, below the names of the columns")
    return list(found.values())


def _listed(row: Mapping[str, str], root: Path, inside: Path) -> ListedImage:
    path, target = row["image"], row.get("target", "")
    if not path or "\0" in path:
        raise InvalidInputError(f"{quoted(path)} is no path of an image")
    # As written, and as links lead: a list from elsewhere may not name just any file.
    leads_out = not Path(os.path.realpath(root / path)).is_relative_to(inside)  # `resolve` fails at links in a circle
    if leads_out or ".." in Path(path).parts or Path(path).is_absolute():
        raise InvalidInputError(
            f"{quoted(path)} is outside of {os.fspath(root)!r}: name it relative to that folder, or pass another root"
        )
    labels = {key: value for key, value in row.items() if key not in ("image", "name", "target")}
    return ListedImage(row.get("name") or path, root / path, _index(target) if target else None, labels)


def _index(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,9})(\.0*)?", text)  # columns with gaps are often written as 281.0
    if not found:
        raise InvalidInputError(f"target {quoted(text)} is no index of a class: leave it empty where there is none")
    return int(found[1])


def _csv_rows(path: Path, where: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows with their numbers, where a row is a line or, with line breaks in it, several."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True, restval=None, restkey=None, skipinitialspace=True)
            rows.fieldnames = columns = _checked_columns([name.strip() for name in rows.fieldnames or ()], where)
            for number, row in enumerate(rows, start=1):
                if None in row or None in row.values():
                    raise InvalidInputError(
                        f"row {number} of {where} has not {len(columns)} values, as many as there are columns"
                    )
                yield number, {name: value.strip() for name, value in row.items()}
    except InvalidInputError:
        raise
    except OSError as error:
        raise InvalidInputError(f"cannot read {where} ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"cannot read {where} ({error}): save it in UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise InvalidInputError(f"cannot read {where}, at line {rows.line_num} ({error}): mend it there") from error


def _parquet_rows(path: Path, where: str) -> Iterator[tuple[int, dict[str, str]]]:
    arrow, parquet = require("pyarrow", "run"), require("pyarrow.parquet", "run")
    try:
        with parquet.ParquetFile(path) as file:
            _checked_columns(list(file.schema_arrow.names), where)
            table = file.read()
    except InvalidInputError:
        raise
    except (OSError, ValueError) as error:  # the package's own errors are ValueErrors
        raise InvalidInputError(f"cannot read {where} as Parquet ({first_line(error)})") from error
    columns = {name: _as_text(arrow, name, table[name], where) for name in table.column_names}
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        yield number, {name: value or "" for name, value in zip(columns, values, strict=True)}


def _as_text(arrow: Any, name: str, column: Any, where: str) -> list[str | None]:
    """A column of text, numbers or dates as text."""
    kind = column.type.value_type if arrow.types.is_dictionary(column.type) else column.type
    is_text = arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_null(kind)
    if not is_text and (name in ("image", "name") or "binary" in str(kind)):
        raise InvalidInputError(f"column {name!r} of {where} is of type {kind}: make it text")
    try:
        found: list[str | None] = column.cast(arrow.string()).to_pylist()
    except (ValueError, NotImplementedError, ArithmeticError) as error:
        raise InvalidInputError(
            f"column {name!r} of {where}, of type {kind}, cannot be read as text ({first_line(error)}): make it text"
        ) from error
    return [None if each == "nan" else each for each in found] if name == "target" else found


def _checked_columns(columns: list[str], where: str) -> list[str]:
    if "image" not in columns:
        known = ", ".join(map(quoted, columns)) or "none at all"
        told = "; separate columns by commas" if len(columns) == 1 and re.search("[;\t]", columns[0]) else ""
        told = "; write it in small letters" if "image" in (name.lower() for name in columns) else told
        raise InvalidInputError(f"{where} has no column 'image', but {known}{told}")
    if "" in columns:
        raise InvalidInputError(f"column {columns.index('') + 1} of {where} has no name: give it one")
    if len(set(columns)) < len(columns):
        raise InvalidInputError(f"two columns of {where} have one name: rename one")
    return columns
