"""64 requests of mixed lengths against transformers' static and continuous batching, one run, same weights.

    python benchmarks/mixed.py [--model 125M|demo] [--requests 64] [--seats 32]

Static batching: batches in order of arrival, left-padded, each running until its longest output is done, in sizes
of 8 and of all seats. Continuous batching: transformers' own, as many requests at once as we take. Every request
generates exactly its own number of tokens (end tokens are ignored). The model: 125M shapes with random weights, or the
embedded one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import checkpoint, quiet_arguments, read_bandwidth, still_quiet, table
from tokenloom import LLM, SamplingParams
from tokenloom.model.checkpoint import resolve

VOCABULARY = {"125M": 32000, "demo": 4096}


def requests(count: int, vocabulary: int) -> tuple[list[list[int]], list[int]]:
    draw = np.random.default_rng(2)
    prompts = [draw.integers(3, vocabulary, n).tolist() for n in draw.integers(16, 257, count)]
    return prompts, draw.integers(8, 129, count).tolist()


def tokenloom(folder: Path, prompts: list[list[int]], outputs: list[int], seats: int) -> Callable[[], float]:
    llm = LLM(
        folder, max_num_seqs=seats, max_model_len=512, progress=False, skip_tokenizer_init=True,
        max_num_batched_tokens=512, prefix_cache=False,
    )  # fmt: skip
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in outputs]

    def run() -> float:
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    return run


def static(folder: Path, prompts: list[list[int]], outputs: list[int], size: int) -> Callable[[], float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def run() -> float:
        start = time.perf_counter()
        for at in range(0, len(prompts), size):
            group, tokens = prompts[at : at + size], max(outputs[at : at + size])
            width = max(map(len, group))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in group])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in group])
            with torch.no_grad():
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                    pad_token_id=0,
                )  # fmt: skip
        return time.perf_counter() - start

    return run


def continuous(folder: Path, prompts: list[list[int]], outputs: list[int], seats: int) -> Callable[[], float]:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max(outputs))
    # The pool: room for every seat at full length, as ours has.
    settings = ContinuousBatchingConfig(block_size=32, num_blocks=seats * 16, max_batch_tokens=512)

    def run() -> float:
        start, done = time.perf_counter(), 0
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=settings
        ) as manager:
            for prompt, count in zip(prompts, outputs):
                manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
            while done < len(prompts):
                result = manager.get_result(timeout=60)
                if result is None:
                    raise RuntimeError("transformers' continuous batching stopped")
                done += 1
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=VOCABULARY, default="125M")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seats", type=int, default=32, help="sequences at once")
    parser.add_argument("--only", nargs="+", default=["static", "continuous"])
    arguments = quiet_arguments(parser, "ratios of one run say something, times do not")
    print(f"read bandwidth {read_bandwidth():.1f} GB/s")
    folder = resolve("demo") if arguments.model == "demo" else checkpoint()
    prompts, outputs = requests(arguments.requests, VOCABULARY[arguments.model])
    seats = arguments.seats
    contenders = {f"tokenloom, {seats} seats": tokenloom(folder, prompts, outputs, seats)}
    ours = next(iter(contenders))
    if "static" in arguments.only:
        for size in sorted({8, seats}):
            contenders[f"transformers, static batches of {size}"] = static(folder, prompts, outputs, size)
    if "continuous" in arguments.only:
        contenders["transformers, continuous batching"] = continuous(folder, prompts, outputs, seats)
    times = dict.fromkeys(contenders, float("inf"))
    for _ in range(
        arguments.rounds
    ):  # our programs are compiled already, transformers has nothing to warm up
        for name, run in contenders.items():
            times[name] = min(times[name], run())
    total = sum(outputs)
    rows = [(f"{len(prompts)} requests", "s", "output tokens/s", "time / tokenloom")]
    for name, value in times.items():
        rows.append((name, f"{value:.2f}", f"{total / value:.1f}", f"{value / times[ours]:.2f}"))
    print(table(rows))
    still_quiet(arguments)


if __name__ == "__main__":
    main()
