"""DEL: the target's first layers draft. Whatever exit and length are planned, the tokens are plain decoding's."""

from contextlib import nullcontext
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom import DEL, LLM, SamplingParams
from tokenloom.model.config import llama_config
from tokenloom.serve.drafters.early_exit import Statistics, plan
from tokenloom.tests.engines import greedy, prompts, same_tokens, undrafted
from tokenloom.tests.shapes import LENGTH, VOCAB, llama

SIZES = dict(max_num_batched_tokens=32, page_size=16, progress=False)
DRAWN = SamplingParams(temperature=0.9, top_k=20, max_tokens=12, seed=4, n=2, ignore_eos=True)
config = partial(
    llama_config, layers=4, hidden=32, heads=2, kv_heads=1, intermediate=64, vocab=VOCAB, max_position=LENGTH
)


@cache
def speculating(verify: str, seats: int) -> LLM:
    drafter = DEL(exits=(1, 2, 3), tokens=4, decay=1.0, verify=verify)
    return LLM.from_config(config(), 0, drafter=drafter, max_num_seqs=seats, **SIZES)


def generate(llm: LLM, weight: float, texts, params, seen: Statistics | None = None, plain: bool = False):
    """(outputs, tokens a row and pass, what was seen) with the weights behind the second layer times `weight`; 0: those
    layers change nothing."""
    programs = llm.engine.programs
    speculation, before = programs.speculation, programs.params
    weakened = partial(jax.tree.map, lambda a: a * jnp.asarray(weight, a.dtype))
    blocks = {at: weakened(block) if at > 1 else block for at, block in before["blocks"].items()}
    speculation.acceptance = type(speculation.acceptance)()
    programs.params = {**before, "blocks": blocks}
    seen = Statistics(*np.zeros((4, 3))) if seen is None else seen
    speculation.state = jax.tree.map(lambda a: jnp.array(a, jnp.float32), seen)
    llm.engine.pages.new_weights()
    with undrafted(llm) if plain else nullcontext():
        outputs = llm.generate(texts, params, use_tqdm=False)
    programs.params = before
    return outputs, speculation.acceptance.tokens_per_step, jax.tree.map(np.asarray, speculation.state)


def certain(exit: int) -> Statistics:
    """Everything seen says that only this exit is ever right, and never unsure."""
    hits = 1e6 * np.eye(3)[exit]
    return Statistics(hits, 1e6 - hits, hits, np.zeros(3))


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_greedy_output_is_plain_decoding(weight):
    """With every fixed exit and with the planned one; exits behind which nothing changes are always right."""
    llm, texts = speculating("matching", 2), prompts(3, 5, 40)
    plain, _, _ = generate(llm, weight, texts, greedy(16), plain=True)
    for seen in (None, certain(0), certain(1), certain(2)):
        found, per_pass, after = generate(llm, weight, texts, greedy(16), seen)
        for a, b in zip(plain, found, strict=True):
            same_tokens(a, b)
            for one, other in zip(a.outputs[0].logprobs, b.outputs[0].logprobs):
                assert all(abs(one[t].logprob - other[t].logprob) <= 1e-4 for t in one if t in other)
        if weight == 0.0:
            before = np.zeros(3) if seen is None else seen.misses
            assert (after.misses[1:] == before[1:]).all(), "layers that add nothing disagreed"
            assert seen is None or seen.hits[0] > 0 or per_pass > 3.0


def test_seeded_samples_are_those_of_plain_decoding():
    llm, texts = speculating("matching", 2), prompts(3, 6, 40)
    plain, _, _ = generate(llm, 0.0, texts, DRAWN, plain=True)
    found, per_pass, _ = generate(llm, 0.0, texts, DRAWN)
    assert [c.token_ids for o in plain for c in o.outputs] == [c.token_ids for o in found for c in o.outputs]
    assert per_pass > 1.0


def test_drafts_that_are_drawn():
    """Rejection sampling: an exit that is the target is accepted whenever it drafts; greedy rows stay plain."""
    llm, texts = speculating("rejection", 1), prompts(2, 6, 40)
    plain, _, _ = generate(llm, 0.0, texts, greedy(16), plain=True)
    found, _, _ = generate(llm, 0.0, texts, greedy(16))
    for a, b in zip(plain, found, strict=True):
        same_tokens(a, b)
    _, per_pass, _ = generate(llm, 0.0, texts, DRAWN, certain(1))
    assert per_pass > 3.0


def test_the_plan_is_the_best_of_all():
    draw = np.random.default_rng(0)
    for _ in range(50):
        hits, misses = draw.integers(0, 20, (2, 3)).astype(np.float32)
        sure = draw.random((2, 3)).astype(np.float32) * [hits, misses]
        at, length, threshold = (
            np.asarray(x) for x in plan(Statistics(hits, misses, *sure), (1, 3, 5), 8, 6)
        )
        if hits.sum() + misses.sum() == 0:
            continue
        alpha = hits / np.maximum(hits + misses, 1e-9)
        best = {
            (i, d): sum(alpha[i] ** k for k in range(d + 1)) / (8 + d * (1, 3, 5)[i])
            for i, d in product(range(3), range(7))
        }
        assert best[int(at), int(length)] >= max(best.values()) - 1e-6
        both = hits[at] > 0 and misses[at] > 0
        middle = (sure[0, at] / hits[at] + sure[1, at] / misses[at]) / 2 if both else 0.0
        assert abs(threshold - middle) < 1e-6
    nothing = plan(Statistics(*(jnp.zeros(3) for _ in range(4))), (1, 3, 5), 8, 6)
    assert [float(x) for x in nothing] == [0, 1, 0]


def test_settings_are_checked():
    for make, words in (
        (lambda: DEL(tokens=0), "at least 1"),
        (lambda: DEL(exits=(3, 1)), "ascending"),
        (lambda: DEL(verify="no"), "choose"),  # type: ignore[arg-type]
        (
            lambda: LLM.from_config(llama(), 0, drafter=DEL(exits=(2,)), max_num_seqs=1, **SIZES),
            "must lie in 1 to 1",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            make()
