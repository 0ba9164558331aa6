"""Priority classes, with aging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .policy import Policy, Ranked

if TYPE_CHECKING:
    from ..scheduler import Sequence


class Priority(Policy):
    """Lower `priority` first (as in vLLM), order of arrival inside a class; the last in that order is preempted.

    Aging: `aging` later arrivals weigh as much as one class, so a sequence is overtaken by at most
    `aging * (difference of their priorities)` later ones, and nobody starves. The order between two sequences
    never changes, so nothing has to be sorted again.
    """

    def __init__(self, aging: int = 1000):
        if aging < 1:
            raise ValueError(f"aging={aging} must be at least 1 arrival a class")
        self.aging = aging
        self._waiting, self._arrivals = Ranked(), 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._arrivals += 1
        sequence.rank = (sequence.priority * self.aging + self._arrivals, self._arrivals)
        self._waiting.push(sequence)

    def requeue(self, sequence: Sequence) -> None:
        self._waiting.push(sequence)

    def peek(self) -> Sequence | None:
        return self._waiting.peek()

    def pop(self) -> Sequence:
        return self._waiting.pop()

    def discard(self, sequence: Sequence) -> None:
        del sequence
        self._waiting.discard()

    def order(self, running: list[Sequence]) -> list[Sequence]:
        return sorted(running, key=lambda sequence: sequence.rank)

    def victim(self, running: list[Sequence]) -> Sequence:
        return max(running, key=lambda sequence: sequence.rank)
