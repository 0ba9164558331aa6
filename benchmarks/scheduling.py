"""What a step's scheduling costs on the host when few wait and when very many do, with no device.

    python benchmarks/scheduling.py [--waiting 100 100000] [--steps 400]

Medians in microseconds of a call of `Scheduler.schedule`, of joining the queue and of leaving it unserved, for each
online policy; the last column is the largest queue's step over the smallest's, which may be 2 at most.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable

from common import table
from tokenloom import Fair, PrefillFirst, Priority, SarathiServe, SplitFuse
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.policies.policy import Policy
from tokenloom.serve.scheduler import Scheduler, Sequence

MAKERS: dict[str, Callable[[], Policy]] = {
    "Sarathi-Serve": SarathiServe,
    "SplitFuse": SplitFuse,
    "prefill first": PrefillFirst,
    "priority": lambda: Priority(aging=20),
    "fair": Fair,
}
LIMIT = 2.0


def timed(action: Callable[[], object], times: list[float]) -> object:
    start = time.perf_counter()
    found = action()
    times.append(time.perf_counter() - start)
    return found


def measure(policy: Policy, waiting: int, steps: int) -> tuple[float, float, float]:
    """(s of a step, of joining, of leaving): medians. A pool that preempts; one sequence leaves and joins a step."""
    draw = random.Random(0)
    pages = PageAllocator(600, 16)
    scheduler = Scheduler(pages, max_num_seqs=32, budget=512, prompt_rows=8, policy=policy)
    serial = 0

    def fresh() -> Sequence:
        nonlocal serial
        serial += 1
        length = draw.randint(20, 200)
        prompt = [serial] * length  # nobody shares
        return Sequence(prompt, length + draw.randint(1, 100), priority=draw.randrange(3),
                        tenant=f"tenant {draw.randrange(1000)}")  # fmt: skip

    queue = [fresh() for _ in range(waiting)]
    for one in queue:
        scheduler.add(one)
    step, join, leave = [], [], []
    for at in range(steps):
        timed(scheduler.schedule, step)
        for sequence in list(scheduler.running):  # as if every step were read at once
            while sequence.pending:
                sequence.pending -= 1
                sequence.tokens.append(7)
            if len(sequence.tokens) >= sequence.limit:
                scheduler.finish(sequence)
        timed(lambda: scheduler.add(fresh()), join)
        victim = queue[-1 - at % len(queue)]
        if victim.seat < 0 and not victim.finished:
            timed(lambda one=victim: scheduler.finish(one), leave)
    kept = step[steps // 8 :]  # the first steps admit a full batch
    return statistics.median(kept), statistics.median(join), statistics.median(leave)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--waiting", type=int, nargs="+", default=[100, 100_000])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[tuple[str, ...]] = [
        ("policy", "waiting", "step us", "join us", "leave us", "step over the first")
    ]
    worst = 0.0
    for name, make in MAKERS.items():
        first = 0.0
        for waiting in arguments.waiting:
            rounds = [measure(make(), waiting, arguments.steps) for _ in range(arguments.rounds)]
            step, join, leave = (min(values) for values in zip(*rounds))
            first = first or step
            worst = max(worst, step / first)
            numbers = (f"{1e6 * value:.1f}" for value in (step, join, leave))
            rows.append((name, str(waiting), *numbers, f"{step / first:.2f}"))
    print(table(rows))
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
