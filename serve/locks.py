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
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> Self:
        # An owner that enters again must not queue: whoever stands in the turnstile waits for it.
        if self._owner == threading.get_ident():
            self._lock.acquire()
        else:
            with self._turnstile:
                self._lock.acquire()
        self._owner, self._depth = threading.get_ident(), self._depth + 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()
