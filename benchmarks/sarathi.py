"""Streams while long prompts arrive: Sarathi-Serve's stall-free batching against prefill first, in one run.

    python benchmarks/sarathi.py [--prompts 6] [--rounds 3] [--load 0.9]

Six streams write; prompts of 4,096 tokens arrive at fixed times, so that they alone would keep the machine busy for
`load` of the time. The longest gap between two tokens of a stream is counted in steps, which does not depend on the
machine, and timed. A tiny model: the counts are what matters, the times show the same order.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import numpy as np
from common import quiet_arguments, still_quiet, table
from tokenloom import LLM, PrefillFirst, SamplingParams, SarathiServe

PROMPT, OUTPUT, STREAMS, STREAM_PROMPT, BUDGET = 4096, 16, 6, 32, 512
TINY = dict(
    model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, intermediate_size=128, vocab_size=512, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope_theta=10000.0, tie_word_embeddings=True, hidden_act="silu", torch_dtype="float32",
)  # fmt: skip


def build(policy, budget: int) -> LLM:
    return LLM.from_config(
        TINY, progress=False, policy=policy, max_num_seqs=8, max_num_batched_tokens=budget,
        max_model_len=PROMPT + 512, prefix_cache=False,
    )  # fmt: skip


def params(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def alone(llm: LLM) -> float:
    """Seconds of one long prompt and its output."""
    draw = random.Random(1)
    start = time.perf_counter()
    llm.generate([draw.randrange(512) for _ in range(PROMPT)], params(OUTPUT), use_tqdm=False)
    return time.perf_counter() - start


def scenario(llm: LLM, prompts: int, interval: float, settle: int = 20) -> dict[str, list[float]]:
    """Gaps of the streams (steps and ms) from the first long prompt's arrival to the last one's end, and the ms
    from each long prompt's arrival to its first token."""
    draw, engine = random.Random(2), llm.engine
    preemptions = engine.scheduler.preemptions

    def submit(length: int, tokens: int):
        return llm.enqueue(None, [draw.randrange(512) for _ in range(length)], params(tokens))

    streams = [submit(STREAM_PROMPT, PROMPT) for _ in range(STREAMS)]
    for _ in range(settle):
        engine.step()
    last: dict[object, tuple[int, float]] = {}
    found: dict[str, list[float]] = {"steps": [], "ms": [], "first": []}
    arrivals, waiting, step = [interval * i for i in range(prompts)], {}, 0
    start = time.perf_counter()
    while arrivals or waiting:
        while arrivals and time.perf_counter() - start >= arrivals[0]:
            waiting[submit(PROMPT, OUTPUT)] = start + arrivals.pop(0)
        advanced, now, step = engine.step(), time.perf_counter(), step + 1
        for sample in advanced:
            request = sample.request
            if request in waiting:
                if len(sample.token_ids) == 1:
                    found["first"].append(1e3 * (now - waiting[request]))
                if request.finished:
                    del waiting[request]
                continue
            if request in last:
                found["steps"].append(step - last[request][0])
                found["ms"].append(1e3 * (now - last[request][1]))
            last[request] = step, now
    assert not any(stream.finished for stream in streams), "the streams were meant to last"
    assert engine.scheduler.preemptions == preemptions
    llm.abort()
    while engine.busy:
        engine.step()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.9)
    arguments = quiet_arguments(parser, loaded="the ms below mean little")
    makers: dict[str, Callable[[], LLM]] = {
        f"SarathiServe, budget {BUDGET}": lambda: build(SarathiServe(), BUDGET),
        f"PrefillFirst, budget {BUDGET}": lambda: build(PrefillFirst(), BUDGET),
        "PrefillFirst, whole prompts": lambda: build(PrefillFirst(), PROMPT + 512),
    }
    llms = {name: make() for name, make in makers.items()}
    interval = max(min(alone(llm) for _ in range(3)) for llm in llms.values()) / arguments.load
    found: dict[str, dict[str, list[float]]] = {name: {"steps": [], "ms": [], "first": []} for name in llms}
    for _ in range(arguments.rounds):
        for name, llm in llms.items():
            for key, values in scenario(llm, arguments.prompts, interval).items():
                found[name][key] += values
    rows = [(f"{STREAMS} streams, a prompt of {PROMPT:,} every {interval * 1e3:.0f} ms", "longest gap, steps",
             "longest gap, ms", "p99 gap, ms", "median gap, ms", "first token of a prompt, mean ms")]  # fmt: skip
    for name, one in found.items():
        ms = np.array(one["ms"])
        rows.append((name, f"{max(one['steps']):.0f}", f"{ms.max():.1f}", f"{np.quantile(ms, 0.99):.1f}",
                     f"{np.median(ms):.2f}", f"{np.mean(one['first']):.0f}"))  # fmt: skip
    print(table(rows))
    still_quiet(arguments)


if __name__ == "__main__":
    main()
