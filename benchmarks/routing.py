"""Requests that share prefixes, routed to replicas by four rules: what is computed, and how long they take.

    python benchmarks/routing.py [--replicas 4] [--requests 600] [--prefixes 24]

The engine's own scheduler, pages and prefix cache, without a model: a step is a step, outputs have known lengths, so
every figure repeats exactly. A prefix has 512 tokens, a prompt 64 more, an output 64; a replica's pool holds eight
prefixes beside what its 8 seats need, and popular prefixes are asked for more often (Zipf).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from tokenloom.serve.chain import Chain
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.replicas import Replicas, held
from tokenloom.serve.scheduler import Scheduler, Sequence

PREFIX, SUFFIX, OUTPUT, PAGE, SEATS, BUDGET, KEPT = 512, 64, 64, 16, 8, 128, 8


@dataclass(eq=False)
class Asked:
    """A request, as far as a router and a scheduler look at it. Times are steps."""

    prompt_ids: list[int]
    arrived: int
    first: int = 0
    ended: int = 0
    carried: None = None
    cache_salt: None = None
    finished: bool = False


class Simulated:
    """An engine without a device: what it computes is counted, and read one step late."""

    def __init__(self) -> None:
        pages = 1 + (KEPT * PREFIX + SEATS * (PREFIX + SUFFIX + OUTPUT)) // PAGE
        self.pages = PageAllocator(pages, PAGE)
        self.scheduler = Scheduler(self.pages, max_num_seqs=SEATS, budget=BUDGET, prompt_rows=SEATS)
        self.room, self.ready, self.computed, self.now = True, True, 0, 0
        self.in_flight: list[Sequence] = []

    @property
    def busy(self) -> bool:
        return self.scheduler.busy or bool(self.in_flight)

    def add(self, request: Asked) -> None:
        self.scheduler.add(Sequence(request.prompt_ids[:], len(request.prompt_ids) + OUTPUT, owner=request))

    def collect(self) -> list[Any]:
        told = []
        for one in self.in_flight:
            one.pending -= 1
            one.tokens.append(1)
            request: Asked = one.owner
            request.first = request.first or self.now
            told.append(SimpleNamespace(request=request))
            if len(one.tokens) >= one.limit:
                request.ended, request.finished = self.now, True
                self.scheduler.finish(one)
        self.in_flight = []
        return told

    def dispatch(self) -> None:
        self.now += 1
        work = self.scheduler.schedule()
        if work is not None:
            self.computed += sum(chunk.count for chunk in work.chunks)
            self.in_flight = [*work.decodes, *(chunk.sequence for chunk in work.chunks if chunk.final)]


def load(one: Any) -> int:
    return len(one.scheduler.waiting) + len(one.scheduler.running)


def cached(one: Any, request: Any) -> int:
    return held(one.pages, Chain(), request.prompt_ids)


def in_turn() -> Callable[[Replicas, Any], Any]:
    """Each replica after the other."""
    places = iter(range(1 << 30))
    return lambda replicas, _: replicas.replicas[next(places) % len(replicas.replicas)]


RULES: dict[str, Callable[[], Callable[[Replicas, Any], Any] | None]] = {
    "as engines route": lambda: None,
    "in turn": in_turn,
    "fewest sequences": lambda: lambda replicas, _: min(replicas.replicas, key=load),
    "longest prefix, then fewest": lambda: (
        lambda replicas, request: min(replicas.replicas, key=lambda one: (-cached(one, request), load(one)))
    ),
}


class Ruled(Replicas):
    """Replicas that route by another rule."""

    rule: Callable[[Replicas, Any], Any] | None = None

    def route(self, request: Any) -> Any:
        if self.rule is None:
            return super().route(request)
        best = self.rule(self, request)
        return best, len(request.prompt_ids) - cached(best, request)


def run(name: str, arguments: argparse.Namespace) -> str:
    """A row: prompt tokens computed, steps, and steps to the first token and to the end."""
    draw = random.Random(0)
    heads = [[draw.randrange(1 << 20) for _ in range(PREFIX)] for _ in range(arguments.prefixes)]
    weights = [1 / (rank + 1) for rank in range(arguments.prefixes)]
    waiting, clock = [], 0.0
    for head in draw.choices(heads, weights, k=arguments.requests):
        clock += draw.expovariate(arguments.rate * arguments.replicas)
        waiting.append(Asked([*head, *(draw.randrange(1 << 20) for _ in range(SUFFIX))], int(clock)))
    engines = [Simulated() for _ in range(arguments.replicas)]
    replicas = Ruled(engines)  # type: ignore[arg-type]
    replicas.rule = RULES[name]()
    asked, at = list(waiting), 0
    while waiting or replicas.busy:
        while waiting and waiting[0].arrived <= at:
            replicas.add(waiting.pop(0))  # type: ignore[arg-type]
        replicas.step()
        at += 1
        for one in engines:
            one.now = at
    first = fmean(one.first - one.arrived for one in asked)
    ended = sorted(one.ended - one.arrived for one in asked)
    return (
        f"| {name} | {sum(one.computed for one in engines):,} | {at:,} | {first:.1f} | {fmean(ended):.1f} | "
        f"{ended[int(0.99 * len(ended))]} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--prefixes", type=int, default=24)
    parser.add_argument("--rate", type=float, default=0.1, help="requests a step and replica")
    arguments = parser.parse_args()
    print(
        "| rule | prompt tokens computed | steps | steps to the first token | to the end | to the end, p99 |"
    )
    print("|---|---|---|---|---|---|")
    for name in RULES:
        print(run(name, arguments), flush=True)


if __name__ == "__main__":
    main()
