"""What to reserve at admission: nothing, a quantile of the output lengths, or max_tokens, at equal pools.

    python benchmarks/castillo.py [--requests 600]

The real scheduler and page allocator without a device (`tests/simulated.py`): counts and steps, no times, so the
table does not depend on the machine. Requests of two tenants, both with max_tokens 512: short answers (mean 40) and
long ones (mean 160), a tenth of them degenerate to the limit, as CASTILLO's data show.
"""

from __future__ import annotations

import argparse
import random

from common import table
from tokenloom import Castillo, SarathiServe
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.policies.castillo import Empirical
from tokenloom.serve.scheduler import Scheduler, Sequence
from tokenloom.tests.simulated import Reserving, simulate

LIMIT, PAGE, SEATS, BUDGET = 512, 16, 64, 512


class Oracle:
    """Knows the true lengths."""

    def remaining(self, sequence: Sequence, written: int, most: int) -> tuple[float, float]:
        return float(min(sequence.owner - written, most)), 0.0

    def learn(self, sequence: Sequence, written: int, complete: bool) -> None:
        del sequence, written, complete


def learned() -> Empirical:
    """What another 2,000 requests of the two tenants taught."""
    lengths = Empirical()
    for one in requests(2000, seed=1):
        lengths.learn(one, one.owner, one.owner < LIMIT)
    return lengths


def requests(count: int, seed: int = 0) -> list[Sequence]:
    draw, found = random.Random(seed), []
    for number in range(count):
        tenant, mean = draw.choice([("short", 40), ("long", 160)])
        length = LIMIT if draw.random() < 0.1 else min(1 + int(draw.expovariate(1 / mean)), LIMIT)
        prompt = [number % 4096] * draw.randint(16, 256)
        found.append(Sequence(prompt, len(prompt) + LIMIT, owner=length, tenant=tenant))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=600)
    arguments = parser.parse_args()
    policies = {
        "nothing (SarathiServe)": SarathiServe,
        "quantile 0.9, next 32 tokens": lambda: Castillo(0.9, horizon=32),
        "quantile 0.9, next 64 tokens": lambda: Castillo(0.9, horizon=64),
        "quantile 0.9, next 128 tokens": lambda: Castillo(0.9, horizon=128),
        "quantile 0.5, to the end": lambda: Castillo(0.5, horizon=None),
        "quantile 0.9, to the end": lambda: Castillo(0.9, horizon=None),
        "quantile 0.99, to the end": lambda: Castillo(0.99, horizon=None),
        "quantile 0.9, next 64, lengths learned before": lambda: Castillo(0.9, learned()),
        "... and shortest first": lambda: Castillo(0.9, learned(), shortest_first=True),
        "... and lengths known": lambda: Castillo(0.9, Oracle(), shortest_first=True),
        "max_tokens": Reserving,
    }
    for num_pages in (400, 800):
        rows = [(f"{num_pages} pages of {PAGE}; reserved:", "preemptions", "prefilled / prompt tokens",
                 "running, mean", "steps", "latency, mean steps", "latency, p99")]  # fmt: skip
        for name, make in policies.items():
            pages = PageAllocator(num_pages, PAGE)
            scheduler = Scheduler(pages, max_num_seqs=SEATS, budget=BUDGET, prompt_rows=8, policy=make())
            drawn = requests(arguments.requests)
            found = simulate(scheduler, drawn)
            latency = sorted(found.latency)
            rows.append((name, str(found.preemptions),
                         f"{found.computed / sum(len(one.tokens) for one in drawn):.2f}",
                         f"{found.mean_running:.1f}", str(found.steps), f"{found.mean_latency:.0f}",
                         str(latency[int(0.99 * len(latency))])))  # fmt: skip
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
