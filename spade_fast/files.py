"""Files that are written whole or not at all, and tensors in such files, with a checksum."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spade_fast.errors import InvalidInputError
from spade_fast.memory import is_out_of_memory

_FORMAT = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)
#: What is locked in a folder that a run holds.
LOCK = ".lock"


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
            raise InvalidInputError(f"{os.fspath(path)!r} is no regular file: remove it, or choose another name")
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                temporary.chmod(stat.S_IMODE(mode))
            temporary.replace(path)
        _sync_folder(path.parent)
    except InvalidInputError:
        raise
    except (OSError, TypeError, ValueError, RuntimeError) as error:  # the latter three from names that are none
        reason = getattr(error, "strerror", None) or error
        remedy = "free some space, or " if getattr(error, "errno", None) in _FULL else ""
        raise InvalidInputError(f"cannot write {str(path)!r} ({reason}): {remedy}choose another folder") from error


def _sync_folder(folder: Path) -> None:
    """See that a name given in the folder outlasts a loss of power, where the system can."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems do not sync folders, and some folders cannot be read
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _make_folder(folder: Path) -> None:
    """Make a folder where it is missing, and those above it, so that they outlast a loss of power."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not folder.is_dir():
        if folder.parent != folder:  # as of a working folder that has been removed
            _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


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
            _make_folder(written[name].parent)
        except OSError as error:
            reason = error.strerror or error
            raise InvalidInputError(
                f"cannot write {os.fspath(written[name])!r} ({reason}): choose another folder"
            ) from error
        write_whole(written[name], content)
    return written


def remove_file(path: str | os.PathLike[str]) -> None:
    """Remove a file, where there is one; InvalidInputError if it cannot be."""
    try:
        Path(path).unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # the latter from names that are none
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"cannot remove {os.fspath(path)!r} ({reason}): choose another folder") from error


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add a line to a file, which is on the disk when this returns; folder and file are made where they are missing.

    Raises
    ------
    InvalidInputError
        If it cannot be written.
    """
    try:
        _make_folder(Path(path).parent)
        is_new = not Path(path).exists()
        with Path(path).open("ab+") as file:
            file.seek(max(0, file.tell() - 1))
            if file.read(1) not in (b"", b"\n"):  # a line was cut short
                _drop_last_line(file)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            _sync_folder(Path(path).parent)
    except OSError as error:
        raise InvalidInputError(f"cannot write {os.fspath(path)!r} ({error.strerror or error})") from error


def _drop_last_line(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines that :func:`append_line` wrote, without a last one that was cut short; none where there is no file.

    Raises
    ------
    InvalidInputError
        If the file cannot be read.
    """
    try:
        content = Path(path).read_bytes() if Path(path).exists() else b""
        return content[: content.rfind(b"\n") + 1].decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InvalidInputError(f"line {line} of {os.fspath(path)!r} is no text: delete that line") from error
    except OSError as error:
        raise InvalidInputError(f"cannot read {os.fspath(path)!r} ({error.strerror or error})") from error


@contextlib.contextmanager
def held_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder, which is made where it is missing, for one run: another that asks for it is refused.

    What is held is the file ``.lock`` in it, which stays there; the system lets go of it when the process ends, however
    that comes. Where it knows no such locks (Windows, some network file systems), nothing is held, and a warning says
    so.

    Raises
    ------
    InvalidInputError
        If another run holds it, or it cannot be made or written to.
    """
    with _named(path):
        _make_folder(Path(path))
    with _held(Path(path) / LOCK, path):
        yield


@contextlib.contextmanager
def held_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a file, which is made empty where it is missing, for one run: see :func:`held_folder`."""
    with _named(path):
        _make_folder(Path(path).parent)
    with _held(path, path):
        yield


@contextlib.contextmanager
def _held(file: str | os.PathLike[str], called: str | os.PathLike[str]) -> Iterator[None]:
    with _named(file):
        # For writing, as network file systems lock no others.
        is_new = not os.path.exists(file)
        held = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        if is_new:
            _sync_folder(Path(file).parent)
    try:
        try:
            if fcntl is None:
                raise OSError("this system has no locks")
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidInputError(
                f"another run writes to {os.fspath(called)!r}: wait until it is done, or choose another name"
            ) from error
        except OSError as error:
            warnings.warn(
                f"{os.fspath(called)!r} cannot be held for this run alone ({error.strerror or error}): see to it that "
                "no other run writes to it",
                stacklevel=4,
            )
        yield
    finally:
        os.close(held)


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # the latter from names that are none
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"cannot write to {os.fspath(path)!r} ({reason}): choose another name") from error


def write_tensors(
    path: str | os.PathLike[str], key: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write :func:`tensor_bytes` to a file, whole or not at all; InvalidInputError if it cannot be written."""
    write_whole(path, tensor_bytes(key, header, tensors))


def tensor_bytes(key: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors and a header as one safetensors file, with checksums of both.

    Parameters
    ----------
    key
        Under which the header stands in the file's metadata: it tells what the file is.
    header
        Plain JSON values.
    tensors
        Contiguous, on the CPU, no two in the same memory.
    """
    return save(dict(tensors), metadata={key: json.dumps(sealed(header, tensors))})


def sealed(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header with a checksum of the tensors, and one of itself, which is verified without them."""
    whole = {"format": _FORMAT, **header, "tensors_sha256": digest(tensors)}
    return {**whole, "sha256": digest({}, whole)}


@contextlib.contextmanager
def read_header(path: str | os.PathLike[str], key: str, what: str, writer: str) -> Iterator[dict[str, Any]]:
    """Read the header that :func:`write_tensors` wrote, without the tensors, for a block: as `read_tensors`."""
    with _refused_as(path, what, writer):
        with _opened(path) as file:
            header = _header(file, key)
        del header["tensors_sha256"]
        yield header


@contextlib.contextmanager
def read_tensors(
    path: str | os.PathLike[str], key: str, what: str, writer: str
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Read what :func:`write_tensors` wrote: its header and tensors, for a block that makes something of them.

    Parameters
    ----------
    path, key
        As there.
    what, writer
        For the message of a refusal: what the file should be, ``"a trace"``, and what writes it, ``"Trace.save"``.

    Raises
    ------
    InvalidInputError
        If the file cannot be read or is something else, or the block finds that it contradicts itself (LookupError,
        TypeError, ValueError or AttributeError); the message names the file.
    """
    with _refused_as(path, what, writer):
        with _opened(path) as file:
            header = _header(file, key)
            # Clones: the tensors would otherwise be views of the file, and change or crash with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if header.pop("tensors_sha256") != digest(tensors):
            raise ValueError("its checksum does not fit its contents")
        yield header, tensors


def _opened(path: str | os.PathLike[str]) -> Any:
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is no regular file")  # and might never end
    return safe_open(path, framework="pt")


def _header(file: Any, key: str) -> dict[str, Any]:
    header: dict[str, Any] = json.loads((file.metadata() or {})[key])
    if header["format"] != _FORMAT:
        raise ValueError(f"format {header['format']!r}, this version reads {_FORMAT}")
    if header.pop("sha256") != digest({}, header):
        raise ValueError("the checksum of its header does not fit it")
    del header["format"]
    return header


@contextlib.contextmanager
def _refused_as(path: str | os.PathLike[str], what: str, writer: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise InvalidInputError(
            f"cannot read {os.fspath(path)!r} as {what} ({type(error).__name__}: {error}): it is missing, damaged, or "
            f"was not written by {writer}"
        ) from error


def digest(tensors: Mapping[str, Any], header: Mapping[str, Any] = MappingProxyType({})) -> str:
    """SHA-256 of tensors, in the order of their names, and of plain JSON values before them.

    Other things among the tensors, as a module's own state, count by their names.
    """
    found = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):
            found.update(name.encode())
            continue
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
