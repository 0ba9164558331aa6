"""Decode per token against transformers `generate`: the same weights, one run, interleaved.

    python benchmarks/decode.py [--batch 1 8]

Prints ms a step and ratios, with a read-bandwidth probe beside them. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import LLAMA_125M, checkpoint, interleaved, read_bandwidth, require_quiet, table
from tokenloom import LLM, SamplingParams

PROMPT, OUTPUT = 32, 33


def prompt_ids(batch: int, length: int = PROMPT) -> np.ndarray:
    return np.random.default_rng(1).integers(3, LLAMA_125M["vocab_size"], (batch, length))


def tokenloom(dtype: str, batch: int, **more: Any) -> Callable[[], float]:
    """ms a decode step: the time of OUTPUT tokens less that of one; `more` are options of `LLM`."""
    llm = LLM(
        checkpoint(), dtype=dtype, max_num_seqs=batch, max_model_len=512, progress=False,
        skip_tokenizer_init=True, max_num_batched_tokens=256, prefix_cache=False, **more,
    )  # fmt: skip
    prompts = prompt_ids(batch).tolist()

    def run() -> float:
        times = []
        for tokens in (1, OUTPUT):
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            times.append(time.perf_counter() - start)
        return (times[1] - times[0]) / (OUTPUT - 1) * 1e3

    return run


def transformers(dtype: str, batch: int) -> Callable[[], float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=getattr(torch, dtype))
    ids = torch.tensor(prompt_ids(batch))

    def run() -> float:
        times = []
        for tokens in (1, OUTPUT):
            start = time.perf_counter()
            with torch.no_grad():
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                    do_sample=False, pad_token_id=0,
                )  # fmt: skip
            times.append(time.perf_counter() - start)
        return (times[1] - times[0]) / (OUTPUT - 1) * 1e3

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    require_quiet()
    print(f"read bandwidth {read_bandwidth():.1f} GB/s")
    for batch in arguments.batch:
        contenders = {
            "tokenloom float32": tokenloom("float32", batch),
            "tokenloom bfloat16-stored": tokenloom("bfloat16", batch),
            "transformers float32": transformers("float32", batch),
            "transformers bfloat16": transformers("bfloat16", batch),
        }
        times = interleaved(contenders)
        ours = times["tokenloom float32"]
        rows = [(f"batch {batch}", "ms a step", "time / tokenloom float32")]
        rows += [(name, f"{value:.2f}", f"{value / ours:.2f}") for name, value in times.items()]
        print(table(rows), flush=True)
    require_quiet()


if __name__ == "__main__":
    main()
