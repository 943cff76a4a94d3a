"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from spade_fast.errors import InvalidInputError


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file under another name and give it its own at the end: nobody ever sees half of it.

    Symbolic links are followed, and a file that was there keeps its permissions.

    Raises
    ------
    InvalidInputError
        If it cannot be written, or is something else than a file; what was there before is still there.
    """
    try:
        path = Path(path).resolve()
        mode = path.stat().st_mode if path.exists() else None
        if mode is not None and not stat.S_ISREG(mode):
            raise InvalidInputError(f"{os.fspath(path)!r} is not a regular file: choose another name")
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                temporary.chmod(stat.S_IMODE(mode))
            temporary.replace(path)
    except InvalidInputError:
        raise
    except (OSError, TypeError, ValueError, RuntimeError) as error:  # the latter three from names that are none
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"cannot write {str(path)!r} ({reason}): choose another folder") from error


def write_folder(folder: str | os.PathLike[str], contents: Mapping[str, bytes]) -> dict[str, Path]:
    """Write files into a folder, each whole or not at all, in their order; folders are made where they are missing.

    Parameters
    ----------
    folder
        Where to.
    contents
        By path within the folder.

    Returns
    -------
    dict[str, Path]
        What was written, by path within the folder.

    Raises
    ------
    InvalidInputError
        If a folder cannot be made or a file cannot be written.
    """
    written = {}
    for name, content in contents.items():
        written[name] = Path(folder) / name
        try:
            written[name].parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise InvalidInputError(
                f"cannot write {os.fspath(written[name])!r} ({reason}): choose another folder"
            ) from error
        write_whole(written[name], content)
    return written
