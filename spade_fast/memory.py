"""Memory that runs out: how errors tell, and how much there is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
# A native operator's failed allocation comes as a failed call of what allocates, without the reason.
_FAILED_CALL = re.compile(
    r'"aten::(new_empty|new_zeros|empty|empty_like|clone|contiguous|to)".*API call failed', re.DOTALL
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came of, says that memory ran out; of native operators, that it may have."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (MemoryError, torch.OutOfMemoryError)):
            return True
        text = str(found) if isinstance(found, RuntimeError) else ""
        if any(sign in text for sign in _SIGNS) or _FAILED_CALL.search(text):
            return True
        found = found.__cause__ or found.__context__
    return False


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Raise ``torch.OutOfMemoryError`` where an operator ran out of memory: not all of them say so by its kind."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_stats(device).get("num_ooms", 0) if cuda else 0
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        ran_out = torch.cuda.memory_stats(device).get("num_ooms", 0) > before if cuda else is_out_of_memory(error)
        if ran_out:
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take, or None where the system does not say."""
    found = [each for each in (_available(), _left_in_group()) if each is not None]
    return min(found, default=None)


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _left_in_group() -> int | None:
    """What the container's limit leaves (Linux control groups, version 2): files that are kept in memory can go."""
    try:
        group = Path("/sys/fs/cgroup")
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(held.get("inactive_file", 0))
        return int((group / "memory.max").read_text()) - used
    except (OSError, ValueError):  # none, or "max"
        return None
