"""Folders of photographs, and the classes that their names tell."""

from __future__ import annotations

import os
import re
from pathlib import Path

from spade_fast.errors import InvalidInputError

# No longer than that: names of phones' photographs begin with a date.
_INDEX = re.compile(r"(\d{1,5})_")
_EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def image_files(folder: str | os.PathLike[str], *, classes: int | None = None) -> list[tuple[Path, int | None]]:
    """The photographs below a folder, in the order of their names, with the class index of each.

    A file's name may begin with it, ``0281_tabby.jpg``. Otherwise, if all files are in subfolders, the index is that of
    the subfolder among those in order, as torchvision's ``ImageFolder`` has it; if `classes` are given, only where
    there are as many subfolders. Otherwise it is None.

    Raises
    ------
    InvalidInputError
        If there is no such folder, or no file in it that by its extension is an image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InvalidInputError(f"{os.fspath(folder)!r} is no folder: pass one with photographs")
    found = sorted(
        each
        for each in root.rglob("*")
        if each.suffix.lower() in _EXTENSIONS
        and not any(part.startswith(".") for part in each.relative_to(root).parts)
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
