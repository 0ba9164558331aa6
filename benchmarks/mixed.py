"""64 requests of mixed lengths against transformers' static batching, one run, same weights.

    python benchmarks/mixed.py [--requests 64]

Static batching: batches of 8 in order of arrival, left-padded, each running until its longest output is done.
Every request generates exactly its own number of tokens (end tokens are ignored).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from common import LLAMA_125M, checkpoint, interleaved, read_bandwidth, require_quiet, table
from tokenloom import LLM, SamplingParams

SEATS = 8


def requests(count: int) -> tuple[list[list[int]], list[int]]:
    draw = np.random.default_rng(2)
    prompts = [draw.integers(3, LLAMA_125M["vocab_size"], n).tolist() for n in draw.integers(16, 257, count)]
    return prompts, draw.integers(8, 129, count).tolist()


def tokenloom(prompts: list[list[int]], outputs: list[int]) -> Callable[[], float]:
    llm = LLM(
        checkpoint(), max_num_seqs=SEATS, max_model_len=512, progress=False, skip_tokenizer_init=True,
        max_num_batched_tokens=512,
    )  # fmt: skip
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in outputs]

    def run() -> float:
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    return run


def static(prompts: list[list[int]], outputs: list[int]) -> Callable[[], float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)

    def run() -> float:
        start = time.perf_counter()
        for at in range(0, len(prompts), SEATS):
            group, tokens = prompts[at : at + SEATS], max(outputs[at : at + SEATS])
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    require_quiet()
    print(f"read bandwidth {read_bandwidth():.1f} GB/s")
    prompts, outputs = requests(arguments.requests)
    contenders = {
        "tokenloom": tokenloom(prompts, outputs),
        "transformers, static batches of 8": static(prompts, outputs),
    }
    times = interleaved(contenders, arguments.rounds)
    total = sum(outputs)
    rows = [(f"{len(prompts)} requests", "s", "output tokens/s", "time / tokenloom")]
    for name, value in times.items():
        rows.append((name, f"{value:.2f}", f"{total / value:.1f}", f"{value / times['tokenloom']:.2f}"))
    print(table(rows))
    require_quiet()


if __name__ == "__main__":
    main()
