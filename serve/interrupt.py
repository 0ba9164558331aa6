"""Interrupts that wait for the end of a step, so that they never leave the engine between two states."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C (or a notebook's stop button) is noted, not raised: ask the returned function after each
    step. Outside the main thread, where Python delivers no signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: seen.set())
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, before)
