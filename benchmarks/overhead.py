"""What the host costs: engine tokens/s over bare, without telemetry and with it, and from telemetry the share of steps
in which the device waited for the host. Bare is backbone + head dispatched back to back. The prefix cache is on, and
text is made where there is a tokenizer.

python benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import LLAMA_125M, interleaved, quiet_arguments, still_quiet, table
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


def waited(telemetry: Path) -> float:
    """The share of all steps' time in which the device had nothing to do because the host was late."""
    steps = [json.loads(line) for line in telemetry.read_text().splitlines()]
    steps = [step for step in steps if step["line"] == "step"]
    return sum(step["host_gap_s"] for step in steps) / sum(
        step["step_s"] + step["host_gap_s"] for step in steps
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--models", nargs="+", default=["demo", "125M"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = quiet_arguments(parser, "of the figures only the last column says something")
    rows = [
        ("model", "batch", "bare ms", "engine ms", "over bare", "with telemetry ms", "over bare", "waited")
    ]
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
                share = waited(Path(folder) / "run.jsonl")
            b, e, t = times["bare"], times["engine"], times["telemetry"]
            ms = [f"{1e3 * seconds:.3f}" for seconds in (b, e, t)]
            rows.append(
                (name, str(batch), ms[0], ms[1], f"{b / e:.3f}", ms[2], f"{b / t:.3f}", f"{share:.2%}")
            )
    print(table(rows))
    still_quiet(arguments)


if __name__ == "__main__":
    main()
