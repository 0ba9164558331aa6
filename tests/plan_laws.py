"""Every plan = one device, for every family: `python -m tokenloom.tests.plan_laws [FAMILY ...]`.

A plan is named by its sizes: `tensor=4`, `tensor=4,dcp=1` (repeated KV heads in copies, rather than shared token by
token), `seq=2,tensor=2,form=gather`, `expert=2`, `expert=3,weights=int4`, and by a `kv=` dtype. A case is a
family (or one of `SHAPES`) under a plan, written FAMILY:PLAN; without `--plan`, every name is tried under every one of
`PLANS`. Each case prints a line, "equal FAMILY PLAN" or "refused FAMILY PLAN: message"; one that is not as `refusal`
says it must be prints "FAILED", and the command ends with 1. It runs on 8 devices that the CPU pretends to have.

The model is the family's first drawn config in sizes that split, its weights drawn so that biases and norms matter;
they come by `update_weights`. What is compared with an engine on one device: prompts in chunks and, with two seats or
more, beside decodes, greedy and seeded (temperature, top-p, top-k, penalties), then the same from the prefix cache.
"""

import argparse
import os
import random
import sys
import traceback
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np
from tokenloom import LLM, Int4, Int8, SamplingParams
from tokenloom.attention.caches.paged import PagedKV
from tokenloom.attention.caches.split import SplitKV
from tokenloom.attention.spread import spreads
from tokenloom.model.checkpoint import flatten, random_params, unflatten
from tokenloom.model.config import ModelConfig, MoEConfig, llama_config
from tokenloom.model.families import find, supported
from tokenloom.serve.build import choose_numerics
from tokenloom.tests import shapes
from tokenloom.tests.devices import QUICK
from tokenloom.tests.engines import TOLERANCE, same_tokens
from tokenloom.tests.families import drawn

DEVICES, VOCAB, LENGTH = 8, 96, 128
OPTIONS = dict(max_num_batched_tokens=32, page_size=16, max_model_len=96, progress=False)
PLANS = (
    "tensor=2", "tensor=4", "tensor=4,dcp=1", "seq=2,form=ring", "seq=2,form=token_ring", "seq=2,tensor=2,form=gather",
    "seq=2,tensor=4,form=ring", "expert=2", "expert=4", "seq=2,expert=2,form=token_ring",
)  # fmt: skip
"""Families with grouped heads have two KV heads: four devices are 2 x 2 there (`kv` x `rep`)."""
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, n_embd=32, num_attention_heads=4, n_head=4, num_key_value_heads=2, head_dim=8,
    num_heads=8, expand=2, max_position_embeddings=LENGTH, n_positions=LENGTH, rms_norm_eps=1e-6, layer_norm_eps=1e-5,
    layer_norm_epsilon=1e-5, num_experts=4, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip
"""What a drawn config says of these, under any family's name for it, is replaced: equal sizes share compiled heads."""

TRANSFORMS: dict[str, list[Any]] = {
    "": [], "int8": [Int8(activations=None)], "int4": [Int4(group_size=16)],
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """seq groups, which share each text, of tensor devices; experts: whole on their devices; weights: quantised; dcp:
    decode_context_parallel_size; kv: kv_cache_dtype."""

    seq: int = 1
    tensor: int = 1
    experts: bool = False
    form: Any = None
    weights: str = ""
    dcp: int | None = None
    kv: str | None = None

    @staticmethod
    def parse(text: str) -> "Plan":
        """From its name; ValueError for another."""
        given = dict(part.partition("=")[::2] for part in text.split(","))
        seq, form, weights = int(given.pop("seq", 1)), given.pop("form", None), given.pop("weights", "")
        dcp, kv = (int(given.pop("dcp")) if "dcp" in given else None), given.pop("kv", None)
        experts = "expert" in given
        tensor = int(given.pop("expert" if experts else "tensor", 1))
        if given or weights not in TRANSFORMS:
            raise ValueError(
                f"plan {text!r}: give seq=, tensor= or expert=, dcp=, form=, weights=int4 or int8, kv="
            )
        return Plan(seq, tensor, experts, form, weights, dcp, kv)

    @property
    def options(self) -> dict[str, Any]:
        return dict(
            tensor_parallel_size=self.tensor, sequence_parallel_size=self.seq, sequence_parallel_form=self.form,
            enable_expert_parallel=self.experts, decode_context_parallel_size=self.dcp, kv_cache_dtype=self.kv,
        )  # fmt: skip

    def refusal(self, config: ModelConfig) -> str | None:
        """What the message must say where this model cannot have this plan."""
        if self.experts and not config.expert_counts:
            return "the model has no experts"
        if self.seq > 1 and config.recurrent:
            return f"{config.model_type} has recurrent layers"
        return None


def family(model_type: str) -> ModelConfig:
    """The family's first drawn config, in sizes that split."""
    raw = {"model_type": model_type, **drawn(model_type, 0)}
    text = raw.get("text_config", raw)
    text |= {name: size for name, size in SIZES.items() if name in text}
    return find(model_type).config(raw)


def hybrid() -> ModelConfig:
    return shapes.hybrid()


def windowed() -> ModelConfig:
    """One KV head, which every device repeats."""
    return shapes.windowed()


def grouped() -> ModelConfig:
    """More query heads: two KV heads on eight devices, 2 x 4."""
    return llama_config(
        layers=1, hidden=64, heads=8, kv_heads=2, intermediate=128, vocab=VOCAB, max_position=LENGTH
    )


def sixths() -> ModelConfig:
    """Six experts of which a token uses four, six query heads of three KV heads; the first block is dense."""
    base = llama_config(
        layers=2, hidden=96, heads=6, kv_heads=3, intermediate=96, vocab=VOCAB, max_position=LENGTH
    )
    first, second = base.blocks
    return replace(base, blocks=(first, replace(second, channel=MoEConfig(6, 4, 64))))


SHAPES = {one.__name__: one for one in (hybrid, windowed, grouped, sixths)}


@cache
def config_of(name: str) -> ModelConfig:
    return SHAPES[name]() if name in SHAPES else family(name)


@cache
def weights(name: str) -> dict:
    """Parameters of which none is as it was initialised: vectors (biases, norms) are moved by a fifth of a normal."""
    draw, config = np.random.default_rng(1), config_of(name)
    leaves = {
        path: np.asarray(leaf) if leaf.ndim > 1 else leaf + 0.2 * draw.standard_normal(leaf.shape)
        for path, leaf in sorted(flatten(random_params(config, choose_numerics(None, "float32"), 1)).items())
    }
    return unflatten({path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()})


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of three chunks and of less than one, more than there are seats."""
    draw = random.Random(5)
    prompts = [[draw.randrange(VOCAB) for _ in range(size)] for size in (70, 5, 33, 18, 47)]
    common = dict(max_tokens=8, ignore_eos=True, logprobs=2)
    params = [
        SamplingParams(temperature=0.0, **common),
        SamplingParams(temperature=0.8, top_p=0.9, seed=7, **common),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, **common),
        SamplingParams(temperature=1.2, top_k=20, presence_penalty=0.5, frequency_penalty=0.3, seed=8, n=2, **common),
        SamplingParams(temperature=0.0, **common),
    ]  # fmt: skip
    return prompts, params


def start(name: str, plan: Plan, seats: int) -> LLM:
    """An engine of this plan, with `weights`."""
    more = dict(max_num_seqs=seats, transforms=TRANSFORMS[plan.weights])
    llm = LLM.from_config(config_of(name), 0, strict=True, **OPTIONS, **more, **plan.options)
    llm.update_weights(weights(name))
    return llm


@cache
def alone(name: str, stored: str, kv: str | None, seats: int) -> tuple:
    """What one device says."""
    llm = start(name, Plan(weights=stored, kv=kv), seats)
    found = tuple(llm.generate(*requests()))
    llm.close()
    return found


def placed(llm: LLM, plan: Plan) -> None:
    """Every device holds its part of weights and pages, and no more; long steps are spread."""
    programs, config = llm.engine.programs, llm.config
    leaves = flatten(programs.params)
    cut = [path for path, leaf in leaves.items() if not leaf.sharding.is_fully_replicated]
    # Recurrent mixers are whole on every device; their models split the vocabulary.
    least = len(leaves) // 4 if config.attention_heads else 1
    assert plan.tensor == 1 or len(cut) >= least, f"{len(cut)} of {len(leaves)} weights are split"
    if plan.weights:
        assert any(path.endswith("codes") for path in cut)
    for entry in programs.state:
        pages = entry.pages if isinstance(entry, SplitKV) else entry
        if isinstance(pages, PagedKV):
            share = pages.v.addressable_shards[0].data.size
            copies = plan.dcp == 1 or plan.seq > 1
            shares = min(plan.tensor, pages.v.shape[1]) if copies else plan.tensor
            assert share * plan.seq * shares == pages.v.size
    if plan.seq > 1 and plan.form != "whole":
        assert spreads(programs.plan.shape(0, programs.plan.chunks[-1]), plan.seq)
    for index, block in enumerate(config.blocks):
        if plan.experts and isinstance(block.channel, MoEConfig):
            owned(programs.params["blocks"][index]["channel"], block.channel.experts, plan.tensor)


def owned(channel: dict, experts: int, size: int) -> None:
    """Every device has its experts and no others, whole."""
    for leaf in jax.tree.leaves([part for name, part in channel.items() if name != "router"]):
        whole, share = np.asarray(leaf), experts // size
        for shard in leaf.addressable_shards:
            first = shard.device.id % size * share
            np.testing.assert_array_equal(np.asarray(shard.data), whole[first : first + share])


def same(outputs: list, expected: tuple) -> None:
    """The same tokens, but where candidates of a greedy text are near-tied; the same log-probabilities up to there."""
    for output, wanted in zip(outputs, expected, strict=True):
        for ours, theirs in zip(output.outputs, wanted.outputs, strict=True):
            if output.sampling_params.temperature > 0:
                assert list(ours.token_ids) == list(theirs.token_ids), (ours.token_ids, theirs.token_ids)
            same_tokens(replace(output, outputs=[ours]), replace(wanted, outputs=[theirs]))
            for token, other, x, y in zip(ours.token_ids, theirs.token_ids, ours.logprobs, theirs.logprobs):
                if token != other:
                    break
                off = abs(x[token].logprob - y[token].logprob)
                assert off <= TOLERANCE, f"log-probabilities differ by {off:.1e}"


def check(name: str, plan: Plan, seats: int) -> str | None:
    """One case: None where it is equal, or the message where it is refused, as it must be; AssertionError otherwise."""
    message = plan.refusal(config_of(name))
    try:
        llm = start(name, plan, seats)
    except ValueError as error:
        assert message is not None and message in str(error), error
        return str(error)
    assert message is None, f"it runs, but was to be refused: {message}"
    placed(llm, plan)
    prompts, params = requests()
    same(llm.generate(prompts, params), alone(name, plan.weights, plan.kv, seats))
    same(llm.generate(prompts, params), alone(name, plan.weights, plan.kv, seats))
    pages = llm.engine.pages
    assert pages.hit_tokens > 0, f"nothing was found in the prefix cache: {pages.off}"
    llm.close()
    return None


def run(cases: list[tuple[str, str]], seats: int) -> int:
    """Print a line a case; how many failed."""
    failed = 0
    for name, plan in cases:
        try:
            message = check(name, Plan.parse(plan), seats)
            print("equal" if message is None else "refused", name, plan + (f": {message}" if message else ""))
        except Exception as error:
            failed += 1
            traceback.print_exc()
            print(f"FAILED {name} {plan}: {type(error).__name__}: {str(error)[:400]}")
        sys.stdout.flush()
    return failed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("tokenloom.tests.plan_laws")
    parser.add_argument(
        "names", nargs="*", help=f"FAMILY or FAMILY:PLAN; of {', '.join((*supported(), *SHAPES))}"
    )
    parser.add_argument(
        "--plan", action="append", help="a plan's name, or several times; without it: all of them"
    )
    parser.add_argument("--seats", type=int, default=2, help="max_num_seqs; with 1 less is compiled")
    asked = parser.parse_args(arguments)
    os.environ.setdefault("XLA_FLAGS", QUICK)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    cases = []
    for one in asked.names or supported():
        name, _, plan = one.partition(":")
        cases += [(name, each) for each in ([plan] if plan else asked.plan or PLANS)]
    return 1 if run(cases, asked.seats) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
