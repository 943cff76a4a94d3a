"""Folders and lists of photographs, and the classes that their names tell."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spade_fast.errors import InvalidInputError, first_line, quoted, require

# No longer than that: names of phones' photographs begin with a date.
_INDEX = re.compile(r"(\d{1,5})_")
#: By what a store's folder is known: a file and a folder.
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
    if not root.is_dir():
        raise InvalidInputError(f"{os.fspath(folder)!r} is no folder: pass one with photographs")
    stores = {each.parent for each in root.rglob(MANIFEST) if (each.parent / IMAGES).is_dir()}
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
        if path.suffix.lower() in _MANIFESTS and not path.is_dir():
            return _read_manifest(path, path.parent if root is None else Path(root))
        if path.is_file():
            raise InvalidInputError(
                f"{os.fspath(path)!r} is neither a folder of images nor a manifest: pass a .csv or .parquet file with "
                "a column 'image'"
            )
        found = [
            ListedImage(name, file, labels={"folder": folder} if (folder := name.rpartition("/")[0]) else {})
            for name, file in ((_text(name), file) for name, file in named_files(path).items())
        ]
    elif isinstance(images, Sequence):
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
    if not root.is_dir():
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
    if not (root / path).resolve().is_relative_to(inside) or ".." in Path(path).parts or Path(path).is_absolute():
        raise InvalidInputError(
            f"{quoted(path)} is outside of {os.fspath(root)!r}: name it relative to that folder, or pass another root"
        )
    labels = {key: value for key, value in row.items() if key not in ("image", "name", "target")}
    return ListedImage(row.get("name") or path, root / path, _index(target) if target else None, labels)


def _index(text: str) -> int:
    try:
        value = float(text)  # columns with gaps are often written as 281.0
    except ValueError:
        value = -1.0
    if not (value.is_integer() and 0 <= value < 2**31):
        raise InvalidInputError(f"target {quoted(text)} is no index of a class")
    return int(value)


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
                yield number, row
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"cannot read {where} ({error}): pass CSV in UTF-8, with the columns' names") from error


def _parquet_rows(path: Path, where: str) -> Iterator[tuple[int, dict[str, str]]]:
    parquet = require("pyarrow.parquet", "run")
    try:
        table = parquet.read_table(path)
        columns, rows = table.column_names, table.to_pylist()
    except (OSError, ValueError) as error:  # the package's own errors are ValueErrors
        raise InvalidInputError(f"cannot read {where} as Parquet ({first_line(error)})") from error
    _checked_columns(columns, where)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row["image"], (str, type(None))):
            raise InvalidInputError(
                f"row {number} of {where}: 'image' is a {type(row['image']).__name__}: name the path of an image file"
            )
        yield number, {name: "" if value is None else str(value) for name, value in row.items()}


def _checked_columns(columns: list[str], where: str) -> list[str]:
    if "image" not in columns:
        known = ", ".join(map(quoted, columns)) or "none at all"
        told = "; separate columns by commas" if len(columns) == 1 and re.search("[;\t]", columns[0]) else ""
        raise InvalidInputError(f"{where} has no column 'image', but {known}{told}")
    if "" in columns:
        raise InvalidInputError(f"column {columns.index('') + 1} of {where} has no name: give it one")
    if len(set(columns)) < len(columns):
        raise InvalidInputError(f"two columns of {where} have one name: rename one")
    return columns
