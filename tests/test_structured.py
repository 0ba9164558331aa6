"""Structured output: whatever the weights, what ends validates; masks and tokens are those of brute force."""

import json
import random
import re
import sys
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from tokenloom import LLM, SamplingParams, StructuredOutputs
from tokenloom.model import checkpoint
from tokenloom.model.config import llama_config
from tokenloom.serve.sampling.grammar_mask import GrammarMask
from tokenloom.serve.sampling.processors import Context, unpack_bits
from tokenloom.serve.sampling.structured import Grammars
from tokenloom.serve.tokenizer import Tokenizer
from tokenloom.tests import tiny
from tokenloom.tests.drawn import draw_schema

# The vocabulary of the weights is padded beyond the tokenizer's, and not to a multiple of 32.
PADDED = 4109
REGEXES = (
    r"[a-c]{2,9}",
    r"(\+|-)?[0-9]{1,3}(\.[0-9]{1,2})?",
    r"(foo|ba[rz])(, (foo|ba[rz])){0,2}",
    r"x|",
    r"é+ü{2}",
)
CHOICES = ("yes", "no", 'a "quoted" \\ one', "naïve 🙂", "yes and no")


@cache
def tokenizer():
    return Tokenizer.load(checkpoint.resolve("demo"))


@cache
def llm() -> LLM:
    config = llama_config(**{**tiny.CONFIG, "vocab": PADDED})
    return LLM.from_config(config, 0, tokenizer=tokenizer(), strict=True, progress=False, **tiny.SIZES)


def asks(seed=0, **structured) -> SamplingParams:
    return SamplingParams(max_tokens=90, seed=seed, structured_outputs=structured)


def everything() -> list[SamplingParams]:
    """One request of each kind, and some that are free."""
    draw = random.Random(3)
    params = [asks(i, regex=regex) for i, regex in enumerate(REGEXES)]
    params += [asks(20 + i, json=draw_schema(draw), disable_any_whitespace=i % 2 == 0) for i in range(5)]
    params += [
        asks(7, choice=CHOICES),
        asks(8, grammar='root ::= "ab" root "c" | "d"'),
        SamplingParams(seed=4),
    ]
    params += [SamplingParams(temperature=0.0, max_tokens=30), replace(asks(9, regex=REGEXES[0]), n=3)]
    return params


def validate(params: SamplingParams, text: str) -> None:
    asked = params.structured_outputs
    assert isinstance(asked, StructuredOutputs)
    if asked.json is not None:
        jsonschema.validate(json.loads(text), json.loads(asked.json))
    elif asked.regex is not None:
        assert re.fullmatch(asked.regex, text), (asked.regex, text)
    elif asked.choice is not None:
        assert text in asked.choice
    elif asked.json_object:
        assert isinstance(json.loads(text), dict)
    else:
        count = text.count("ab")
        assert text == "ab" * count + "d" + "c" * count


def tokens(outputs):
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


@cache
def whole():
    """What `everything` generates, rows with and without grammars in one batch."""
    prompts = [[5 + i, 9, 300 + i] * (1 + i % 7) for i in range(len(everything()))]
    return prompts, llm().generate(prompts, everything(), use_tqdm=False)


def test_what_ends_is_valid():
    ended = 0
    for params, output in zip(everything(), whole()[1], strict=True):
        assert output.error is None
        for one in output.outputs:
            if params.structured_outputs is not None and one.finish_reason == "stop":
                validate(params, one.text)
                ended += 1
    assert ended >= 10
    assert llm().engine.programs.compilations.late == 0


def test_nothing_else_changes_the_tokens(monkeypatch):
    """Alone, without overlap, and preempted again and again: the same tokens."""
    prompts, outputs = whole()
    expected, engine, chosen = tokens(outputs), llm().engine, (0, 6, 14)
    for index in chosen:
        assert tokens(llm().generate(prompts[index], everything()[index])) == [expected[index]]
    scheduler, step, before = engine.scheduler, engine.step, engine.scheduler.preemptions

    def preempting():
        if engine.steps % 5 == 4 and scheduler.running:
            scheduler.preempt(scheduler.running[0])
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", preempting)
        assert tokens(llm().generate(prompts, everything(), use_tqdm=False)) == expected
    assert scheduler.preemptions > before + 10
    monkeypatch.setattr(engine, "overlap", False)
    assert tokens(llm().generate(prompts, everything(), use_tqdm=False)) == expected


def test_free_rows_do_not_notice():
    prompts, outputs = whole()
    free = [i for i, params in enumerate(everything()) if params.structured_outputs is None]
    assert tokens(llm().generate([prompts[i] for i in free], [everything()[i] for i in free])) == [
        tokens(outputs)[i] for i in free
    ]


def test_segments_are_one_generation():
    prompts, outputs = whole()
    paused = llm().generate(prompts, [replace(params, segment_tokens=3) for params in everything()])
    while any(output.resumable for output in paused):
        paused = llm().resume([json.loads(json.dumps(o.snapshot())) for o in paused], segment_tokens=4)
    assert tokens(paused) == tokens(outputs)
    assert [o.outputs[0].text for o in paused] == [o.outputs[0].text for o in outputs]


def test_when_the_grammar_is_complete_only_the_end_follows():
    """Also where end-of-text is not to be noticed, or is banned for a while: then the grammar wins."""
    for changes in ({}, {"ignore_eos": True}, {"min_tokens": 30}):
        params = SamplingParams(max_tokens=60, structured_outputs=dict(choice=["yes"]), seed=1, **changes)
        [one] = llm().generate([3, 4], params)[0].outputs
        assert (one.text, one.finish_reason, one.stop_reason) == ("yes", "stop", None)
        assert one.token_ids[-1] in tokenizer().eos_token_ids


def test_masked_greedy_is_the_best_allowed_token():
    """The model's log-probabilities, and what a regular expression allows by trying every token of the vocabulary: the
    text so far and the token must begin some text that matches."""
    begins = re.compile(r"(|-|-?[0-9]|-?[0-9]{2}|-?[0-9]{3})")
    params = SamplingParams(
        temperature=0.0, structured_outputs=dict(regex="-?[0-9]{3}"), max_tokens=8, logprobs=0
    )
    everywhere = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, ignore_eos=True)
    prompt, text = [17, 30, 4], ""
    [one] = llm().generate(prompt, params)[0].outputs
    spelled = {
        i: tokenizer().token_bytes(i)
        for i in range(tokenizer().vocab_size)
        if i not in tokenizer().special_ids
    }
    assert re.fullmatch("-?[0-9]{3}", one.text)
    for token in one.token_ids[:-1]:
        legal = [i for i, b in spelled.items() if b and begins.fullmatch(text + b.decode("utf-8", "replace"))]
        best = llm().generate(prompt, replace(everywhere, allowed_token_ids=legal))[0].outputs[0]
        assert list(best.token_ids) == [token]
        prompt, text = [*prompt, token], text + spelled[token].decode()


def test_a_mask_is_brute_force():
    grammars = Grammars(tokenizer(), PADDED, (0, 2))
    asked = StructuredOutputs.of({"regex": "(ab|a)*c{1,2}"})
    assert asked is not None
    matcher = grammars.matcher(asked)
    begins, full = re.compile("(ab|a)*c{0,2}"), re.compile("(ab|a)*c{1,2}")
    text = b""
    for token in [*tokenizer().encode("abaa", add_special_tokens=False), *tokenizer().encode("c")]:
        seats, words = grammars.masks([(3, matcher)], 2, 9)
        np.testing.assert_array_equal(seats, [3, 9])
        bits = np.asarray(unpack_bits(jnp.asarray(words), PADDED))[0]
        expected = np.zeros(PADDED, bool)
        for i in range(tokenizer().vocab_size):
            if i not in tokenizer().special_ids and tokenizer().token_bytes(i):
                after = text + tokenizer().token_bytes(i)
                expected[i] = begins.fullmatch(after.decode("latin-1")) is not None
        expected[[0, 2]] = full.fullmatch(text.decode()) is not None
        np.testing.assert_array_equal(bits, expected)
        fork = matcher.fork()
        matcher.accept(token)
        text += tokenizer().token_bytes(token)
        again = grammars.masks([(0, fork)], 1, 9)[1][0]
        np.testing.assert_array_equal(again, words[0])
    assert not matcher.error and not matcher.ended
    matcher.accept(2)
    assert matcher.ended


def test_masks_are_written_in_place():
    programs = llm().engine.programs
    memory = programs.compiled["mask", 4].memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(programs.sampler_state))
    assert memory.temp_size_in_bytes < 1024


def test_an_unconstrained_row_is_unchanged_to_the_bit():
    """Also beside a constrained one; all-ones masks change nothing either."""
    processor, vocab = GrammarMask(), 45
    state = processor.init(3, vocab)
    masks = np.array([[0b1010, 0], [0xFFFFFFFF, 0xFFFFFFFF]], np.uint32)
    state = processor.write(state, jnp.array([1, 2]), jnp.asarray(masks))
    state = {**state, "constrained": jnp.array([False, True, True, False])}
    z = np.random.RandomState(0).randn(3, vocab).astype(np.float32)
    z[0, :4] = [0.0, -0.0, -np.inf, 1e-40]
    ctx = Context(jnp.full(3, 5), jnp.full(3, 3), jnp.ones(3, bool))
    np.testing.assert_array_equal(processor.wanted(state, jnp.arange(3), ctx), [False, True, True])
    out = np.asarray(jax.jit(processor.apply)(state, jnp.arange(3), z, ctx))
    np.testing.assert_array_equal(out[[0, 2]].view(np.uint32), z[[0, 2]].view(np.uint32))
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(out[1])), [1, 3])
    banned = np.where(np.isin(np.arange(vocab), [1, 3]), -np.inf, z)
    out = np.asarray(jax.jit(processor.apply)(state, jnp.arange(3), banned, ctx))
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(out[1])), [1, 3])


def test_what_does_not_compile_is_that_requests_error():
    wrong = {
        "regex": ("a(", "unclosed group"),
        "json": ({"type": "objekt"}, "objekt"),
        "grammar": ('start: "a', "lexer error"),
    }
    for name, (value, reason) in wrong.items():
        with pytest.raises(ValueError, match=rf"structured_outputs cannot be compiled.*(?s:.*){reason}"):
            llm().generate([1, 2], asks(**{name: value}))
    both = llm().generate([[1, 2], [1, 2]], [asks(regex="a("), asks(regex="a")])
    assert "unclosed group" in (both[0].error or "") and both[1].outputs[0].text == "a"
    for settings, reason in {
        "{}": "exactly one of",
        '{"json": "{}", "regex": "a"}': "has json and regex",
        '{"choice": []}': "1 to 4096 texts",
        '{"choice": "yes"}': "1 to 4096 texts",
        '{"choice": ["a", ""]}': "none of them empty",
        '{"regex": 5}': "regex must be text",
        '{"json": 5}': "json must be a JSON schema",
        '{"jsn": "{}"}': "dict of its fields",
        '{"json_object": 1}': "True or False",
    }.items():
        with pytest.raises(ValueError, match=f"structured_outputs.*{reason}"):
            SamplingParams(structured_outputs=json.loads(settings))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        asks(regex="a").validate_for(10, tokenizer=False)


def test_without_llguidance_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'tokenloom\[structured\]'"):
        Grammars(tokenizer(), PADDED, (0,)).check({"regex": "a"})


def test_a_grammar_that_fails_on_the_way_ends_its_request_only(monkeypatch):
    """Logits that make the sampler leave the grammar stand for a parser that gives up."""
    engine = llm().engine
    make = engine.grammars.masks

    def careless(rows, width, idle):
        seats, words = make(rows, width, idle)
        return seats, words | np.uint32(0xFFFFFFFF)

    monkeypatch.setattr(engine.grammars, "masks", careless)
    greedy = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    failed, free = llm().generate(
        [[1, 2], [1, 2]], [replace(greedy, structured_outputs=dict(regex="[0-9]{9}")), greedy]
    )
    assert (failed.error or "").startswith("structured_outputs failed")
    assert failed.outputs[0].finish_reason == "error" and len(free.outputs[0].token_ids) == 6
    assert engine.pages.free == engine.pages.num_pages - 1
