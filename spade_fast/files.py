"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from spade_fast.errors import InvalidInputError


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file under another name and give it its own at the end: nobody ever sees half of it.

    Raises
    ------
    InvalidInputError
        If it cannot be written; what was there before is still there.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInputError(f"cannot write {os.fspath(path)!r} ({reason}): choose another folder") from error
