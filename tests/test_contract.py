"""The exactness contract over drawn requests: each way to serve them gives what one request alone gets from the
plain driver. `benchmarks/contract.py` is the same with ten times as many."""

import random
from functools import cache

import numpy as np
import pytest
from tokenloom import LLM
from tokenloom.tests.configurations import (
    CONFIGURATIONS,
    alone,
    compare,
    crowd,
    drive,
    nothing,
    together,
    writer,
)
from tokenloom.tests.contract import EDGE, NEAR, WRONG, Choice, Grid, Tally, explain
from tokenloom.tests.drawn import draw_requests
from tokenloom.tests.engines import ROOMY, engine
from tokenloom.tests.shapes import VOCAB, llama

COUNT, FEW = 200, 60
# What the allocator of pages and copies does differently for recurrent state, and for no pages at all.
OF_STATE = ("overlapped", "Sarathi-Serve", "tight pool", "segments", "weights swapped", "others end")


@cache
def subject(shape: str):
    """(grid, drawn requests, what they get alone)."""
    grid = writer() if shape == "text" else Grid(engine(shape).config, engine(shape).engine)
    count, sizes = COUNT if shape == "llama" else FEW, {}
    if shape == "text":
        sizes = dict(prompt=80, text=True)
    drawn = draw_requests(count, 1, grid.config.vocab_size, **sizes)
    return grid, drawn, alone(grid, drawn, random.Random(0))[1]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_attention(name):
    tally = compare(*subject("llama"), CONFIGURATIONS[name], 1)
    tally.check()
    assert tally.requests == COUNT and tally.tokens > COUNT
    assert (tally.preemptions > 0) == name.startswith(("tight", "weights", "others"))
    assert (tally.hits > 0) == (name not in ("plain, a batch", "overlapped", "tight, no cache"))


@pytest.mark.parametrize("name", OF_STATE)
@pytest.mark.parametrize("shape", ["recurrent", "hybrid"])
def test_recurrent_state(shape, name):
    tally = compare(*subject(shape), CONFIGURATIONS[name], 2)
    tally.check()
    assert (tally.hits > 0) == (name != "overlapped")


@pytest.mark.parametrize("name", OF_STATE)
def test_text(name):
    """Stop strings, bad words and end-of-text tokens."""
    grid, drawn, expected = subject("text")
    tally = compare(grid, drawn, expected, CONFIGURATIONS[name], 3)
    tally.check()
    assert (tally.hits > 0) == (name != "overlapped")
    stops = {one.stop_reason for output in expected for one in output.outputs}
    assert any(isinstance(reason, str) and reason != "repetition_detected" for reason in stops)


def test_256_together_equal_alone():
    grid, drawn, expected = subject("llama")
    tally = compare(crowd(llama()), drawn, expected, together, 4, reference=grid)
    tally.check()
    assert tally.requests == COUNT


def test_the_requests_are_of_every_kind():
    """What is drawn does happen: all the ends, log-probabilities, several samples, penalties."""
    _, drawn, expected = subject("llama")
    ends = {one.finish_reason for output in expected for one in output.outputs}
    assert ends == {"stop", "length", "repetition"}
    for name in (
        "top_k", "logit_bias", "allowed_token_ids", "min_tokens", "prompt_logprobs", "stop_token_ids",
    ):  # fmt: skip
        assert 10 < sum(bool(getattr(one.params, name)) for one in drawn) < COUNT, name
    assert {one.params.n for one in drawn} == {1, 2, 3}


# -- the judge -----------------------------------------------------------------------------------------------


def test_the_judge_knows_every_choice():
    """At nearly every place exactly one token can be chosen, and it is the one that was."""
    grid, drawn, expected = subject("llama")
    places = several = 0
    for one, output in list(zip(drawn, expected))[:40]:
        for sample in output.outputs:
            for at, token in list(enumerate(sample.token_ids))[:8]:
                choice = Choice.of(grid, one, sample.index, list(sample.token_ids)[:at])
                kept = choice.kept()[0] if not one.params.greedy else np.isfinite(choice.z)
                reached = [other for other in range(VOCAB) if choice.reaches(other, kept)]
                assert token in reached, (one.params, at)
                places, several = places + 1, several + (len(reached) > 1)
    assert places > 200 and several <= places // 50


def test_the_judge_tells_ties_edges_and_errors(monkeypatch):
    grid, drawn, expected = subject("llama")
    sampled = next(one for one in drawn if one.params.temperature and one.params.top_p == 1.0)
    tokens = list(expected[sampled.index].outputs[0].token_ids)
    assert explain(grid, sampled, 0, tokens, [(tokens[0] + 1) % VOCAB, *tokens[1:]]) == WRONG
    assert explain(grid, sampled, 0, tokens, tokens[:-1]) == WRONG, "it ended early for no reason"

    def told(logits: list[float], u: float, a: int, b: int, **params) -> str:
        one = Choice(drawn[0].params.__class__(**params), np.log(np.array(logits)), u)
        monkeypatch.setattr(Choice, "of", staticmethod(lambda *_: one))
        return explain(grid, type(drawn[0])(0, [1], one.params, None, 0, "a"), 0, [a], [b])

    halves = [0.25, 0.25, 0.5]
    assert told(halves, 0.25, 0, 1) == NEAR and told(halves, 0.25 + 3e-5, 1, 0) == NEAR
    assert told(halves, 0.25 + 1e-4, 1, 0) == WRONG and told(halves, 0.25, 0, 2) == WRONG
    assert told(halves, 0.3, 0, 1, temperature=0.0) == WRONG
    assert told([0.4, 0.4 * (1 - 1e-4), 0.2], 0.0, 0, 1, temperature=0.0) == NEAR
    assert told([0.4, 0.4 * (1 - 4e-4), 0.2], 0.0, 0, 1, temperature=0.0) == WRONG
    # Two of three are kept, and the second and the third are as good as equal: u falls to either.
    assert told([0.5, 0.25, 0.25 * (1 - 1e-4)], 0.9, 1, 2, top_k=2) == EDGE
    assert told([0.5, 0.25, 0.25 * (1 - 4e-4)], 0.9, 1, 2, top_k=2) == WRONG
    assert told([0.5, 0.3, 0.2], 0.9, 1, 2, top_p=0.8) == EDGE
    assert told([0.5, 0.3, 0.2], 0.9, 1, 2, top_p=0.799) == WRONG
    assert told([0.5, 0.3, 0.2], 0.9, 1, 2, min_p=0.4) == EDGE
    assert told([0.5, 0.3, 0.2], 0.9, 1, 2, min_p=0.41) == WRONG


def test_the_tally_notices_what_differs():
    grid, drawn, expected = subject("llama")
    at = next(one.index for one in drawn if one.params.logprobs and one.params.logprobs_mode == "raw")
    found = expected[at].__class__(**{name: getattr(expected[at], name) for name in expected[at].__slots__})
    [first, *others] = expected[at].outputs

    def wrong(**changes) -> int:
        fields = {name: getattr(first, name) for name in first.__slots__} | changes
        found.outputs, tally = [type(first)(**fields), *others], Tally()
        tally.compare(grid, drawn[at], expected[at], found)
        return len(tally.wrong)

    assert wrong() == 0 and wrong(finish_reason="repetition") == 1 and wrong(logprobs=first.logprobs[:-1])
    token, entry = first.token_ids[0], dict(first.logprobs[0])
    entry[token] = type(entry[token])(entry[token].logprob + 1e-4)
    assert wrong(logprobs=[entry, *first.logprobs[1:]]) == 1
    with pytest.raises(AssertionError, match="excused"):
        Tally(tokens=25_000, near_ties=2, edges=1).check()


# -- the plain driver --------------------------------------------------------------------------------------


def test_without_overlap_nothing_is_in_flight():
    drawn = draw_requests(10, 5, VOCAB)
    with LLM.from_config(llama(), 0, strict=True, progress=False, overlap=False, **ROOMY) as llm:
        assert not llm.engine.overlap and engine("llama").engine.overlap
        step, pending = llm.engine.step, []

        def looked():
            found = step()
            assert llm.engine.in_flight is None
            pending.extend(one.pending for one in llm.engine.scheduler.running)
            return found

        llm.engine.step = looked
        drive(llm.engine, [one.request() for one in drawn], random.Random(0), nothing)
        assert len(pending) > 20 and not any(pending)
