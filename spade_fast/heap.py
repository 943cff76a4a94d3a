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
    the maps a network makes are paged in anew each time: a sixth of a trace and more. Here some 450 MiB of the heap
    stay free for them, below a block at the very end. Blocks are never touched: what is not used of them costs address
    space only. Afterwards glibc gives back what is free above the last result that is kept. Elsewhere than under glibc
    this is of no use, and costs nothing.
    """
    try:
        _untouched(_MAPPED)
        last = [_untouched(_BLOCK) for _ in range(_BLOCKS)][-1]
    except RuntimeError:  # no address space to spare
        last = None
    try:
        yield
    finally:
        del last


def _untouched(size: int) -> torch.UntypedStorage:
    # No tensor: torch.use_deterministic_algorithms would fill it, torch.set_default_device put it elsewhere.
    return torch.UntypedStorage(size, device="cpu")  # type: ignore[no-untyped-call]
