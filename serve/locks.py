"""The engine's lock: whoever steps in a loop cannot keep the others out."""

from __future__ import annotations

import threading
from typing import Self


class FairLock:
    """A reentrant lock that a loop of `with lock: step()` shares with other threads.

    A plain lock would be taken again by the looping thread before a waiter wakes. Here a waiter stands in a
    turnstile, which the loop must pass too, so that it gets the lock next.
    """

    def __init__(self) -> None:
        self._lock, self._turnstile = threading.RLock(), threading.RLock()
        self._held = _Held()

    def __enter__(self) -> Self:
        # A holder that enters again must not queue: whoever stands in the turnstile waits for it. The garbage
        # collector may enter anywhere in these lines, so the count is raised before the turnstile opens, and
        # lowered after the lock is free.
        if self._held.depth:
            self._lock.acquire()
            self._held.depth += 1
        else:
            with self._turnstile:
                self._lock.acquire()
                self._held.depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()
        self._held.depth -= 1


class _Held(threading.local):
    """How often this thread holds the lock."""

    depth = 0
