"""Memory that maps are made in is kept while a dense pass runs."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

# Maps of 24 MiB each are made and dropped; how many pages the system had to give for the second round.
ROUNDS = """
import contextlib, resource, torch
from spade_fast.heap import kept_heap
with {context}:
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        maps = [torch.ones(3, 2**21) for _ in range(3)]
        del maps
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_of_second_round(context: str) -> int:
    program = [sys.executable, "-c", ROUNDS.format(context=context)]
    return int(subprocess.run(program, capture_output=True, check=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is kept")
def test_maps_are_made_in_memory_used_before():
    pages = 3 * 3 * 2**21 * 4 // resource.getpagesize()
    assert pages_of_second_round("kept_heap()") < pages / 20
    assert pages_of_second_round("contextlib.nullcontext()") > pages / 2
