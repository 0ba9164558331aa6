"""A server without a model: the real scheduler and pages, outputs whose lengths are known beforehand."""

from dataclasses import dataclass
from statistics import fmean

from tokenloom import SarathiServe
from tokenloom.serve.scheduler import Scheduler, Sequence


@dataclass(frozen=True)
class Outcome:
    """started: indices of the sequences in the order of their first start. latency: steps from 0 to each one's end.
    computed: prompt tokens and recomputed ones."""

    started: list[int]
    latency: list[int]
    steps: int
    preemptions: int
    mean_running: float
    computed: int

    @property
    def mean_latency(self) -> float:
        return fmean(self.latency)


def simulate(scheduler: Scheduler, sequences: list[Sequence]) -> Outcome:
    """Run sequences that are all there from the start, each until it wrote `owner` tokens; results are read one
    step late, as the engine does. Time is counted in steps."""
    sequences = [
        Sequence(list(one.tokens), one.limit, owner=one.owner, tenant=one.tenant) for one in sequences
    ]
    ends = {one: len(one.tokens) + one.owner for one in sequences}
    places = {one: place for place, one in enumerate(sequences)}
    started, latency, running, computed = [], [0] * len(sequences), [], 0
    in_flight: list[tuple[Sequence, int]] = []
    for one in sequences:
        scheduler.add(one)
    steps = 0
    while scheduler.busy or in_flight:
        work, steps = scheduler.schedule(), steps + 1
        rows = []
        if work is not None:
            started += [places[one] for one in work.admitted if one.epoch == 0]
            computed += sum(chunk.count for chunk in work.chunks)
            rows = [*work.decodes, *(chunk.sequence for chunk in work.chunks if chunk.final)]
            running.append(len(scheduler.running))
        previous, in_flight = in_flight, [(one, one.epoch) for one in rows]
        for one, epoch in previous:
            if one.finished or one.epoch != epoch:
                continue
            one.pending -= 1
            one.tokens.append(places[one])
            if len(one.tokens) >= ends[one]:
                latency[places[one]] = steps
                scheduler.finish(one)
    return Outcome(started, latency, steps, scheduler.preemptions, fmean(running), computed)


class Reserving(SarathiServe):
    """Starts a sequence beside others only when all of them fit at full length: max_tokens is reserved."""

    def admits(self, sequence, pages, running):
        owed = sum(pages.pages_for(one.limit) - len(one.pages) for one in running)
        return pages.pages_for(sequence.limit) + owed <= pages.free
