"""Prompts packed back to back in one prefill program against padded layouts of the same program, in one run.

    python benchmarks/prepacking.py [--prompts 64] [--rounds 3]

Padded: every prompt alone in a row, filled up to the longest length (512), or, after sorting by length, to the
longest of its call. Packed: the same prompts a call back to back, padding at the end only (up to a multiple of 512
tokens); and packed full: calls of a fixed size that are filled to the last token, a prompt cut where the call
ends, which is what the engine does. Same model, same kernels; the last row of x of every prompt is compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from common import interleaved, quiet_arguments, still_quiet, table
from tokenloom import LLM
from tokenloom.attention.batch import Shape, pack
from tokenloom.serve.buckets import BucketPlan
from tokenloom.serve.programs import Programs
from tokenloom.serve.sampling.sampler import Sampler

SHORTEST, LONGEST, A_CALL, PAGE, FULL = 16, 512, 8, 16, 2048
DEMO = Path(__file__).resolve().parent.parent / "model" / "demo" / "config.json"


@dataclass(frozen=True)
class Row:
    """`count` tokens of prompt `prompt` from `start`, in a row of `width` tokens: the rest is padding."""

    prompt: int
    start: int
    count: int
    width: int


Call = tuple[int, list[Row]]  # tokens of the program, and its rows


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def layouts(lengths: list[int]) -> dict[str, list[Call]]:
    """Name -> the calls that prefill every prompt."""

    def padded(order: list[int], width: Callable[[list[int]], int]) -> list[Call]:
        calls = [order[at : at + A_CALL] for at in range(0, len(order), A_CALL)]
        return [(len(c) * width(c), [Row(i, 0, lengths[i], width(c)) for i in c]) for c in calls]

    def packed(order: list[int]) -> list[Call]:
        calls = [order[at : at + A_CALL] for at in range(0, len(order), A_CALL)]
        return [
            (up(sum(lengths[i] for i in c), 512), [Row(i, 0, lengths[i], lengths[i]) for i in c])
            for c in calls
        ]

    def full(order: list[int]) -> list[Call]:
        calls, room = [(FULL, [])], FULL
        for i in order:
            start = 0
            while start < lengths[i]:
                if room == 0:
                    calls.append((FULL, []))
                    room = FULL
                count = min(room, lengths[i] - start)
                calls[-1][1].append(Row(i, start, count, count))
                start, room = start + count, room - count
        return calls

    order = list(range(len(lengths)))
    by_length = sorted(order, key=lambda i: lengths[i])
    longest = lambda call: up(max(lengths[i] for i in call), 64)  # noqa: E731
    return {
        f"padded to {LONGEST}": padded(order, lambda call: LONGEST),
        "padded, sorted by length": padded(by_length, longest),
        "packed": packed(order),
        f"packed full, {FULL} tokens a call": full(order),
    }


def compiled(calls: list[Call], prompts: int) -> Programs:
    """The prefill programs of these sizes, for one model, and a pool that holds every prompt."""
    width = LONGEST // PAGE
    llm = LLM.from_config(
        json.loads(DEMO.read_text()), progress=False, max_num_seqs=1, max_num_batched_tokens=32, page_size=PAGE,
        max_model_len=LONGEST, num_pages=prompts * width + 1, prefix_cache=False,
    )  # fmt: skip
    old, rows = llm.engine.programs, max(len(rows) for _, rows in calls)
    plan = BucketPlan(1, (1,), tuple(sorted({size for size, _ in calls})), rows)
    sampler = Sampler(llm.config.vocab_size, prompts)
    programs = Programs(old.graphdef, old.params, old.state, sampler, plan, page_size=PAGE, width=width)
    programs.compile(progress=False)
    return programs


def descriptor(programs: Programs, call: Call, prompts: list[list[int]]) -> tuple[Shape, np.ndarray]:
    size, rows = call
    shape = Shape(0, 1, programs.plan.prompt_rows, size)
    lengths, samples = np.zeros(shape.R, np.int32), np.zeros(shape.R, np.int32)
    seats = np.full(shape.R, len(prompts), np.int32)
    pages = np.zeros((shape.R, programs.width), np.int32)
    starts, tokens = np.zeros(shape.R + 1, np.int32), np.zeros(size, np.int32)
    at = 0
    for index, row in enumerate(rows):
        tokens[at : at + row.count] = prompts[row.prompt][row.start : row.start + row.count]
        lengths[index], seats[index] = row.start + row.width, row.prompt
        samples[index] = row.start + row.count == len(prompts[row.prompt])
        pages[index] = 1 + row.prompt * programs.width + np.arange(programs.width)
        at += row.width
        starts[index + 1 :] = at
    return shape, pack(
        shape, programs.width, lengths=lengths, seats=seats, samples=samples, page_table=pages,
        query_starts=starts, prompt_tokens=tokens,
    )  # fmt: skip


def ends(programs: Programs, calls: list[Call], prompts: list[list[int]]) -> np.ndarray:
    """x of every prompt's last token, [prompts, E]."""
    found: dict[int, np.ndarray] = {}
    for call in calls:
        x, at = np.asarray(programs.step(*descriptor(programs, call, prompts))[1]), 0
        for row in call[1]:
            if row.start + row.count == len(prompts[row.prompt]):
                found[row.prompt] = x[at + row.count - 1]
            at += row.width
    return np.stack([found[i] for i in range(len(prompts))])


def timed(
    programs: Programs, calls: list[Call], prompts: list[list[int]], clock: Callable[[], float]
) -> Callable[[], float]:  # fmt: skip
    steps = [descriptor(programs, call, prompts) for call in calls]

    def run() -> float:
        start = clock()
        for shape, packed in steps:
            sampled, _ = programs.step(shape, packed)
        jax.block_until_ready(sampled.token)
        return clock() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = quiet_arguments(parser, loaded="CPU seconds of all threads")
    clock = time.process_time if arguments.allow_load else time.perf_counter
    draw = np.random.default_rng(0)
    lengths = draw.integers(SHORTEST, LONGEST + 1, arguments.prompts).tolist()
    prompts = [draw.integers(3, 4096, length).tolist() for length in lengths]
    plans = layouts(lengths)
    programs = compiled([call for calls in plans.values() for call in calls], len(prompts))
    want = ends(programs, plans["packed"], prompts)
    for name, calls in plans.items():
        error = np.abs(ends(programs, calls, prompts) - want).max() / np.abs(want).max()
        assert error < 1e-4, f"{name}: x differs by {error:.1e} of its largest entry"
    times = interleaved(
        {name: timed(programs, calls, prompts, clock) for name, calls in plans.items()}, arguments.rounds
    )
    first = next(iter(times.values()))
    rows = [(f"{len(prompts)} prompts of {SHORTEST} to {LONGEST} tokens", "calls", "tokens computed",
             "of them padding", "s", f"time padded to {LONGEST} / it")]  # fmt: skip
    for name, calls in plans.items():
        tokens = sum(size for size, _ in calls)
        rows.append((name, str(len(calls)), f"{tokens:,}", f"{1 - sum(lengths) / tokens:.1%}",
                     f"{times[name]:.2f}", f"{first / times[name]:.2f}"))  # fmt: skip
    print(table(rows))
    still_quiet(arguments)


if __name__ == "__main__":
    main()
