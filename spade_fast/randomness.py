"""Random numbers of other libraries, from a seed."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_turn = threading.RLock()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch, the last on CPU and `device`; afterwards they are as they were.

    One thread at a time, since all share the generators. For libraries that draw from any of them: torch-lucent and
    captum from numpy's, others from torch's.
    """
    with _turn:
        python, torchs = random.getstate(), torch.default_generator.get_state()
        # Legacy by numpy's standards, yet the generator that `np.random.choice` draws from.
        legacy = np.random.get_state()  # noqa: NPY002
        # Not torch.manual_seed, which would seed all other GPUs too.
        gpu = torch.cuda.default_generators[device.index] if device.type == "cuda" else None
        gpus = gpu.get_state() if gpu is not None else None
        try:
            random.seed(seed)
            np.random.seed([seed % 2**32, seed >> 32])  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
            if gpu is not None:
                gpu.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002
            torch.default_generator.set_state(torchs)
            if gpu is not None and gpus is not None:
                gpu.set_state(gpus)
