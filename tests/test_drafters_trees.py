"""Drafters that draw trees from a draft model, in an engine: greedy output is plain decoding, whatever they draft."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom import LLM, RSDC, RSDS, SamplingParams, SpecTr
from tokenloom.serve.drafters.draft import Target
from tokenloom.tests.engines import greedy, prompts, same_tokens, undrafted
from tokenloom.tests.shapes import llama

DRAFTERS = {
    "spectr": SpecTr(llama(), drafts=3, tokens=3),
    "rsd-c": RSDC(llama(), branching=(2, 2, 1)),
    "rsd-s": RSDS(llama(), width=3, depth=3),
}
SIZES = dict(max_num_seqs=2, max_num_batched_tokens=32, page_size=16)
DRAWN = SamplingParams(temperature=0.9, top_k=20, max_tokens=12, seed=4, n=2, ignore_eos=True)


@cache
def speculating(name: str) -> LLM:
    return LLM.from_config(llama(), 0, progress=False, drafter=DRAFTERS[name], **SIZES)


@cache
def plain() -> list:
    llm = speculating("spectr")
    with undrafted(llm):
        return llm.generate(prompts(3, 5, 40), greedy(20), use_tqdm=False)


def generate(name: str, noise: float, texts, params) -> tuple[list, float]:
    """(outputs, tokens a row and pass) with a draft model that is the target with `noise` on its weights, in units of
    their spread."""
    llm, draw = speculating(name), np.random.default_rng(0)
    speculation = llm.engine.programs.speculation
    before, speculation.acceptance = speculation.params, type(speculation.acceptance)()
    speculation.params = jax.tree.map(
        lambda a: a + jnp.asarray(noise * float(a.std()) * draw.standard_normal(a.shape), a.dtype), before
    )
    outputs = llm.generate(texts, params, use_tqdm=False)
    speculation.params = before
    return outputs, speculation.acceptance.tokens_per_step


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_output_is_plain_decoding(name):
    """A draft model that is the target is always right; one that differs somewhat, now and then; a bad one, never."""
    depth, seen = DRAFTERS[name].shapes[0].depth, []
    for noise in (0.0, 0.2, 5.0):
        found, per_pass = generate(name, noise, prompts(3, 5, 40), greedy(20))
        seen.append(per_pass)
        for a, b in zip(plain(), found, strict=True):
            same_tokens(a, b)
            for one, other in zip(a.outputs[0].logprobs, b.outputs[0].logprobs):
                assert all(abs(one[t].logprob - other[t].logprob) <= 1e-4 for t in one if t in other)
    assert seen[0] > depth + 0.5 and seen[0] > seen[1] > seen[2] >= 1.0


@pytest.mark.parametrize("name", DRAFTERS)
def test_requests_that_draw(name):
    """With the target for a draft model nearly all is accepted; seeds repeat; greedy rows beside stay."""
    first, per_pass = generate(name, 0.0, prompts(2, 6, 40), DRAWN)
    again, _ = generate(name, 0.0, prompts(2, 6, 40), DRAWN)
    assert [c.token_ids for o in first for c in o.outputs] == [c.token_ids for o in again for c in o.outputs]
    assert per_pass > DRAFTERS[name].shapes[0].depth - 0.5
    mixed = speculating(name).generate(prompts(3, 5, 40), [greedy(20), DRAWN, greedy(20)], use_tqdm=False)
    for at in (0, 2):
        same_tokens(plain()[at], mixed[at])


def test_settings_are_checked():
    for make, words in (
        (lambda: SpecTr(drafts=0), "at least 1"),
        (lambda: RSDC(branching=()), "at least one depth"),
        (lambda: RSDS(width=0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    target = Target(llama(), None, None, None, 64, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="301 siblings, but the vocabulary has 300"):
        RSDS(llama(), width=301).open(target)
    assert RSDS(width=1).shapes[0].chain and not RSDS(width=2).shapes[0].chain
