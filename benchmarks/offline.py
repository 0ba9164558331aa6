"""An offline job with shared prefixes: BatchLLM's order against first come with an LRU prefix cache.

    python benchmarks/offline.py [--requests 512] [--model tiny demo]

Prefixes of 1,024 tokens, suffixes of 64, outputs of 32, shuffled arrivals, and a page pool that holds three
prefixes beside what running requests need. Prompt tokens computed are a count: they do not depend on the machine
nor on the model. "least" computes every prefix once and every suffix once.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from common import quiet_arguments, still_quiet, table
from tokenloom import LLM, BatchLLM, SamplingParams, SarathiServe

PREFIXES, PREFIX, SUFFIX, OUTPUT, SEATS, PAGE = 8, 1024, 64, 32, 16, 16
DEMO = Path(__file__).resolve().parent.parent / "model" / "demo" / "config.json"
TINY = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            intermediate_size=32, vocab_size=512)  # fmt: skip


def prompts(count: int, vocab: int) -> list[list[int]]:
    draw = random.Random(0)
    heads = [[draw.randrange(3, vocab) for _ in range(PREFIX)] for _ in range(PREFIXES)]
    texts = [heads[i % PREFIXES] + [draw.randrange(3, vocab) for _ in range(SUFFIX)] for i in range(count)]
    draw.shuffle(texts)
    return texts


def run(raw: dict, policy, texts: list[list[int]]) -> dict[str, float]:
    """Prompt tokens computed, preemptions, tokens a step and seconds of one job on a fresh engine."""
    pages = 1 + 3 * PREFIX // PAGE + SEATS * -(-(SUFFIX + OUTPUT) // PAGE)
    llm = LLM.from_config(
        raw, progress=False, policy=policy, max_num_seqs=SEATS, max_num_batched_tokens=512,
        max_model_len=PREFIX + SUFFIX + OUTPUT, page_size=PAGE, num_pages=pages,
    )  # fmt: skip
    engine, launch, computed = llm.engine, llm.engine.launch, []

    def counted(work):
        computed.append(sum(chunk.count for chunk in work.chunks))
        return launch(work)

    engine.launch = counted
    start = time.perf_counter()
    llm.generate(texts, SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True), use_tqdm=False)
    seconds = time.perf_counter() - start
    found = dict(
        computed=sum(computed), preemptions=engine.scheduler.preemptions, seconds=seconds,
        steps=engine.steps, real=engine.real_tokens / engine.steps,
    )  # fmt: skip
    llm.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--model", nargs="+", choices=["tiny", "demo"], default=["tiny", "demo"])
    arguments = quiet_arguments(parser, loaded="the seconds below mean little")
    demo = json.loads(DEMO.read_text())
    for name in arguments.model:
        raw = demo | (TINY if name == "tiny" else {})
        texts = prompts(arguments.requests, raw["vocab_size"])
        total = len(texts) * (PREFIX + SUFFIX)
        least = min(PREFIXES, len(texts)) * PREFIX + len(texts) * SUFFIX
        found = {"first come, LRU": run(raw, SarathiServe(), texts), "BatchLLM": run(raw, BatchLLM(), texts)}
        rows = [(f"{name}: {len(texts)} requests", "prompt tokens computed", "saved of all", "first come / it",
                 "preemptions", "steps", "tokens a step", "s")]  # fmt: skip
        first = found["first come, LRU"]["computed"]
        for policy, one in found.items():
            rows.append((policy, f"{one['computed']:,}", f"{1 - one['computed'] / total:.1%}",
                         f"{first / one['computed']:.2f}", f"{one['preemptions']}", f"{one['steps']}",
                         f"{one['real']:.0f}", f"{one['seconds']:.1f}"))  # fmt: skip
        rows.append(("least", f"{least:,}", f"{1 - least / total:.1%}", f"{first / least:.2f}", *["-"] * 4))
        print(table(rows), flush=True)
    still_quiet(arguments)


if __name__ == "__main__":
    main()
