"""Memory that a trace uses again instead of getting it anew from the system."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# glibc maps blocks of some size on, up to 32 MiB. One that is mapped and then freed raises that size to its own.
_MAPPED = 2**25 - 2**16
_BLOCK = 3 * 2**23
_BLOCKS = 20


@contextmanager
def kept_heap() -> Iterator[None]:
    """Keep freed memory in the process while inside: also a decorator.

    glibc gives the free end of its heap back to the system, and takes large blocks from the system directly, so that
    the maps a network makes are paged in anew each time: a third of the time of a trace. Here some 450 MiB of the heap
    stay free for them, below an untouched block at the very end. Memory that is not used costs address space only, and
    all goes back when the trace is done. Elsewhere than under glibc this does nothing.
    """
    try:
        torch.empty(_MAPPED, dtype=torch.uint8)
        last = [torch.empty(_BLOCK, dtype=torch.uint8) for _ in range(_BLOCKS)][-1]
    except RuntimeError:  # no address space to spare
        last = None
    try:
        yield
    finally:
        del last
