"""Searches by beams: equal to a plain reference over full forward passes, in company, in chunks, preempted."""

import random
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
from tokenloom import LLM, BeamSearch, DiverseBeamSearch, SamplingParams
from tokenloom.attention.caches.policy import Capacity
from tokenloom.model.state import make_state
from tokenloom.serve.drafters.copy_spec import CopySpec
from tokenloom.serve.search.beams import check_engine
from tokenloom.tests import beams, tiny
from tokenloom.tests.engines import check_against_whole, engine, greedy, prompts, same_tokens, whole
from tokenloom.tests.shapes import ALL, VOCAB

# A twelfth of the vocabulary ends a text.
ENDING = tuple(range(24))
PLAIN = SamplingParams(max_tokens=8, ignore_eos=True)
STOPS = replace(PLAIN, stop_token_ids=ENDING)


def text(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(length)]


# Within a page, ending where one does, and longer than a step's budget.
SHORT, LONG, LONGER = text(9, 70), text(48, 71), text(107, 72)


@cache
def row(tokens: tuple[int, ...]) -> np.ndarray:
    return whole("llama", list(tokens))[-1].astype(np.float64)


def scores(prompt: list[int], process=lambda prompt, text, row: row) -> beams.Scores:
    return lambda texts: np.array([process(prompt, text, row((*prompt, *text))) for text in texts])


def ids(result) -> list[list[int]]:
    return [list(one.token_ids) for one in result.chosen]


def owners(llm: LLM) -> int:
    return sum(llm.engine.pages._owners)


def agree(result, found: list[beams.Found], ends=frozenset(), penalty: float = 1.0) -> None:
    """The hypotheses are the reference's, in its order, with its sums and reasons."""
    assert result.error is None and ids(result) == [list(one.tokens) for one in found]
    for mine, one in zip(result.hypotheses, found, strict=True):
        assert mine.logprob == pytest.approx(one.logprob, abs=1e-4)
        assert mine.objective == pytest.approx(one.objective, abs=1e-4)
        assert mine.score == pytest.approx(one.objective / len(one.tokens) ** penalty, abs=1e-4)
        assert mine.completion.cumulative_logprob == mine.logprob and mine.group == one.group
        assert mine.completion.finish_reason == ("stop" if one.tokens[-1] in ends else "length")
        assert sum(mine.token_logprobs) == pytest.approx(mine.logprob, abs=1e-4)


# -- plain beam search ---------------------------------------------------------------------------------------

RULES = [
    (2, 1.0, False), (4, 1.0, False), (4, 0.0, True), (4, 2.0, "never"), (4, 0.7, True), (2, -1.0, "never"),
    (4, 1.0, "never"),
]  # fmt: skip


@pytest.mark.parametrize("width,penalty,early", RULES)
def test_equals_the_reference(width, penalty, early):
    llm, before = engine("llama"), owners(engine("llama"))
    found = BeamSearch(width, penalty, early).generate(llm, [SHORT, LONG, LONGER], STOPS)
    reasons = set()
    for prompt, result in zip((SHORT, LONG, LONGER), found):
        wanted, _ = beams.search(
            scores(prompt), width, longest=8, ends=set(ENDING), penalty=penalty, early=early
        )
        agree(result, wanted, set(ENDING), penalty)
        reasons |= {one.finish_reason for one in result.chosen}
    assert owners(llm) == before and not llm.engine.scheduler.running
    assert "stop" in reasons or width == 2


def test_width_one_is_greedy():
    llm, drawn = engine("llama"), [SHORT, LONG]
    plain = llm.generate(drawn, replace(STOPS, temperature=0.0, logprobs=2))
    for result, output in zip(BeamSearch(1).generate(llm, drawn, STOPS), plain):
        same_tokens(output, result.output)
        assert result.best.finish_reason == output.outputs[0].finish_reason and result.pages_copied == 0


def processed(
    params: SamplingParams, prompt: list[int], text: tuple[int, ...], row: np.ndarray
) -> np.ndarray:
    """Log-probabilities behind the processors, from the model's: what they add to all logits does not matter, but a
    repetition penalty looks at the sign, so these tests go without it."""
    z, counts = row.copy(), Counter(text)
    for token, count in counts.items():
        z[token] -= params.frequency_penalty * count + params.presence_penalty
    z += [(params.logit_bias or {}).get(token, 0.0) for token in range(len(z))]
    banned = [t for t in range(len(z)) if params.allowed_token_ids and t not in params.allowed_token_ids]
    if len(text) < params.min_tokens:
        banned += list(params.stop_token_ids or ())
    z[banned] = -np.inf
    return z - np.log(np.exp(z - z.max()).sum()) - z.max()


@pytest.mark.parametrize("more", [
    dict(presence_penalty=-2.0, frequency_penalty=-1.0, logit_bias={3: 1.0, 110: 1.0}),
    dict(min_tokens=5, logit_bias=dict.fromkeys(ENDING, 4.0)),
    dict(allowed_token_ids=[4, 90, 200], max_tokens=4),
], ids=["penalties", "min tokens", "fewer tokens than beams"])  # fmt: skip
def test_processors_decide(more):
    """Their state follows the beams: what a beam's text says is what its parent's said, and its token."""
    params = replace(STOPS, **more)
    for prompt, result in zip((SHORT, LONG), BeamSearch(4).generate(engine("llama"), [SHORT, LONG], params)):
        wanted, _ = beams.search(
            scores(prompt, partial(processed, params)), 4, longest=params.max_tokens, ends=set(ENDING)
        )
        agree(result, wanted, set(ENDING))
        assert all(len(one.token_ids) > params.min_tokens for one in result.chosen)


def test_a_repetition_penalty_sees_prompt_and_beam():
    """Against a search of width 1 and plain greedy decoding, and by what it does: beams repeat nothing."""
    llm, params = engine("llama"), replace(PLAIN, repetition_penalty=4.0)
    plain = llm.generate(LONG, replace(params, temperature=0.0, logprobs=2))[0]
    same_tokens(plain, BeamSearch(1).generate(llm, LONG, params)[0].output)
    for tokens in ids(BeamSearch(4).generate(llm, LONG, params)[0]):
        assert len(set(tokens)) == len(tokens) and not set(tokens) & set(LONG)


def test_nothing_left_to_continue_ends_the_search():
    """Only end tokens are allowed: each is a text of one token, and fewer come back than there are beams."""
    result = BeamSearch(4).generate(engine("llama"), SHORT, replace(STOPS, allowed_token_ids=[2, 5]))[0]
    assert sorted(ids(result)) == [[2], [5]] and result.steps == 1
    assert {one.finish_reason for one in result.chosen} == {"stop"} and len(result.output.outputs) == 2


# -- diverse beam search -------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups,diversity", [(2, 0.5), (4, 0.3)])
def test_diverse_equals_the_reference(groups, diversity):
    found = DiverseBeamSearch(4, groups=groups, diversity=diversity).generate(
        engine("llama"), [SHORT, LONG], STOPS
    )
    for prompt, result in zip((SHORT, LONG), found):
        wanted, _ = beams.search(
            scores(prompt), 4, longest=8, ends=set(ENDING), groups=groups, diversity=diversity
        )
        agree(result, wanted, set(ENDING))
    assert any(one.objective < one.logprob - 0.1 for result in found for one in result.hypotheses)


def test_one_group_is_beam_search_whatever_the_diversity():
    llm = engine("llama")
    plain = BeamSearch(4).generate(llm, LONG, STOPS)[0]
    for diversity in (0.0, 0.5, 100.0):
        diverse = DiverseBeamSearch(4, groups=1, diversity=diversity).generate(llm, LONG, STOPS)[0]
        assert diverse.hypotheses == plain.hypotheses


def test_without_diversity_every_group_is_a_narrower_beam_search():
    llm = engine("llama")
    for groups in (2, 4):
        narrow = BeamSearch(4 // groups).generate(llm, LONG, STOPS)[0]
        found = DiverseBeamSearch(4, groups=groups, diversity=0.0).generate(llm, LONG, STOPS)[0]
        for group in range(groups):
            mine = [list(one.completion.token_ids) for one in found.hypotheses if one.group == group]
            assert mine == ids(narrow)


def test_great_diversity_keeps_groups_apart_at_every_step():
    llm = engine("llama")
    for prompt in (SHORT, LONG):
        texts = ids(DiverseBeamSearch(4, groups=4, diversity=1000.0).generate(llm, prompt, PLAIN)[0])
        assert all(len(set(step)) == 4 for step in zip(*texts, strict=True))


# -- in the engine -------------------------------------------------------------------------------------------


def test_beside_others_nothing_changes():
    """Searches of two kinds and samples in one engine, with chunked prompts: each as alone."""
    llm = engine("llama")
    searches = [BeamSearch(2), None, BeamSearch(4), DiverseBeamSearch(4, groups=2), None, None]
    drawn = prompts(6, 72, longest=100)
    sampled = replace(STOPS, temperature=1.0, seed=5, n=2, max_tokens=20, repetition_penalty=1.2)
    params = [sampled if search is None else search.prepare(STOPS) for search in searches]
    before = owners(llm)
    gangs = [None if search is None else search.beams() for search in searches]
    together = llm.generate(drawn, params, gangs=gangs)
    assert owners(llm) == before
    for search, prompt, output, one in zip(searches, drawn, together, params):
        if search is None:
            assert [c.token_ids for c in llm.generate(prompt, one)[0].outputs] == [
                c.token_ids for c in output.outputs
            ]
        else:
            alone = search.generate(llm, prompt, STOPS)[0]
            assert [list(c.token_ids) for c in output.outputs] == ids(alone)
            assert [c.cumulative_logprob for c in output.outputs] == pytest.approx(
                [h.logprob for h in alone.hypotheses], abs=1e-4
            )


def interrupted(llm: LLM, monkeypatch, every: int, act) -> None:
    """Call `act` on the first running sequence of a gang before every `every`-th step."""
    step, count = llm.engine.step, iter(range(1, 10_000))

    def stepped():
        gangs = [one for one in llm.engine.scheduler.running if one.gang is not None]
        if next(count) % every == 0 and gangs:
            act(gangs[-1])
        return step()

    monkeypatch.setattr(llm.engine, "step", stepped)


@pytest.mark.parametrize("every", [5, 7])
def test_a_preempted_gang_goes_on_exactly(every, monkeypatch):
    """Any member's preemption takes all; they come back with different texts, share what is common, and wait for each
    other."""
    llm, searches = engine("llama"), (BeamSearch(4), DiverseBeamSearch(4, groups=2))
    params = replace(STOPS, repetition_penalty=1.1)
    alone = [search.generate(llm, LONG, params)[0] for search in searches]
    interrupted(llm, monkeypatch, every, llm.engine.scheduler.preempt)
    before, preemptions = owners(llm), llm.engine.scheduler.preemptions
    for search, one in zip(searches, alone):
        again = search.generate(llm, LONG, params)[0]
        assert ids(again) == ids(one)
        assert [h.objective for h in again.hypotheses] == pytest.approx(
            [h.objective for h in one.hypotheses], abs=1e-4
        )
        assert again.output.metrics.preemptions > 0
    assert owners(llm) == before and llm.engine.scheduler.preemptions >= preemptions + 2


def test_a_small_pool_preempts_gangs_by_itself():
    """29 pages of 8 tokens: two searches and samples that do not fit at once."""
    llm, wide = engine("llama", True), engine("llama")
    drawn = [text(length, length) for length in (110, 40, 30, 50, 70)]
    search = BeamSearch(2)
    sampled = SamplingParams(temperature=1.0, seed=3, max_tokens=70, ignore_eos=True)
    long = replace(STOPS, max_tokens=40, stop_token_ids=None)
    gangs = [None, search.beams(), None, search.beams(), None]
    params = [sampled if gang is None else search.prepare(long) for gang in gangs]
    preemptions = llm.engine.scheduler.preemptions
    outputs = llm.generate(drawn, params, gangs=gangs)
    assert llm.engine.scheduler.preemptions > preemptions and owners(llm) == 0
    assert any(one.metrics.preemptions for one, gang in zip(outputs, gangs) if gang)
    for prompt, output, gang in zip(drawn, outputs, gangs):
        if gang is not None:
            assert [list(c.token_ids) for c in output.outputs] == ids(search.generate(wide, prompt, long)[0])


def test_a_pool_that_holds_no_more_ends_by_length(monkeypatch):
    """Three beams of 29 pages of 8: what the prompt shares, and a third of the rest each."""
    llm = engine("llama", True)
    result = BeamSearch(3).generate(llm, text(100, 5), replace(PLAIN, max_tokens=None))[0]
    assert {len(one.token_ids) for one in result.chosen} == {(12 + 17 // 3) * 8 - 100} and owners(llm) == 0
    monkeypatch.setattr(llm.engine.pages, "num_pages", 13)
    with pytest.raises(ValueError, match=r"BeamSearch\(beam_width=3.*12 pages of 8.*num_pages"):
        BeamSearch(3).generate(llm, [1] * 90, PLAIN)


def test_a_search_that_is_cut_short_shows_its_beams(monkeypatch):
    llm = engine("llama")
    interrupted(llm, monkeypatch, 6, lambda one: llm.engine.abort(one.owner.request, "timeout"))
    before = owners(llm)
    result = BeamSearch(4).generate(llm, SHORT, STOPS)[0]
    assert owners(llm) == before and not llm.engine.busy and result.output.finished
    cut = [one for one in result.chosen if one.finish_reason == "timeout"]
    assert cut and {len(one.token_ids) for one in cut} == {result.steps} and 0 < result.steps < 8
    wanted, _ = beams.search(scores(SHORT), 4, longest=result.steps, ends=set(ENDING), early="never")
    assert {tuple(one.token_ids) for one in cut} <= {one.tokens for one in wanted}
    with pytest.raises(ValueError, match="no seed"):
        llm.resume(result.output)


def test_what_beams_computed_serves_the_prefix_cache():
    """Pages that beams filled are found under their own text, and hold it."""
    llm, prompt = engine("llama", True), text(21, 77)
    for one in BeamSearch(2).generate(llm, prompt, replace(PLAIN, max_tokens=30))[0].chosen:
        output = llm.generate([*prompt, *one.token_ids], greedy(4))[0]
        assert output.num_cached_tokens == 48
        check_against_whole("llama", output)
    assert owners(llm) == 0


def test_waiting_searches_can_be_cancelled():
    llm = engine("llama")
    request = llm._new_request(None, SHORT, BeamSearch(4).prepare(PLAIN), None)
    request.gang = BeamSearch(4).beams()
    llm.engine.add(request)
    assert llm.abort(request.request_id) == 1
    assert (
        request.finished
        and not llm.engine.busy
        and [one.finish_reason for one in request.samples] == ["abort"]
    )


def test_text_bad_words_and_end_of_text():
    """With a tokenizer: an end-of-text token ends its beam only, unless it is ignored; bad words never come."""
    llm = tiny.llm()
    eos = min(llm.engine.eos_ids)
    likely = SamplingParams(max_tokens=6, logit_bias={eos: 6.0}, min_tokens=2)
    result = BeamSearch(3, early_stopping=True).generate(llm, "def f(x):", likely)[0]
    assert len(result.chosen) == 3
    for one in result.chosen:
        kept = one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids
        assert one.text == llm.tokenizer.decode(kept) and eos not in kept and len(one.token_ids) > 2
    assert "stop" in {one.finish_reason for one in result.chosen}
    ignored = BeamSearch(3).generate(llm, "def f(x):", replace(likely, ignore_eos=True, min_tokens=0))[0]
    assert {len(one.token_ids) for one in ignored.chosen} == {6} and eos in ignored.best.token_ids
    word = llm.tokenizer.decode(result.best.token_ids[:1])
    banned = BeamSearch(3).generate(llm, "def f(x):", replace(likely, bad_words=[word]))[0]
    assert all(result.best.token_ids[0] not in one.token_ids for one in banned.chosen)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("search,said", [
    (lambda: BeamSearch(0), "beam_width=0"),
    (lambda: BeamSearch(2, early_stopping="always"), "early_stopping='always'"),
    (lambda: BeamSearch(2, float("nan")), "length_penalty=nan"),
    (lambda: DiverseBeamSearch(4, groups=3), "beam_width=4 .*groups=3"),
    (lambda: DiverseBeamSearch(4, groups=2, diversity=-1.0), "diversity=-1.0"),
])  # fmt: skip
def test_settings_are_checked(search, said):
    with pytest.raises(ValueError, match=said):
        search()


@pytest.mark.parametrize("more", [
    dict(structured_outputs={"regex": "a+"}), dict(stop="x"), dict(n=3), dict(logprobs=1), dict(top_p=0.5),
    dict(segment_tokens=4), dict(temperature=0.5), dict(mirostat_mode=2),
    dict(repetition_detection=dict(max_pattern_size=2, min_count=4)),
], ids=lambda more: next(iter(more)))  # fmt: skip
def test_parameters_without_meaning_are_refused(more):
    with pytest.raises(ValueError, match=rf"{next(iter(more))}.*BeamSearch"):
        BeamSearch(4).prepare(replace(PLAIN, **more))


@pytest.mark.parametrize("shape", ["recurrent", "hybrid"])
def test_recurrent_models_are_refused(shape):
    state = make_state(ALL[shape](), Capacity(2, 16, 2))
    programs = SimpleNamespace(speculation=None, whole=None, state=state)
    drawn = SimpleNamespace(scheduler=SimpleNamespace(max_num_seqs=2), programs=programs)
    with pytest.raises(ValueError, match=r"BeamSearch\(2\).*RecurrentState"):
        check_engine("BeamSearch(2)", 2, drawn)


def test_engines_that_do_not_suit_are_refused():
    llm = engine("llama")
    with pytest.raises(ValueError, match=r"beam_width=5.*max_num_seqs=4"):
        BeamSearch(5).generate(llm, SHORT, PLAIN)
    programs = SimpleNamespace(speculation=SimpleNamespace(drafter=CopySpec()))
    drafting = SimpleNamespace(scheduler=llm.engine.scheduler, programs=programs)
    with pytest.raises(ValueError, match=r"BeamSearch\(2\).*drafter=CopySpec"):
        check_engine("BeamSearch(2)", 2, drafting)
    elsewhere = SimpleNamespace(speculation=None, whole=SimpleNamespace(is_fully_addressable=False))
    with pytest.raises(ValueError, match=r"BeamSearch\(2\).*one process"):
        check_engine("BeamSearch(2)", 2, SimpleNamespace(scheduler=llm.engine.scheduler, programs=elsewhere))


def test_a_prompt_that_cannot_run_leaves_the_others():
    good, bad = BeamSearch(2).generate(engine("llama"), [SHORT, [VOCAB]], PLAIN)
    assert len(good.chosen) == 2 and bad.best is None and str(VOCAB) in bad.error


# -- against transformers ------------------------------------------------------------------------------------


def ended(tokens: list[int], ends: set[int]) -> list[int]:
    """A padded text up to the token that ends it."""
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


@pytest.mark.parity
@pytest.mark.parametrize("width,penalty,early", [(4, 1.0, False), (3, 0.5, True), (4, 2.0, "never")])
def test_equals_transformers(width, penalty, early, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, eos_token_id=list(range(1, 25)),
        bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    llm = LLM(
        tmp_path, dtype="float32", max_num_seqs=4, page_size=8, skip_tokenizer_init=True, progress=False
    )
    reasons = set()
    drawn = [[token % 200 for token in prompt] for prompt in prompts(4, 80, longest=30)]
    for prompt in drawn:
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=width,
            num_return_sequences=width, length_penalty=penalty, early_stopping=early, max_new_tokens=12,
            do_sample=False, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        ours = BeamSearch(width, penalty, early).generate(llm, prompt, SamplingParams(max_tokens=12))[0]
        reasons |= {one.finish_reason for one in ours.chosen}
        assert ids(ours) == [
            ended(one[len(prompt) :].tolist(), set(range(1, 25))) for one in theirs.sequences
        ]
        assert [h.score for h in ours.hypotheses] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
    llm.close()
    assert "stop" in reasons
