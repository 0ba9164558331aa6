"""The engine's laws, on one small model of each kind: what a request gets never depends on what ran beside it."""

import random

import numpy as np
import pytest
from tokenloom import LLM, SamplingParams
from tokenloom.tests.engines import (
    ROOMY,
    TOLERANCE,
    check_against_whole,
    engine,
    greedy,
    mixed,
    prompts,
    same_tokens,
    whole,
)
from tokenloom.tests.shapes import ALL

SHAPES = pytest.mark.parametrize("shape", sorted(ALL))


@SHAPES
def test_chunked_batched_and_cached_equal_whole(shape):
    """Prompts in chunks, decodes beside them, paged and recurrent state: the plain model's every number."""
    llm = engine(shape)
    for output in llm.generate(prompts(9, 1), greedy()):
        check_against_whole(shape, output)
    assert llm.engine.pages.free == llm.engine.pages.num_pages - 1


@SHAPES
def test_preempted_and_other_buckets_equal_whole(shape):
    llm = engine(shape, tight=True)
    before = llm.engine.scheduler.preemptions
    for output in llm.generate(prompts(9, 2), greedy(40)):
        check_against_whole(shape, output)
    if shape != "recurrent":
        assert llm.engine.scheduler.preemptions > before, "the pool was meant to be too small"
    assert llm.engine.pages.free == llm.engine.pages.num_pages - 1


def test_a_batch_equals_alone():
    llm = engine("llama")
    drawn = prompts(8, 3)
    for prompt, together in zip(drawn, llm.generate(drawn, greedy())):
        same_tokens(together, llm.generate(prompt, greedy())[0])


def _tokens(outputs):
    return [[list(c.token_ids) for c in output.outputs] for output in outputs]


def test_seeded_samples_do_not_depend_on_company_buckets_or_preemption():
    draw = random.Random(5)
    drawn = prompts(16, 4, longest=90)
    params = [mixed(draw) for _ in drawn]
    together = _tokens(engine("llama").generate(drawn, params))
    pressed = _tokens(engine("llama", tight=True).generate(drawn, params))
    alone = [_tokens(engine("llama").generate(p, s))[0] for p, s in zip(drawn, params)]
    # Sampling at a top-k or top-p edge may differ by rounding: at most one request of these.
    assert sum(a != b for a, b in zip(together, pressed)) <= 1
    assert sum(a != b for a, b in zip(together, alone)) <= 1


def test_samples_of_one_request_differ_and_survive_a_restart():
    params = SamplingParams(temperature=1.0, n=4, max_tokens=12, ignore_eos=True)
    prompt = prompts(1, 6)[0]
    first, second = (
        LLM.from_config(ALL["llama"](), 0, progress=False, **ROOMY).generate(prompt, params)[0]
        for _ in range(2)
    )
    texts = [tuple(c.token_ids) for c in first.outputs]
    assert len(set(texts)) == 4
    assert texts == [tuple(c.token_ids) for c in second.outputs]


def test_prompt_logprobs_equal_whole():
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=3, ignore_eos=True)
    for output in engine("llama").generate(prompts(5, 7), params):
        ids = list(output.prompt_token_ids)
        expected = whole("llama", ids)
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(ids)
        for place in range(1, len(ids)):
            entry, row = output.prompt_logprobs[place], expected[place - 1]
            assert abs(entry[ids[place]].logprob - row[ids[place]]) <= TOLERANCE
            top = max(entry.values(), key=lambda e: e.logprob)
            assert abs(top.logprob - row.max()) <= TOLERANCE and top.rank == 1
            assert entry[ids[place]].rank == 1 + int((row > row[ids[place]]).sum())


def test_a_thousand_mixed_requests_compile_nothing():
    """strict=True raises on any compilation after warm-up."""
    llm = engine("llama")
    draw = random.Random(8)
    drawn = prompts(1000, 9, longest=40)
    params = [mixed(draw) for _ in drawn]
    outputs = llm.generate(drawn, params, use_tqdm=False)
    assert all(c.finish_reason in ("stop", "length") for output in outputs for c in output.outputs)
    assert llm.engine.programs.compilations.late == 0


def test_a_compilation_after_warm_up_is_noticed():
    """The control of the law above: strict mode does raise."""
    llm = LLM.from_config(ALL["llama"](), 0, strict=True, progress=False, **ROOMY)
    step = llm.engine.programs.step

    def compiles(*arguments):
        import jax

        jax.jit(lambda x: x + np.random.default_rng().integers(1 << 30))(1.0)
        return step(*arguments)

    llm.engine.programs.step = compiles
    with pytest.raises(RuntimeError, match="after warm-up"):
        llm.generate([1, 2, 3], greedy(4))
