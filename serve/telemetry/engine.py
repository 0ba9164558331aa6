"""An engine that says what its steps were. The plain `Engine` knows nothing of it, so without telemetry a step
costs what it cost before: not even a branch."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np

from ..engine import Engine, Launched
from ..request import Sample
from ..scheduler import Work
from .recorder import NEVER, Flight, Telemetry


class MeasuredEngine(Engine):
    """`Engine` with telemetry: the same steps, looked at. The hot path asks `is_ready` a few times and keeps a few
    numbers; lines are made while the device computes.
    """

    def __init__(self, *args: Any, telemetry: Telemetry, **settings: Any):
        super().__init__(*args, **settings)
        self.telemetry = telemetry
        self._flights: deque[Flight] = deque()  # dispatched and not read: two for a moment, else one
        self._sent, self._rested = 0.0, True

    def collect(self) -> list[Sample]:
        advanced = super().collect()
        if not self.busy:
            self._rested = True
            self.telemetry.write(flush=True)
        return advanced

    def launch(self, work: Work) -> Launched:
        launched = super().launch(work)
        self._flights.append(self._flight(work, launched))
        self._rested = False
        self._flights[-1].look()  # a small program may run inside its dispatch
        return launched

    def _pack(self, work: Work):
        packed = super()._pack(work)
        self._look()
        self._sent = time.perf_counter()
        return packed

    def postprocess(self, launched: Launched) -> list[Sample]:
        flight = self._flights.popleft()
        assert flight.token is launched.sampled.token
        self.telemetry.write()
        flight.look()
        flight.waited = flight.ready_at == NEVER
        np.asarray(launched.sampled.token)
        if flight.waited:
            flight.ready_at = time.perf_counter()
        self._look()
        advanced = super().postprocess(launched)
        self._look()
        flight.generated = len(advanced)
        self.telemetry.add(flight)
        return advanced

    def _look(self) -> None:
        if self._flights:
            self._flights[-1].look()

    def _flight(self, work: Work, launched: Launched) -> Flight:
        scheduler, pages, plan = self.scheduler, self.pages, self.programs.plan
        policy, free = scheduler.policy, pages.free
        decodes = [sequence.computed for sequence in work.decodes]
        chunks = [(chunk.start, chunk.count) for chunk in work.chunks]
        prompt = sum(count for _, count in chunks)
        budget = max(policy.budget(scheduler.budget), scheduler.max_num_seqs + 1)
        sampled = len(launched.rows) + sum(gang.width for gang in launched.gangs)
        return Flight(
            token=launched.sampled.token, step=self.steps - 1, time=time.time(),
            shape=plan.shape(len(decodes), prompt), decodes=decodes, chunks=chunks,
            heads=sampled + sum(chunk.count for _, chunk in launched.scored),
            sampled=sampled, waiting=len(scheduler.waiting), running=len(scheduler.running),
            room=len(decodes) + prompt < min(scheduler.budget, budget) and len(chunks) < plan.prompt_rows,
            pages=(free, pages.num_pages - 1 - free, pages.cached), lookup_tokens=pages.lookup_tokens,
            hit_tokens=pages.hit_tokens, preemptions=scheduler.preemptions, sent=self._sent,
            rested=self._rested,
        )  # fmt: skip
