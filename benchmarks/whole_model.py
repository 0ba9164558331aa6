"""A whole model of 8B shapes on one device: decode beside copies, prefill beside matrix products, in one run.

    python benchmarks/whole_model.py [--device gpu] [--batch 1 16 64 128] [--tiny]

Random bfloat16 weights through the public API (`LLM.from_config`). Decode: what a step must read (the weights but for
the embedding table, and the live keys and values) over its time, as a share of the measured copy bandwidth. Prefill:
the products of the prompts' tokens over the time to their first tokens, as a share of the measured matmul rate. With
torch and CUDA, transformers' `generate` with a static cache, compiled, does the same beside it. `--tiny` shrinks every
size, to see that it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

# torch needs some of the memory, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

from common import copy_bandwidth, interleaved, matmul_rate, use_device
from rich.console import Console
from rich.table import Table

# (batch, prompt length, output length) -> seconds to generate
Run = Callable[[int, int, int], float]

SHAPES_8B = dict(
    model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, intermediate_size=14336, vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope_theta=500000.0, tie_word_embeddings=False, hidden_act="silu", torch_dtype="bfloat16",
)  # fmt: skip
SMALL = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=128, vocab_size=512, max_position_embeddings=256,
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Sizes of a run, in tokens and sequences; `chunk` is the token budget of a step."""

    raw: dict[str, Any]
    batches: tuple[int, ...]
    context: int = 1024
    output: int = 129
    prompts: tuple[int, ...] = (2048,)
    prompt_batch: int = 8
    chunk: int = 2048
    copied_mib: int = 2048
    side: int = 8192

    @property
    def length(self) -> int:
        return max(self.context + self.output, max(self.prompts) + 1)


@dataclass(frozen=True)
class Counts:
    """Of one model: weights that every token meets, bytes of what a step reads of them and of a token's keys and
    values, and multiply-adds of a query with one key and its value."""

    weights: int
    weight_bytes: int
    token_bytes: int
    pair: int

    @staticmethod
    def of(raw: dict[str, Any], itemsize: int) -> Counts:
        E, dim, layers = raw["hidden_size"], raw["head_dim"], raw["num_hidden_layers"]
        q, kv = raw["num_attention_heads"] * dim, raw["num_key_value_heads"] * dim
        weights = layers * (E * (2 * q + 2 * kv) + 3 * E * raw["intermediate_size"]) + E * raw["vocab_size"]
        return Counts(weights, weights * itemsize, layers * 2 * kv * itemsize, layers * 2 * q)

    def step_bytes(self, batch: int, context: float) -> float:
        return self.weight_bytes + batch * context * self.token_bytes

    def prompt_flops(self, batch: int, tokens: int, head: int) -> float:
        """Of prompts; `head` weights are met by their last token only."""
        met = self.weights - head
        return 2 * batch * (tokens * met + head + self.pair * tokens * (tokens + 1) / 2)


def prompts(batch: int, length: int, vocabulary: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(1).integers(3, vocabulary, (batch, length)).tolist()


def tokenloom(plan: Plan, dtype: str) -> Run:
    """Prompts first, so that no sequence decodes before all do."""
    from tokenloom import LLM, PrefillFirst, SamplingParams

    llm = LLM.from_config(
        plan.raw, dtype=dtype, max_num_seqs=max(plan.batches), max_num_batched_tokens=plan.chunk,
        max_model_len=plan.length, prefix_cache=False, progress=False, policy=PrefillFirst(),
    )  # fmt: skip

    def run(batch: int, length: int, tokens: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        texts = prompts(batch, length, plan.raw["vocab_size"])
        start = time.perf_counter()
        llm.generate(texts, params, use_tqdm=False)
        return time.perf_counter() - start

    return run


def transformers(plan: Plan, device: str) -> Run:
    """The same with transformers: a static cache, its forward compiled."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = {name: value for name, value in plan.raw.items() if name not in ("model_type", "torch_dtype")}
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**raw)).eval()
    torch.set_default_dtype(torch.float32)

    def run(batch: int, length: int, tokens: int) -> float:
        ids = torch.tensor(prompts(batch, length, plan.raw["vocab_size"]), device=device)
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=0, cache_implementation="static",
            )  # fmt: skip
        out.cpu()  # waits
        return time.perf_counter() - start

    return run


def other(plan: Plan, asked: bool) -> dict[str, Run]:
    """transformers, when it is there with CUDA, or when it was asked for."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return {}
    import torch

    if not (torch.cuda.is_available() or asked):
        return {}
    return {"transformers": transformers(plan, "cuda" if torch.cuda.is_available() else "cpu")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="gpu", choices=["gpu", "tpu", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transformers", action="store_true", help="also without CUDA")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = use_device(arguments.device)
    plan = Plan(SHAPES_8B, tuple(arguments.batch))
    if arguments.tiny:
        plan = Plan(SHAPES_8B | SMALL, (1, 4), 16, 33, (32,), 2, 32, copied_mib=8, side=256)
    report(plan, arguments.dtype, device, arguments.rounds, arguments.transformers)


def report(plan: Plan, dtype: str, device: Any, rounds: int, asked: bool) -> None:
    """Measure all contenders, in turn for each batch, and print the two tables."""
    console = Console(width=120)
    bandwidth, compute = copy_bandwidth(plan.copied_mib), matmul_rate(plan.side, dtype)
    console.print(
        f"{device.device_kind}: copies {bandwidth / 1e9:.0f} GB/s, multiplies {compute / 1e12:.1f} TFLOP/s"
    )
    start = time.perf_counter()
    contenders = {"tokenloom": tokenloom(plan, dtype)} | other(plan, asked)
    console.print(f"{plan.raw['num_hidden_layers']} layers of {plan.raw['hidden_size']}, {dtype}: built and compiled "
                  f"in {time.perf_counter() - start:.0f} s")  # fmt: skip
    counts = Counts.of(plan.raw, 4 if dtype == "float32" else 2)
    console.print(decode_table(plan, contenders, counts, bandwidth, rounds))
    console.print(prefill_table(plan, contenders, counts, compute, rounds))


def decode_table(
    plan: Plan, contenders: dict[str, Run], counts: Counts, bandwidth: float, rounds: int
) -> Table:
    """A step: all tokens less the first, whose time is the prefill's, over the tokens between."""
    names = f"decode at {plan.context} tokens", "ms a step", "tokens/s", "of copy bandwidth"
    table = Table(*names, header_style="bold")
    for batch in plan.batches:
        calls = {
            (name, tokens): partial(run, batch, plan.context, tokens)
            for name, run in contenders.items()
            for tokens in (1, plan.output)
        }
        best = interleaved(calls, rounds)
        for name in contenders:
            step = (best[name, plan.output] - best[name, 1]) / (plan.output - 1)
            if step <= 0:
                table.add_row(f"{name}, batch {batch}", "lost in noise")
                continue
            share = counts.step_bytes(batch, plan.context + plan.output / 2) / step / bandwidth
            table.add_row(
                f"{name}, batch {batch}", f"{step * 1e3:.3f}", f"{batch / step:.0f}", f"{share:.1%}"
            )
    return table


def prefill_table(
    plan: Plan, contenders: dict[str, Run], counts: Counts, compute: float, rounds: int
) -> Table:
    table = Table("prefill", "ms", "tokens/s", "of matmul rate", header_style="bold")
    head, batch = plan.raw["hidden_size"] * plan.raw["vocab_size"], plan.prompt_batch
    for tokens in plan.prompts:
        calls = {name: partial(run, batch, tokens, 1) for name, run in contenders.items()}
        for name, taken in interleaved(calls, rounds).items():
            share = counts.prompt_flops(batch, tokens, head) / taken / compute
            rate = batch * tokens / taken
            table.add_row(f"{name}, {batch} x {tokens}", f"{taken * 1e3:.1f}", f"{rate:.0f}", f"{share:.1%}")
    return table


if __name__ == "__main__":
    main()
