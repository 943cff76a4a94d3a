"""Memory that a trace uses again instead of getting it anew from the system."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A block that glibc maps and then frees raises the size from which on blocks are mapped to its own, and the free memory
# that the heap may end in to twice as much. This is the largest that does.
_MAPPED = 2**25 - 2**16
# Parameters of mallopt(3), and glibc's default of how many blocks may be mapped.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MMAP_MAX = 65536

_lock = threading.Lock()
_kept: set[object] = set()  # one entry for each time that a thread is inside


@contextmanager
def kept_heap() -> Iterator[None]:
    """Keep freed memory in the process while inside: also a decorator.

    glibc gives the free end of its heap back to the system, and takes large blocks from the system directly, so that
    the maps a network makes are paged in anew each time: a sixth of a trace, and of some networks a third. Inside it
    does neither. Afterwards it gives back the free end of its heap again; what is free below a block in use stays for
    the next trace. Limits set by glibc's environment variables are left alone, those that the program set through
    mallopt(3) are not. With other C libraries this does nothing.
    """
    this = object()
    try:
        _untouched(_MAPPED)
        _enter(this)
        yield
    finally:
        _leave(this)


def _untouched(size: int) -> torch.UntypedStorage:
    # No tensor: torch.use_deterministic_algorithms would fill it, torch.set_default_device put it elsewhere.
    return torch.UntypedStorage(size, device="cpu")  # type: ignore[no-untyped-call]


def _enter(this: object) -> None:
    with _lock:
        _kept.add(this)
        _set_limits(trim_threshold=-1, mmap_max=0)


def _leave(this: object) -> None:
    with _lock:
        _kept.discard(this)
        if not _kept:
            _set_limits(trim_threshold=2 * _MAPPED, mmap_max=_MMAP_MAX)


def _set_limits(trim_threshold: int, mmap_max: int) -> None:
    set_by_user = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"))
    if platform.libc_ver()[0] == "glibc" and not set_by_user:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
        libc.mallopt(_M_MMAP_MAX, mmap_max)
