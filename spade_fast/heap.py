"""Memory that a trace uses again instead of getting it anew from the system."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
# What glibc ends up with by itself where blocks of all sizes are freed; the number of blocks is its default.
_AFTERWARDS = {_M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: 2**26, _M_MMAP_MAX: 65536}
_INSIDE = {_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0}
# By which users set limits themselves.
_VARIABLES = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_"}

_lock = threading.RLock()
_kept: set[object] = set()  # one entry for each time that a thread is inside


@contextmanager
def kept_heap() -> Iterator[None]:
    """Keep freed memory in the process while inside: also a decorator.

    glibc gives the free end of its heap back to the system, and takes large blocks from the system directly, so that
    the maps a network makes are paged in anew each time. Inside it does neither, in the whole process; but the heaps of
    other threads than the main one end at 64 MiB: larger blocks are still taken directly there, and heaps that are
    empty given back. From the first use on, glibc's limits stand still where otherwise they come to be: blocks of 32
    MiB and more are taken directly, and the next large block that is freed gives back the free end of the heap if that
    is 64 MiB or more. Where environment variables set glibc's limits nothing is done; those that the program set
    through mallopt(3) are lost. With other C libraries this does nothing.
    """
    this = object()
    try:
        with _lock:
            _kept.add(this)
            _set_limits(_INSIDE)
        yield
    finally:
        with _lock:
            _kept.discard(this)
            if not _kept:
                _set_limits(_AFTERWARDS)


def share_heap() -> None:
    """From here on new threads take memory from the main thread's heap, which `kept_heap` keeps for them too.

    Threads that work on images side by side otherwise page in every large block anew. For programs that are of this
    package alone: glibc has no way back, and many threads that take small blocks would wait for each other. Where the
    environment says how many heaps there are, nothing is done.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _set_limits({_M_ARENA_MAX: 1})


def _set_limits(limits: dict[int, int]) -> None:
    if _may_set_limits():
        libc = ctypes.CDLL(None)
        for parameter, value in limits.items():
            libc.mallopt(parameter, value)


@cache  # for both ends must decide alike
def _may_set_limits() -> bool:
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError):  # no POSIX system, or another C library
        return False
    set_by_user = _VARIABLES & os.environ.keys() or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    return bool(library) and not set_by_user
