"""Files and folders that one run holds at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spade_fast.errors import InvalidInputError
from spade_fast.files import only_writer

pytest.importorskip("fcntl")

HOLDS = """
import sys
from spade_fast.files import only_writer

with only_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_one_run_at_a_time_and_none_after_a_kill(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "held"
    if kind == "file":
        path.write_text("lines\n")
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InvalidInputError, match="another run writes to .*held'"), only_writer(path):
            pytest.fail("it is held")
        other.kill()
        other.wait()
    with only_writer(path):
        assert path.exists()
    with only_writer(path):  # it was let go of
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InvalidInputError, match="cannot write to .*: choose another name"),
        only_writer(tmp_path / "file" / "folder"),
    ):
        pytest.fail("it is no folder")


def test_what_goes_wrong_inside_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), only_writer(tmp_path):
        raise OSError("disk full")
