"""Temporal fusion (Flover): requests joined at every token against batches of whole requests, on the same programs;
and what dense slots [slots, max_len] cost in moves where paged seats cost none.

    python benchmarks/flover.py [--requests 64]

Requests of 16 prompt tokens and 16 to 256 outputs, 8 at once. Batched by request: eight start together and the next
eight when all have ended. Fused: a seat that is free is taken at the next step. Tokens a step are counts.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from common import interleaved, quiet_arguments, still_quiet, table
from slots import compact
from tokenloom import LLM, SamplingParams

SEATS, PROMPT, SHORTEST, LONGEST = 8, 16, 16, 256
DEMO = Path(__file__).resolve().parent.parent / "model" / "demo" / "config.json"


def dense_moves(lengths: list[int], slots: int, *, every: bool) -> tuple[int, int]:
    """(moves, tokens moved) of dense slots that take requests in order, one a step as Flover does, behind the live
    ones. `every`: compacted whenever a slot ends inside, as Flover does; else only when the live slots fit a
    smaller power of two than they span, which is what programs of fixed widths need."""
    waiting, left, moves, tokens = list(reversed(lengths)), [0] * slots, 0, 0
    written = [0] * slots
    first = 0
    while waiting or any(left):
        live = [one > 0 for one in left]
        holds = [slot for slot in range(slots) if live[slot]]
        inside = bool(holds) and holds[-1] - holds[0] + 1 > len(holds)
        if inside and (every or width(len(holds)) < width(holds[-1] - holds[0] + 1)):
            first, plan = compact(live)
            for source, target in plan:
                moves, tokens = moves + 1, tokens + PROMPT + written[source]
                left[target], written[target], left[source] = left[source], written[source], 0
        if waiting and not all(left):
            slot = next(s for s in (*range(first, slots), *range(first)) if left[s] == 0)
            left[slot], written[slot] = waiting.pop(), 0
        for slot in range(slots):
            if left[slot]:
                left[slot], written[slot] = left[slot] - 1, written[slot] + 1
    return moves, tokens


def width(count: int) -> int:
    return 1 << (count - 1).bit_length()


def contender(
    llm: LLM, prompts: list[list[int]], lengths: list[int], at_once: int, seen: dict
) -> Callable[[], float]:
    """Seconds of all requests, `at_once` a call; `seen` gets the steps."""
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]

    def run() -> float:
        steps, start = llm.engine.steps, time.perf_counter()
        for at in range(0, len(prompts), at_once):
            llm.generate(prompts[at : at + at_once], params[at : at + at_once], use_tqdm=False)
        seen["steps"] = llm.engine.steps - steps
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = quiet_arguments(parser, loaded="the seconds below mean little")
    draw, raw = random.Random(0), json.loads(DEMO.read_text())
    prompts = [[draw.randrange(3, 4096) for _ in range(PROMPT)] for _ in range(arguments.requests)]
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in prompts]
    llm = LLM.from_config(
        raw, progress=False, max_num_seqs=SEATS, max_num_batched_tokens=128, max_model_len=PROMPT + LONGEST,
        prefix_cache=False,
    )  # fmt: skip
    seen: dict[str, dict] = {"batches of whole requests": {}, "fused at every token": {}}
    sizes = dict(zip(seen, (SEATS, len(prompts))))
    times = interleaved(
        {name: contender(llm, prompts, lengths, sizes[name], seen[name]) for name in seen}, arguments.rounds
    )
    slow = next(iter(times.values()))
    rows = [(f"{len(prompts)} requests, {SEATS} at once", "steps", "output tokens a step", "s", "speed")]
    for name, one in seen.items():
        rows.append((name, str(one["steps"]), f"{sum(lengths) / one['steps']:.2f}", f"{times[name]:.2f}",
                     f"{slow / times[name]:.2f}"))  # fmt: skip
    print(table(rows))
    a_token = 2 * 4 * raw["num_hidden_layers"] * raw["num_key_value_heads"] * raw["head_dim"]
    rows = [
        ("where K and V lie", "moves", "MB moved", "moves a request", "tokens of room reserved a request")
    ]
    for name, every in (
        ("dense slots, compacted at each hole", True),
        ("dense slots, when a smaller width fits", False),
    ):
        moves, tokens = dense_moves(lengths, SEATS, every=every)
        rows.append((name, str(moves), f"{tokens * a_token / 1e6:.1f}", f"{moves / len(prompts):.2f}",
                     str(PROMPT + LONGEST)))  # fmt: skip
    page = llm.engine.pages.page_size
    mean = sum(-(-(PROMPT + n) // page) * page for n in lengths) / len(lengths)
    rows.append((f"pages of {page}", "0", "0", "0", f"{mean:.0f} at the end"))
    print(table(rows))
    still_quiet(arguments)


if __name__ == "__main__":
    main()
