"""Errors that say that memory ran out, and how much there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spade_fast import memory
from spade_fast.errors import InvalidInputError
from spade_fast.memory import free_memory, is_out_of_memory, memory_errors

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


def raised(make: Callable[[], None]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        make()
    return caught.value


def refusing() -> None:
    try:
        raise RuntimeError(ALLOCATOR)
    except RuntimeError as error:
        raise InvalidInputError("a method fails") from error


def in_a_handler() -> None:
    try:
        raise RuntimeError(ALLOCATOR)
    except RuntimeError:
        raise KeyError("while it was handled")  # noqa: B904


def test_what_an_error_came_of_counts_too() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("of a GPU"))
    assert is_out_of_memory(RuntimeError(ALLOCATOR))
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert is_out_of_memory(raised(refusing))
    assert is_out_of_memory(raised(in_a_handler))
    failed = 'torch_call_dispatcher( "aten::{}", "", stack.data(), TORCH_ABI_VERSION) API call failed at file.h'
    assert is_out_of_memory(RuntimeError(failed.format("new_empty")))
    assert not is_out_of_memory(RuntimeError(failed.format("linalg_cholesky")))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError(ALLOCATOR))


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="asks for more memory than there is, which Linux refuses"
)
def test_the_allocators_own_error_is_known() -> None:
    error = raised(lambda: torch.empty(2**60, dtype=torch.uint8).sum())
    assert type(error) is RuntimeError
    assert is_out_of_memory(error)


def test_errors_on_a_cpu_get_their_kind() -> None:
    cpu = torch.device("cpu")
    for kind in (RuntimeError, MemoryError):
        with pytest.raises(torch.OutOfMemoryError, match="can't allocate") as caught, memory_errors(cpu):
            raise kind(ALLOCATOR)
        assert type(caught.value.__cause__) is kind
    with pytest.raises(RuntimeError, match="^another fault$") as caught, memory_errors(cpu):
        raise RuntimeError("another fault")
    assert type(caught.value) is RuntimeError


def test_a_container_may_take_back_what_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path)
    contents = {"memory.stat": "anon 5\ninactive_file 30\n", "memory.current": "50\n", "memory.max": "100\n"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    assert memory._left_in_group() == 100 - (50 - 30)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in_group() is None


def test_free_memory_is_what_the_system_or_the_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory()
    assert free is None or free > 2**20
    for available, left, expected in ((3, 2, 2), (3, None, 3), (None, 2, 2), (None, None, None)):
        monkeypatch.setattr(memory, "_available", lambda available=available: available)
        monkeypatch.setattr(memory, "_left_in_group", lambda left=left: left)
        assert free_memory() == expected
