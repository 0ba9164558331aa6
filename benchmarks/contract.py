"""The exactness contract in full: drawn requests served in every way, held against each alone in the plain driver.

    python benchmarks/contract.py [--requests 2000] [--seed 0] [--shapes llama recurrent hybrid text]

Excused are near ties and edges of truncations (`tests/contract.py`), at most one in 10,000 tokens; wrong is anything
else. Recurrent state, hybrids and text get a third of the requests each.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from common import table
from tokenloom.tests.configurations import CONFIGURATIONS, alone, compare, crowd, together, writer
from tokenloom.tests.contract import Grid, Tally
from tokenloom.tests.drawn import draw_requests
from tokenloom.tests.engines import engine
from tokenloom.tests.shapes import llama

SHAPES = ("llama", "recurrent", "hybrid", "text")


def measure(shape: str, count: int, seed: int) -> list[tuple[str, Tally]]:
    """(configuration, tally) of all configurations on one shape."""
    text = shape == "text"
    grid = writer() if text else Grid(engine(shape).config, engine(shape).engine)
    drawn = draw_requests(count, seed, grid.config.vocab_size, prompt=80 if text else 120, text=text)
    start = time.perf_counter()
    _, expected = alone(grid, drawn, random.Random(seed))
    print(f"{shape}: {count} requests alone in {time.perf_counter() - start:.0f} s", flush=True)
    found = []
    ways = [(name, grid, serve) for name, serve in CONFIGURATIONS.items()]
    if shape == "llama":
        ways.append(("256 seats", crowd(llama()), together))
    for name, served, serve in ways:
        tally = compare(served, drawn, expected, serve, seed, reference=grid)
        found.append((f"{shape}: {name}", tally))
        print(f"{shape}: {name}: {tally.tokens} tokens, {tally.excused} excused, {len(tally.wrong)} wrong",
              *tally.wrong[:3], sep="\n", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    arguments = parser.parse_args()
    rows: list[tuple[str, ...]] = [
        ("configuration", "requests", "tokens", "near ties", "edges", "wrong", "preemptions", "hits")
    ]
    failed = False
    for shape in arguments.shapes:
        count = arguments.requests if shape == "llama" else -(-arguments.requests // 3)
        for name, tally in measure(shape, count, arguments.seed):
            numbers = (tally.requests, tally.tokens, tally.near_ties, tally.edges, len(tally.wrong),
                       tally.preemptions, tally.hits)  # fmt: skip
            rows.append((name, *map(str, numbers)))
            failed |= bool(tally.wrong) or tally.excused > tally.allowed
    print(table(rows))
    sys.exit(failed)


if __name__ == "__main__":
    main()
