"""A soak: very many short requests with drawn arrivals, cancellations and deadlines, and what must not grow."""

from __future__ import annotations

import ctypes
import gc
import random
import resource
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from tokenloom import LLM
from tokenloom.serve.request import Request, Sample
from tokenloom.tests.configurations import settled
from tokenloom.tests.drawn import draw_requests
from tokenloom.tests.engines import TIGHT

SHARES = 10
# Three seats of up to six pages each, so sequences are preempted.
SIZES: dict[str, Any] = {**TIGHT, "num_pages": 13}
CANCELLED, TIMED = 0.1, 0.1


@dataclass(frozen=True)
class Mark:
    """Of the process, when everything has ended: bytes, Python objects that can hold others, arrays of JAX."""

    memory: int
    objects: int
    arrays: int

    @staticmethod
    def now() -> Mark:
        gc.collect()
        return Mark(resident(), len(gc.get_objects()), len(jax.live_arrays()))


@dataclass
class Soak:
    """What was served. `marks`: one for each tenth of the requests, after one as long as those to warm up."""

    requests: int = 0
    samples: int = 0
    tokens: int = 0
    reasons: Counter = field(default_factory=Counter)
    marks: list[Mark] = field(default_factory=list)

    def growth(self, name: str) -> float:
        """Of a field of Mark, from the first tenth to the end."""
        first, last = (getattr(self.marks[at], name) for at in (0, -1))
        return last / first - 1.0


def resident() -> int:
    """Bytes that the process holds, without what the allocator of C keeps for later."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # another system: its highest mark
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def soak(llm: LLM, count: int, seed: int, report=None) -> Soak:
    """Serve `count` requests in ten parts; after each everything must have ended and every page be back.

    Time is counted in steps, so that deadlines do not depend on the machine. report: called with (soak, s) after
    each part.
    """
    found, clock = Soak(), _Clock()
    llm.engine.deadlines.clock = lambda: clock.now
    share = max(1, count // SHARES)
    _serve(llm, share, f"{seed} warm", clock, Soak())
    for part in range(SHARES):
        start = time.perf_counter()
        _serve(llm, share, f"{seed} {part}", clock, found)
        found.marks.append(Mark.now())
        if report is not None:
            report(found, time.perf_counter() - start)
    return found


class _Clock:
    now = 0.0


def _serve(llm: LLM, count: int, seed: str, clock: _Clock, found: Soak) -> None:
    engine, draw = llm.engine, random.Random(f"soak {seed}")
    drawn = draw_requests(count, draw.getrandbits(32), llm.config.vocab_size, prompt=40, output=8)
    drawn.reverse()
    running: list[Request] = []
    open_samples: set[Sample] = set()
    while drawn or engine.busy:
        for _ in range(min(len(drawn), draw.choice((0, 0, 0, 1, 1, 3)))):
            one = drawn.pop()
            timed = float(draw.randint(1, 30)) if draw.random() < TIMED else draw.choice([None, 1e6])
            request = llm._new_request(
                None, one.prompt, replace(one.params, timeout_s=timed), one.salt, one.priority,
                f"{one.tenant}{draw.randrange(10**6)}",
            )  # fmt: skip
            request.arrival = clock.now
            engine.add(request)
            running.append(request)
            open_samples.update(request.samples)
            found.requests, found.samples = found.requests + 1, found.samples + len(request.samples)
            if draw.random() < CANCELLED:
                victim = draw.choice(running)
                llm.abort(victim.request_id) if draw.random() < 0.5 else engine.cancelled.append(victim)
        clock.now += 1.0
        for sample in engine.step():
            reason = sample.finish_reason
            found.tokens += reason not in ("abort", "timeout")
            if reason is not None:
                open_samples.remove(sample)  # a KeyError: it ended twice
                found.reasons[reason] += 1
                _check(sample)
        if len(running) > 200:
            running = [request for request in running if not request.finished]
    assert not open_samples, "a sample never ended"
    settled(engine)


def _check(sample: Sample) -> None:
    """A sample's own numbers fit together when it has ended."""
    request, metrics = sample.request, sample.request.metrics
    output = request.output().outputs[sample.index]
    assert len(output.token_ids) == len(output.weight_versions)
    assert sample.logprobs is None or len(sample.logprobs) == len(output.token_ids)
    assert not sample.sequence.pages and sample.sequence.seat < 0
    if request.finished:
        assert metrics.finished_time is not None and metrics.finished_time >= metrics.arrival_time
    if output.token_ids:
        times = (metrics.first_scheduled_time, metrics.first_token_time, metrics.last_token_time)
        known = [metrics.arrival_time, *(time for time in times if time is not None)]
        assert len(known) == 4 and known == sorted(known), metrics
    assert metrics.preemptions == sum(one.sequence.epoch for one in request.samples)
