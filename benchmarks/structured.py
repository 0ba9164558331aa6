"""Structured output: whether everything that ends is valid, what a mask costs, and what a token costs with grammars.

python benchmarks/structured.py                     300 drawn schemas: declared and empirical coverage, mask times
python benchmarks/structured.py --overhead          time per token with grammars and without, batch 1, 8, 32 (quiet
                                                    machine)
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
from common import interleaved, require_quiet, table
from tokenloom import LLM, SamplingParams, StructuredOutputs
from tokenloom.serve.sampling.structured import Grammars
from tokenloom.tests.drawn import draw_schema

# Ends late enough for every run: a list of this many small objects, without whitespace.
ENDLESS = {
    "type": "array", "minItems": 500,
    "items": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
              "required": ["name", "n"], "additionalProperties": False},
}  # fmt: skip


def coverage(llm: LLM, count: int, tokens: int) -> list[tuple[str, ...]]:
    """Generate for `count` drawn schemas; every output that ends must validate."""
    draw = random.Random(1)
    schemas = [draw_schema(draw) for _ in range(count)]
    params = [
        SamplingParams(max_tokens=tokens, seed=i, structured_outputs=compact(schema))
        for i, schema in enumerate(schemas)
    ]
    outputs = llm.generate([[5 + i % 90] for i in range(count)], params, use_tqdm=False)
    refused = sum(output.error is not None for output in outputs)
    ended = valid = 0
    for schema, output in zip(schemas, outputs, strict=True):
        if output.error is None and output.outputs[0].finish_reason == "stop":
            ended += 1
            valid += is_valid(output.outputs[0].text, schema)
    print(f"{count} schemas: {refused} did not compile, {ended} outputs ended, {valid} of these are valid")
    assert valid == ended, "an output that ended is not valid"
    return mask_times(llm, schemas, outputs)


def compact(schema: dict[str, Any]) -> StructuredOutputs:
    """Without whitespace: weights that mean little ramble there."""
    return StructuredOutputs(json=schema, disable_any_whitespace=True)


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        print("INVALID", text, schema, error)
        return False
    return True


def mask_times(llm: LLM, schemas: list[dict[str, Any]], outputs: list[Any]) -> list[tuple[str, ...]]:
    """µs to compile (the trie is there already) and to fill a mask, along what was generated."""
    assert llm.tokenizer is not None
    grammars = Grammars(llm.tokenizer, llm.config.vocab_size, llm.engine.eos_ids)
    start = time.perf_counter()
    grammars.masks([], 1, 0)
    trie, compiling, filling = time.perf_counter() - start, [], []
    for schema, output in zip(schemas, outputs, strict=True):
        if output.error is not None:
            continue
        start = time.perf_counter()
        matcher = grammars.matcher(compact(schema))
        compiling.append(time.perf_counter() - start)
        for token in output.outputs[0].token_ids:
            start = time.perf_counter()
            grammars.masks([(0, matcher)], 1, 0)
            filling.append(time.perf_counter() - start)
            matcher.accept(token)
    rows = [("what", "count", "p50 µs", "p99 µs", "most µs"), ("trie", "1", f"{trie * 1e6:.0f}", "", "")]
    for name, times in (("grammar", compiling), ("mask", filling)):
        p50, p99 = np.percentile(times, [50, 99]) * 1e6
        rows.append((name, str(len(times)), f"{p50:.0f}", f"{p99:.0f}", f"{max(times) * 1e6:.0f}"))
    return rows


def per_token(llm: LLM, batch: int, steps: int, **params: Any) -> Callable[[], float]:
    """s a decode step at full width: the difference of a long and a short run."""
    prompts = [[5 + i, 9, 11] for i in range(batch)]

    def run() -> float:
        times = []
        for tokens in (1, steps + 1):
            asked = SamplingParams(seed=1, max_tokens=tokens, ignore_eos=True, **params)
            start = time.perf_counter()
            llm.generate(prompts, asked, use_tqdm=False)
            times.append(time.perf_counter() - start)
        return (times[1] - times[0]) / steps

    return run


def overhead(name: str, batches: list[int], steps: int, rounds: int) -> list[tuple[str, ...]]:
    """ms a token of greedy and of drawn rows without a grammar, then of drawn rows with one."""
    rows = [("batch", "greedy ms", "drawn ms", "drawn with a grammar ms", "over drawn")]
    asked = compact(ENDLESS)
    for batch in batches:
        with LLM(
            name, max_num_seqs=batch, max_model_len=512, max_num_batched_tokens=256, progress=False
        ) as llm:
            contenders = {
                "greedy": per_token(llm, batch, steps, temperature=0.0), "drawn": per_token(llm, batch, steps),
                "grammar": per_token(llm, batch, steps, structured_outputs=asked),
            }  # fmt: skip
            best = interleaved(contenders, rounds)
        shown = [f"{best[key] * 1e3:.3f}" for key in ("greedy", "drawn", "grammar")]
        rows.append((str(batch), *shown, f"{best['grammar'] / best['drawn'] - 1:+.1%}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--anyway", action="store_true", help="on a loaded machine too")
    arguments = parser.parse_args()
    if arguments.overhead:
        if not arguments.anyway:
            require_quiet()
        print(table(overhead(arguments.model, arguments.batches, arguments.steps, arguments.rounds)))
        return
    with LLM(arguments.model, max_num_seqs=8, max_model_len=256, progress=False) as llm:
        print(table(coverage(llm, arguments.schemas, arguments.tokens)))


if __name__ == "__main__":
    main()
