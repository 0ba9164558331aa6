"""What a scheduling policy is, and the queue that most of them need.

A policy owns the waiting sequences and decides who goes first. The scheduler keeps the invariants: it never
exceeds the budget, never gives a page twice, preempts when the pool is empty, admits nobody in a step that
preempted, and admits the first in line when nothing runs, whatever a policy says. No method may look at all
waiting sequences in a step: with 100,000 of them a step costs what it costs with 100.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Row
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pages import PageAllocator
    from ..scheduler import Sequence


class Policy(ABC):
    """One engine's policy: an instance serves one scheduler. Sequences carry `priority`, `tenant` and `rank` (what
    the policy notes on them). Tokens are counted as the scheduler counts them."""

    # Prompts go first and decodes wait for them; else decodes go first and prompts share what is left.
    prefill_first = False
    # The scheduler that this instance serves.
    owner: Any = None

    # -- the waiting sequences; each method in O(log n) amortised

    @abstractmethod
    def __len__(self) -> int:
        """How many wait."""

    @abstractmethod
    def add(self, sequence: Sequence) -> None:
        """A new sequence waits."""

    @abstractmethod
    def requeue(self, sequence: Sequence) -> None:
        """A preempted sequence waits again, before what came later."""

    @abstractmethod
    def peek(self) -> Sequence | None:
        """Who is admitted next; None: nobody now. Asked again in every step until it fits."""

    @abstractmethod
    def pop(self) -> Sequence:
        """Take away what `peek` showed: it runs now."""

    @abstractmethod
    def discard(self, sequence: Sequence) -> None:
        """A waiting sequence ended (`finished` is set already)."""

    # -- the step; what follows has an answer that suits most

    def budget(self, limit: int) -> int:
        """Tokens of the next step, at most `limit` (the largest that was compiled)."""
        return limit

    def order(self, running: list[Sequence]) -> list[Sequence]:
        """Running sequences (oldest first) in the order in which they get pages and budget."""
        return running

    def victim(self, running: list[Sequence]) -> Sequence:
        """Who is preempted when the pool is empty. There must be one that is never chosen until it ends."""
        return running[-1]

    def admits(self, sequence: Sequence, pages: PageAllocator, running: list[Sequence]) -> bool:
        """False keeps the sequence waiting though it would fit: room for what the others may still grow to."""
        del sequence, pages, running
        return True

    def charge(self, sequence: Sequence, prompt: int, output: int) -> None:
        """The sequence was given the computation of so many tokens (recomputed and cached ones do not count)."""
        del sequence, prompt, output

    def ended(self, sequence: Sequence, complete: bool) -> None:
        """A sequence ended, running or waiting, and left its pages; not `complete`: somebody cut it short."""
        del sequence, complete

    def suits(self, pages: PageAllocator) -> None:
        """Called once, before anything: ValueError when the policy cannot work with these pages."""
        del pages

    def calibrate(self, chunks: Row[int], measure: Callable[[int], float]) -> None:
        """Called once, after warm-up: the compiled chunk sizes, smallest first, and the seconds of a step that
        carries one beside decodes at full width."""
        del chunks, measure


class FirstCome(Policy):
    """Waiting sequences go in the order of their arrival; preempted ones go before them."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Sequence, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting[sequence] = None

    def requeue(self, sequence: Sequence) -> None:
        self._waiting[sequence] = None
        self._waiting.move_to_end(sequence, last=False)

    def peek(self) -> Sequence | None:
        return next(iter(self._waiting), None)

    def pop(self) -> Sequence:
        return self._waiting.popitem(last=False)[0]

    def discard(self, sequence: Sequence) -> None:
        del self._waiting[sequence]


class Ranked(Policy):
    """Waiting sequences by `rank` (unique, comparable), which a policy gives each when it arrives, lowest first. Those
    that ended are dropped when they come up, or together when they are the majority."""

    def __init__(self) -> None:
        self._heap: list[tuple[Any, Sequence]] = []
        self._ended = self._arrivals = 0

    @abstractmethod
    def rank(self, sequence: Sequence, arrivals: int) -> Any:
        """The rank of a sequence that is the `arrivals`-th to arrive."""

    def __len__(self) -> int:
        return len(self._heap) - self._ended

    def add(self, sequence: Sequence) -> None:
        self._arrivals += 1
        sequence.rank = self.rank(sequence, self._arrivals)
        self.requeue(sequence)

    def requeue(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.rank, sequence))

    def peek(self) -> Sequence | None:
        while self._heap and self._heap[0][1].finished:
            heapq.heappop(self._heap)
            self._ended -= 1
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        return heapq.heappop(self._heap)[1]

    def discard(self, sequence: Sequence) -> None:
        del sequence
        self._ended += 1
        if 2 * self._ended > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[1].finished]
            heapq.heapify(self._heap)
            self._ended = 0
