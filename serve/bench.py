"""Prefill and decode speed of an engine, measured through its public interface."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from .llm import LLM
from .sampling.params import SamplingParams


def measure(llm: LLM, batch: int, prompt_len: int, output_len: int, repeat: int) -> Iterator[str]:
    """Yield a line for prefill and one for decode: the best of `repeat` runs, in tokens/s and ms a step.

    Prompts are random ids; `output_len` tokens are generated past any end token.
    """
    draw = random.Random(0)
    prompts = [[draw.randrange(llm.config.vocab_size) for _ in range(prompt_len)] for _ in range(batch)]

    def run(tokens: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.reset_prefix_cache()
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    run(2)
    prefill = min(run(1) for _ in range(repeat))
    whole = min(run(output_len) for _ in range(repeat))
    step = (whole - prefill) / max(output_len - 1, 1)
    yield f"prefill  {batch * prompt_len / prefill:10.1f} tokens/s  ({batch} x {prompt_len} in {prefill:.4f} s)"
    if output_len > 1:
        yield f"decode   {batch / step:10.1f} tokens/s  ({step * 1e3:.3f} ms a step of {batch})"
