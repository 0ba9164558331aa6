"""Weighted fair queueing over tenants: the virtual token counter (Sheng et al. 2024, arXiv 2401.00588)."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .policy import FirstCome, Policy

if TYPE_CHECKING:
    from ..scheduler import Sequence


class Fair(Policy):
    """The tenant that received least goes first; inside a tenant, order of arrival (algorithm 2 of the paper).

    A tenant's counter is the service that it received over its weight: `input_cost` a prompt token, charged
    when it is admitted, `output_cost` a generated token. A tenant that begins to wait is lifted to the lowest
    counter of those who wait (of the last who did, when nobody does), so time away saves nothing up. While two
    tenants wait, their counters differ by at most 2 max(input_cost * longest prompt, output_cost * tokens of a
    batch) (theorem 4.4).

    Args:
        weights: shares of the tenants; a tenant that is not named weighs 1.
    """

    def __init__(
        self, weights: Mapping[str, float] | None = None, *, input_cost: float = 1.0, output_cost: float = 2.0
    ):
        self.weights = dict(weights or {})
        for tenant, weight in self.weights.items():
            if not weight > 0:
                raise ValueError(f"the weight of tenant {tenant!r} is {weight!r}; it must be above 0")
        if not (input_cost >= 0 and output_cost > 0):
            raise ValueError(f"input_cost={input_cost} and output_cost={output_cost} must not be negative")
        self.input_cost, self.output_cost = input_cost, output_cost
        self.served: dict[str | None, float] = {}
        self._queues: dict[str | None, FirstCome] = {}
        self._heap: list[
            tuple[float, int, str | None]
        ] = []  # an entry a waiting tenant; counters may have risen
        self._waiting = self._order = 0
        self._last: str | None = None
        self._many = 64

    def __len__(self) -> int:
        return self._waiting

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.tenant
        if tenant not in self._queues:
            first = self.peek()
            floor = self.served.get(self._last if first is None else first.tenant, 0.0)
            self._forget(floor)
            self.served[tenant] = max(self.served.get(tenant, 0.0), floor)
        self._queue(tenant).add(sequence)

    def requeue(self, sequence: Sequence) -> None:
        self._queue(sequence.tenant).requeue(sequence)

    def peek(self) -> Sequence | None:
        while self._heap:
            counter, order, tenant = self._heap[0]
            if tenant not in self._queues:
                heapq.heappop(self._heap)
            elif counter < self.served[tenant]:
                heapq.heapreplace(self._heap, (self.served[tenant], order, tenant))
            else:
                return self._queues[tenant].peek()
        return None

    def pop(self) -> Sequence:
        first = self.peek()
        assert first is not None
        self._remove(first)
        return first

    def discard(self, sequence: Sequence) -> None:
        self._remove(sequence)

    def charge(self, sequence: Sequence, prompt: int, output: int) -> None:
        cost = self.input_cost * prompt + self.output_cost * output
        self.served[sequence.tenant] += cost / self.weights.get(sequence.tenant or "", 1.0)

    def _forget(self, floor: float) -> None:
        """Drop tenants that neither wait nor run and have been passed by the floor: were they to come back, they
        would be lifted to it. Done when they have doubled, so a tenant costs O(1)."""
        if len(self.served) < self._many:
            return
        running = self.owner.running if self.owner is not None else ()
        kept = {*self._queues, self._last, *(sequence.tenant for sequence in running)}
        self.served = {one: cost for one, cost in self.served.items() if cost > floor or one in kept}
        self._many = max(64, 2 * len(self.served))

    def _queue(self, tenant: str | None) -> FirstCome:
        """The queue that one more sequence of `tenant` joins."""
        self._waiting += 1
        if tenant not in self._queues:
            self._queues[tenant] = FirstCome()
            self._enter(tenant)
            if len(self._heap) > 64 + 2 * len(self._queues):  # entries of tenants that left and came back
                self._heap = []
                for waiting in self._queues:
                    self._enter(waiting)
        return self._queues[tenant]

    def _enter(self, tenant: str | None) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.served[tenant], self._order, tenant))

    def _remove(self, sequence: Sequence) -> None:
        self._waiting -= 1
        queue = self._queues[sequence.tenant]
        queue.discard(sequence)
        if not queue:
            del self._queues[sequence.tenant]
            self._last = sequence.tenant
