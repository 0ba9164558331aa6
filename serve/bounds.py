"""What a server bounds, whatever the model does: output budgets, the length of the queue, deadlines."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from .request import Request


class QueueFull(ValueError):
    """The waiting queue is at its limit: try again later (a server answers 429)."""


@dataclass(frozen=True)
class Bounds:
    """Limits that hold for every request of an engine; None: no limit.

    max_output_tokens: tokens that a sample may generate at most, whatever its max_tokens, min_tokens or
    ignore_eos ask. max_waiting: sequences that may wait (a request brings `n`); a request that comes while so
    many wait is refused.
    """

    max_output_tokens: int | None = None
    max_waiting: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_output_tokens", "max_waiting"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"{name}={value!r} must be a whole number of at least 1, or None for no limit"
                )

    def room(self, waiting: int) -> bool:
        """Whether another request may join a queue of `waiting` sequences."""
        return self.max_waiting is None or waiting < self.max_waiting

    def check_room(self, waiting: int) -> None:
        if not self.room(waiting):
            raise QueueFull(
                f"{waiting} sequences wait already and max_waiting={self.max_waiting}; send the request again "
                f"when some have started, or raise max_waiting"
            )

    def length(self, prompt: int, asked: int | None, limit: int) -> int:
        """The length (tokens, prompt included) at which a sample ends at the latest."""
        budgets = [tokens for tokens in (asked, self.max_output_tokens) if tokens is not None]
        return min([limit, *(prompt + tokens for tokens in budgets)])


@dataclass
class Deadlines:
    """Requests by the time at which they must have ended: finding those that are due never scans the others.

    Entries of requests that ended earlier are swept out when they are the majority, so a request costs O(log n)
    however far its deadline lies.
    """

    clock: Callable[[], float] = time.monotonic
    _heap: list[tuple[float, int, Request]] = field(default_factory=list)
    _order: count = field(default_factory=count)
    _sweep: int = 64

    def add(self, request: Request) -> None:
        """Watch a request that has a `timeout_s`."""
        if request.params.timeout_s is None:
            return
        if len(self._heap) >= self._sweep:
            self._heap = [entry for entry in self._heap if not entry[2].finished]
            heapq.heapify(self._heap)
            self._sweep = max(64, 2 * len(self._heap))
        heapq.heappush(self._heap, (request.arrival + request.params.timeout_s, next(self._order), request))

    def due(self) -> list[Request]:
        """The requests that are past their deadlines; they are watched no longer."""
        found: list[Request] = []
        if not self._heap:
            return found
        now = self.clock()
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[2]
            if not request.finished:
                found.append(request)
        return found
