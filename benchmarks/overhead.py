"""Engine tokens/s over bare: what the host costs. Bare is backbone + head dispatched back to back.

python benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from common import LLAMA_125M, interleaved, require_quiet, table
from tokenloom import LLM, SamplingParams
from tokenloom.attention.batch import Shape, pack

CONTEXT = 64


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
    arguments = parser.parse_args()
    require_quiet()
    rows = [("model", "batch", "engine ms", "bare ms", "engine tokens/s over bare")]
    for name in arguments.models:
        for batch in (1, 8):
            sizes = dict(max_num_seqs=batch, max_model_len=512, max_num_batched_tokens=256, progress=False)
            llm = LLM("demo", **sizes) if name == "demo" else LLM.from_config(LLAMA_125M, **sizes)
            steps = arguments.steps
            times = interleaved({"engine": engine(llm, batch, steps), "bare": bare(llm, batch, steps)})
            e, b = times["engine"], times["bare"]
            rows.append((name, str(batch), f"{e * 1e3:.3f}", f"{b * 1e3:.3f}", f"{b / e:.3f}"))
            llm.close()
    print(table(rows))
    require_quiet()


if __name__ == "__main__":
    main()
