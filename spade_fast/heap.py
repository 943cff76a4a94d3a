"""Memory that a trace uses again instead of getting it anew from the system."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

# A block that glibc maps and then frees raises the size from which on blocks are mapped to its own, and the free memory
# that the heap may end in to twice as much. Little larger ones no longer do.
_MAPPED = 2**25 - 2**16
# Parameters of mallopt(3), and glibc's default of how many blocks may be mapped.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MMAP_MAX = 65536
# By which users set limits themselves.
_VARIABLES = {
    "GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_"
}  # fmt: skip

_lock = threading.Lock()
_kept: set[object] = set()  # one entry for each time that a thread is inside


@contextmanager
def kept_heap() -> Iterator[None]:
    """Keep freed memory in the process while inside: also a decorator.

    glibc gives the free end of its heap back to the system, and takes large blocks from the system directly, so that
    the maps a network makes are paged in anew each time. Inside it does neither, in the whole process; but the heaps of
    other threads than the main one end at 64 MiB, and larger blocks are still taken directly there. Afterwards it gives
    back the free end of its heap again; what is free below a block in use stays for the next trace. Where environment
    variables set glibc's limits nothing is done; limits that the program set through mallopt(3) are lost. With other C
    libraries this does nothing.
    """
    this = object()
    try:
        _enter(this)
        yield
    finally:
        _leave(this)


def _enter(this: object) -> None:
    with _lock:
        _kept.add(this)
        if _may_set_limits():
            with suppress(RuntimeError):  # no address space to spare
                # No tensor: torch.use_deterministic_algorithms would fill it, torch.set_default_device move it.
                torch.UntypedStorage(_MAPPED, device="cpu")  # type: ignore[no-untyped-call]
            _set_limits(trim_threshold=-1, mmap_max=0)


def _leave(this: object) -> None:
    with _lock:
        _kept.discard(this)
        if not _kept and _may_set_limits():
            _set_limits(trim_threshold=2 * _MAPPED, mmap_max=_MMAP_MAX)


def _may_set_limits() -> bool:
    return platform.libc_ver()[0] == "glibc" and not _VARIABLES & os.environ.keys()


def _set_limits(trim_threshold: int, mmap_max: int) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
    libc.mallopt(_M_MMAP_MAX, mmap_max)
