"""Priority classes, with aging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .policy import Ranked

if TYPE_CHECKING:
    from ..scheduler import Sequence


class Priority(Ranked):
    """Lower `priority` first (as in vLLM), order of arrival inside a class; the last in that order is preempted.

    Aging: `aging` later arrivals weigh as much as one class, so a sequence is overtaken by at most
    `aging * (difference of their priorities)` later ones, and nobody starves. The order between two sequences
    never changes, so nothing has to be sorted again.
    """

    def __init__(self, aging: int = 1000):
        if aging < 1:
            raise ValueError(f"aging={aging} must be at least 1 arrival a class")
        self.aging = aging
        super().__init__()

    def rank(self, sequence: Sequence, arrivals: int) -> tuple[int, int]:
        return sequence.priority * self.aging + arrivals, arrivals

    def order(self, running: list[Sequence]) -> list[Sequence]:
        return sorted(running, key=lambda sequence: sequence.rank)

    def victim(self, running: list[Sequence]) -> Sequence:
        return max(running, key=lambda sequence: sequence.rank)
