"""Memory that a trace uses again instead of getting it anew from the system."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# glibc takes allocations above its threshold, 32 MiB at most, from the system and gives them back when they are freed.
_LARGEST_THRESHOLD = 2**25
_BLOCK = 3 * 2**23
_BLOCKS = 20


@contextmanager
def kept_heap() -> Iterator[None]:
    """Keep freed memory in the process while inside: also a decorator.

    glibc gives free memory at the end of its heap back to the system, and each map that a network makes next is then
    paged in anew: a third of the time of a trace. Here an untouched block at the very end keeps what is freed below
    it from being the end. Untouched memory takes address space only; elsewhere than under glibc this does nothing.
    """
    try:
        # What is mapped and then freed raises the threshold to its own size: the blocks come from the heap.
        torch.empty(_LARGEST_THRESHOLD - 2**16, dtype=torch.uint8)
        last = [torch.empty(_BLOCK, dtype=torch.uint8) for _ in range(_BLOCKS)][-1]
    except RuntimeError:  # no address space to spare
        last = None
    try:
        yield
    finally:
        del last
