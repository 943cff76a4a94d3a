"""Work of other threads that can be ended: they look, now and then, whether to go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_here = threading.local()


class Interrupted(BaseException):
    """Ends the work on an image; no `except Exception` on its way takes it for a fault of that image."""


@contextmanager
def interruptible(stop: threading.Event) -> Iterator[None]:
    """What this thread does inside ends by :class:`Interrupted` at its next :func:`checkpoint` once `stop` is set.

    Exceptions that are raised in a thread from outside would leave locks behind that nobody gives back.
    """
    _here.stop = stop
    try:
        yield
    finally:
        _here.stop = None


def checkpoint() -> None:
    """Raise :class:`Interrupted` if this thread is to stop: called between pieces of what may take long."""
    stop: threading.Event | None = getattr(_here, "stop", None)
    if stop is not None and stop.is_set():
        raise Interrupted
