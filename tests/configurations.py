"""Ways to serve the same requests. Each takes a grid, drawn requests and a random number generator, and returns the
engine that it used last and the outputs in order."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from tokenloom import LLM, Fair, PrefillFirst, Priority, SarathiServe, SplitFuse
from tokenloom.model import checkpoint
from tokenloom.model.checkpoint import random_params
from tokenloom.model.config import ModelConfig, llama_config
from tokenloom.model.layers import Numerics
from tokenloom.serve.buckets import BucketPlan
from tokenloom.serve.build import Build, build_engine
from tokenloom.serve.engine import Engine
from tokenloom.serve.outputs import RequestOutput
from tokenloom.serve.request import Request
from tokenloom.serve.tokenizer import Tokenizer
from tokenloom.serve.weights import plan_swap
from tokenloom.tests import tiny
from tokenloom.tests.contract import Grid, Tally
from tokenloom.tests.drawn import Drawn

Served = tuple[Engine, list[RequestOutput]]
Serve = Callable[[Grid, list[Drawn], random.Random], Served]


def settled(engine: Engine) -> None:
    """Nothing runs, and everything that was lent is back."""
    scheduler, pages = engine.scheduler, engine.pages
    assert not engine.busy and not scheduler.running and not len(scheduler.policy)
    assert sorted(scheduler._seats) == list(range(scheduler.max_num_seqs)), "a seat is lost"
    assert not any(pages._owners) and pages.free == pages.num_pages - 1, "a page is lost"
    assert len({*pages._blank, *pages._idle}) == pages.free, "a page is free twice"
    held = pages.snapshots
    if held is not None:
        slots = [*held._free, *held._slot_of.values()]
        assert sorted(slots) == list(range(held.slots)), "a slot is lost, or free twice"
        assert not held._saves and not held._coming
    assert engine.programs.compilations.late == 0


def drive(engine: Engine, requests: list[Request], draw: random.Random, between: Callable[[], None]) -> None:
    """Requests arrive a few at a time between steps, until all have ended; `between` is called before each step."""
    queue = deque(requests)
    while queue or engine.busy:
        for _ in range(min(len(queue), draw.choice((0, 0, 1, 1, 2, 5)))):
            engine.add(queue.popleft())
        between()
        engine.step()
    settled(engine)
    assert all(request.finished for request in requests)


def nothing() -> None:
    """What happens between steps when nothing else does."""


def alone(grid: Grid, drawn: list[Drawn], draw: random.Random) -> Served:
    """The reference: one request at a time, each step read at once, no prefix cache, room for everything."""
    engine, requests = grid.engine(overlap=False, cache=False), [one.request() for one in drawn]
    for request in requests:
        engine.add(request)
        while engine.busy:
            engine.step()
    settled(engine)
    return engine, [request.output() for request in requests]


def served(grid: Grid, drawn: list[Drawn], draw: random.Random, **settings) -> Served:
    """All together, with drawn arrivals."""
    engine, requests = grid.engine(**settings), [one.request() for one in drawn]
    drive(engine, requests, draw, nothing)
    return engine, [request.output() for request in requests]


def tight_pages(grid: Grid) -> int:
    """A pool that holds the longest text, and not much more."""
    return grid.first.max_model_len // grid.first.pages.page_size + 4


def segments(grid: Grid, drawn: list[Drawn], draw: random.Random) -> Served:
    """Paused after drawn quotas, and resumed in an engine with another pool."""
    engines = [grid.engine(), grid.engine(num_pages=tight_pages(grid))]
    requests, outputs = [one.request(segment_tokens=draw.randint(1, 12)) for one in drawn], {}
    for turn in range(100):
        engine = engines[turn % 2]
        engine.pages.new_weights()  # the other one wrote over the pages that this one remembers
        drive(engine, requests, draw, nothing)
        outputs |= {request.request_id: request.output() for request in requests}
        open_ones = [output for output in outputs.values() if output.resumable]
        if not open_ones:
            break
        requests = [Request.resuming(output, draw.choice([1, 5, 12, None])) for output in open_ones]
        draw.shuffle(requests)
    return engine, [outputs[str(one.index)] for one in drawn]


def swapped(grid: Grid, drawn: list[Drawn], draw: random.Random) -> Served:
    """The same weights are swapped in, again and again, in the midst of everything."""
    engine, requests = grid.engine(), [one.request() for one in drawn]
    same = random_params(grid.config, Numerics(), 0)

    def swap() -> None:
        if draw.random() < 0.04:
            plan = plan_swap(grid.programs, grid.config, engine.max_model_len, same)
            engine.swap_weights(plan, engine.weight_version + 1)

    drive(engine, requests, draw, swap)
    assert engine.weight_version > 0
    return engine, [request.output() for request in requests]


def disturbed(grid: Grid, drawn: list[Drawn], draw: random.Random) -> Served:
    """Under pressure for pages, half of the requests are cancelled or time out in flight; time is counted in steps.
    Some that were cancelled are asked for again at once, and go first: what they left behind is what they find."""
    engine = grid.engine(num_pages=tight_pages(grid), policy=Priority())
    now = [time.monotonic()]
    engine.deadlines.clock = lambda: now[0]
    requests = []
    for one in drawn:
        kind = draw.random()
        request = one.request(timeout_s=float(draw.randint(2, 60)) if kind < 0.25 else None)
        request.cancelled = kind > 0.75  # it will be, at a drawn moment
        requests.append(request)
    victims, places = [request for request in requests if request.cancelled], {}

    def disturb() -> None:
        now[0] += 1.0
        for request in requests:
            if not request.samples:
                request.arrival = now[0]
        here = [request for request in victims if request.samples and not request.finished]
        half_way = [request for request in here if _half_way(request)]
        if half_way or (here and draw.random() < 0.3):
            victim = draw.choice(half_way or here)
            engine.abort(victim) if draw.random() < 0.5 else engine.cancelled.append(victim)
            if draw.random() < 0.5:
                again = replace(drawn[int(victim.request_id)], priority=-100).request()
                engine.add(again)
                places[again.request_id] = again

    drive(engine, requests, draw, disturb)
    assert all(request.finished for request in places.values())
    reasons = {one.finish_reason for request in requests for one in request.samples}
    assert len(drawn) < 40 or {"abort", "timeout"} <= reasons
    return engine, [places.get(str(one.index), request).output() for one, request in zip(drawn, requests)]


def crowd(config: ModelConfig, seats: int = 256) -> Grid:
    """Programs of one decode width and one chunk size for many seats; the weights are those of seed 0."""
    numerics = Numerics()
    build = Build(max_num_seqs=seats, max_num_batched_tokens=2 * seats, page_size=16, strict=True)
    config, engine = build_engine(config, numerics, random_params(config, numerics, 0), None, build)
    engine.programs.plan = BucketPlan(seats, (seats,), (2 * seats,), engine.programs.plan.prompt_rows)
    engine.programs.compile(progress=False)
    return Grid(config, engine)


@cache
def writer() -> Grid:
    """The tiny model that has a tokenizer, with pages so small that its texts share and lose them."""
    config, sizes = llama_config(**tiny.CONFIG), {**tiny.SIZES, "page_size": 8}
    tokenizer = Tokenizer.load(checkpoint.resolve("demo"))
    llm = LLM.from_config(config, 0, tokenizer=tokenizer, progress=False, strict=True, **sizes)
    return Grid(llm.config, llm.engine)


def together(grid: Grid, drawn: list[Drawn], draw: random.Random) -> Served:
    """All at once, in as many seats as there are."""
    engine, requests, most = grid.engine(), [one.request() for one in drawn], 0
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
        most = max(most, len(engine.scheduler.running))
    settled(engine)
    assert most >= min(len(drawn), engine.scheduler.max_num_seqs) // 2, "they were meant to run together"
    return engine, [request.output() for request in requests]


def _half_way(request: Request) -> bool:
    """Whether a part of the prompt is computed: others may find no more than that."""
    parts = [sample.sequence for sample in request.samples]
    return any(one.computed > 0 and not one.decoding for one in parts)


CONFIGURATIONS: dict[str, Serve] = {
    "plain, a batch": lambda *given: served(*given, overlap=False, cache=False),
    "overlapped": lambda *given: served(*given, cache=False),
    "prefix cache, plain": lambda *given: served(*given, overlap=False),
    "Sarathi-Serve": lambda *given: served(*given, policy=SarathiServe()),
    "SplitFuse": lambda *given: served(*given, policy=SplitFuse(given[0].first.scheduler.max_num_seqs + 17)),
    "prefill first": lambda *given: served(*given, policy=PrefillFirst()),
    "priority": lambda *given: served(*given, policy=Priority(aging=20)),
    "fair": lambda *given: served(*given, policy=Fair({"a": 3.0})),
    "tight pool": lambda *given: served(*given, num_pages=tight_pages(given[0])),
    "tight, no cache": lambda *given: served(*given, num_pages=tight_pages(given[0]), cache=False),
    "segments": segments,
    "weights swapped": swapped,
    "others end": disturbed,
}


def compare(
    grid: Grid, drawn: list[Drawn], expected: list[RequestOutput], serve: Serve, seed: int,
    reference: Grid | None = None,
) -> Tally:  # fmt: skip
    """Serve `drawn` and hold the outputs against those `expected`; the `reference` grid scores differences."""
    engine, outputs = serve(grid, drawn, random.Random(f"serve {seed}"))
    tally = Tally(preemptions=engine.scheduler.preemptions, hits=engine.pages.hit_tokens)
    for one, a, b in zip(drawn, expected, outputs, strict=True):
        tally.compare(reference or grid, one, a, b)
    return tally
