"""Files and folders that one run holds at a time."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from spade_fast.errors import InvalidInputError
from spade_fast.files import (
    LOCK,
    append_line,
    digest,
    held_file,
    held_folder,
    read_tensors,
    remove_file,
    write_folder,
    write_tensors,
    write_whole,
)

fcntl = pytest.importorskip("fcntl")

Hold = Callable[[Path], AbstractContextManager[None]]

HOLDS = """
import sys
from spade_fast import files

with getattr(files, sys.argv[1])(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("hold", [held_folder, held_file])
def test_one_run_at_a_time_and_none_after_a_kill(tmp_path: Path, hold: Hold) -> None:
    path = tmp_path / "new" / "held"
    command = [sys.executable, "-c", HOLDS, hold.__name__, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InvalidInputError, match="another run writes to .*held'"), hold(path):
            pytest.fail("it is held")
        other.kill()
        other.wait()
    with hold(path):
        assert path.is_dir() is (hold is held_folder)
    with hold(path):  # it was let go of
        pass


def test_a_file_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("lines\n")
    with held_file(tmp_path / "log"):
        pass
    assert (tmp_path / "log").read_text() == "lines\n"


def test_what_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for hold, path in ((held_folder, "file"), (held_folder, "file/folder"), (held_file, "file/log"), (held_file, ".")):
        with pytest.raises(InvalidInputError, match="cannot write to .*: choose another name"), hold(tmp_path / path):
            pytest.fail(path)


@pytest.mark.parametrize("hold", [held_folder, held_file])
def test_a_file_system_without_locks(tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    ran = False
    message = r"held' cannot be held for this run alone \(No locks available\): see to it"
    with pytest.warns(UserWarning, match=message), hold(tmp_path / "held"):
        ran = True
    assert ran


def test_a_folder_is_held_where_only_files_open_for_writing_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on network file systems."""
    lock, locked = fcntl.flock, []

    def picky(descriptor: int, operation: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        locked.append(descriptor)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", picky)
    with held_folder(tmp_path / "held"):
        pass
    assert len(locked) == 1
    assert [each.name for each in (tmp_path / "held").iterdir()] == [LOCK]


def test_a_file_and_then_its_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, synced = os.fsync, []

    def noting(descriptor: int) -> None:
        found = os.fstat(descriptor)
        what = "folder" if stat.S_ISDIR(found.st_mode) else f"file of {found.st_size} bytes"
        synced.append((what, (tmp_path / "new").exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    write_whole(tmp_path / "new", b"content")
    assert synced == [("file of 7 bytes", False), ("folder", True)]


def test_folders_that_are_made_are_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, synced = os.fsync, []

    def noting(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    write_folder(tmp_path / "a", {"b/c": b""})
    folders = [each for each in synced if each.is_dir()]
    assert folders == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]  # a, b and c are there
    synced.clear()
    append_line(tmp_path / "a" / "log", "first")
    append_line(tmp_path / "a" / "log", "second")
    assert synced == [tmp_path / "a" / "log", tmp_path / "a", tmp_path / "a" / "log"]


def test_a_working_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InvalidInputError, match="cannot write"):
        write_folder("out", {"file": b""})


def test_what_is_removed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):  # also where there is none
        remove_file(tmp_path / "file")
        assert not (tmp_path / "file").exists()
    for bad in (tmp_path, "a\0b"):
        with pytest.raises(InvalidInputError, match="cannot remove .*: choose another folder"):
            remove_file(bad)


def test_what_is_read_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_tensors(path, "key", {}, {"x": torch.arange(1000.0)})
    with read_tensors(path, "key", "numbers", "write_tensors") as (_, tensors):
        pass
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(tensors["x"], torch.arange(1000.0))


def test_digests_tell_what_bytes_do_not() -> None:
    zeros = [torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, 1), torch.zeros(1, 2)]
    assert len({digest({"x": each}) for each in zeros}) == len(zeros)
    assert digest({"x": zeros[0]}) != digest({"y": zeros[0]})
    assert digest({"x": zeros[0], "state": object()}) == digest({"x": zeros[0], "state": object()})


def test_what_goes_wrong_inside_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), held_folder(tmp_path):
        raise OSError("disk full")
