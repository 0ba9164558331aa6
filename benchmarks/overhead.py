"""Engine tokens/s over bare: what the host costs, without telemetry and with it. Bare is backbone + head dispatched
back to back. The prefix cache is on, and text is made where there is a tokenizer.

python benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import LLAMA_125M, interleaved, require_quiet, table
from tokenloom import LLM, SamplingParams
from tokenloom.attention.batch import Shape, pack

CONTEXT = 64


def make(name: str, sizes: dict[str, Any]) -> LLM:
    return LLM("demo", **sizes) if name == "demo" else LLM.from_config(LLAMA_125M, **sizes)


def engine(llm: LLM, batch: int, steps: int) -> Callable[[], float]:
    """s a decode step of the engine, streaming text where there is a tokenizer."""
    draw = np.random.default_rng(3)
    prompts = [draw.integers(3, llm.config.vocab_size, CONTEXT - steps // 2).tolist() for _ in range(batch)]

    def run() -> float:
        times = []
        for tokens in (1, steps + 1):
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            times.append(time.perf_counter() - start)
        return (times[1] - times[0]) / steps

    return run


def bare(llm: LLM, batch: int, steps: int) -> Callable[[], float]:
    """s a step of the two programs alone, at the mean context length, with nothing read but the end."""
    programs = llm.engine.programs
    shape = Shape(batch, 1, 0, 0)
    pages = -(-CONTEXT // programs.page_size)
    table = np.zeros((batch, programs.width), np.int32)
    table[:, :pages] = 1 + np.arange(batch * pages).reshape(batch, pages)
    packed = pack(
        shape, programs.width, lengths=np.full(batch, CONTEXT), seats=np.arange(batch),
        samples=np.ones(batch), page_table=table, query_starts=np.zeros(1), prompt_tokens=np.zeros(0),
    )  # fmt: skip

    def run() -> float:
        sampled = programs.step(shape, packed)[0]
        sampled.token.block_until_ready()
        start = time.perf_counter()
        for _ in range(steps):
            sampled = programs.step(shape, packed)[0]
        sampled.token.block_until_ready()
        return (time.perf_counter() - start) / steps

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--models", nargs="+", default=["demo", "125M"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    require_quiet()
    rows = [("model", "batch", "bare ms", "engine ms", "over bare", "with telemetry ms", "over bare")]
    for name in arguments.models:
        for batch in (1, 8):
            sizes = dict(max_num_seqs=batch, max_model_len=512, max_num_batched_tokens=256, progress=False)
            steps = arguments.steps
            with tempfile.TemporaryDirectory() as folder:
                plain, measured = make(name, sizes), make(name, {**sizes, "telemetry": f"{folder}/run.jsonl"})
                contenders = {
                    "engine": engine(plain, batch, steps), "telemetry": engine(measured, batch, steps),
                    "bare": bare(plain, batch, steps),
                }  # fmt: skip
                times = interleaved(contenders, arguments.rounds)
                plain.close()
                measured.close()
            b, e, t = times["bare"], times["engine"], times["telemetry"]
            ms = [f"{1e3 * seconds:.3f}" for seconds in (b, e, t)]
            rows.append((name, str(batch), ms[0], ms[1], f"{b / e:.3f}", ms[2], f"{b / t:.3f}"))
    print(table(rows))
    require_quiet()


if __name__ == "__main__":
    main()
