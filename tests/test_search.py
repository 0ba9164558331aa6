"""Searches: their samples are those of `n`, the first to finish are first by steps, cancelling frees at once."""

import itertools
import queue
import random
from collections import Counter
from dataclasses import replace

import pytest
from tokenloom import LLM, SamplingParams
from tokenloom.serve.driver import Driver
from tokenloom.serve.outputs import CompletionOutput
from tokenloom.serve.search.best_of_n import BestOfN
from tokenloom.serve.search.first_finish import FirstFinish
from tokenloom.serve.search.majority_vote import MajorityVote, decided, standings
from tokenloom.tests import tiny
from tokenloom.tests.engines import engine, prompts

# A twentieth of the vocabulary ends a sample, so lengths differ; some are cut off at the limit.
RACE = SamplingParams(temperature=1.0, seed=11, max_tokens=40, stop_token_ids=range(12), ignore_eos=True)
PROMPT = prompts(1, 40, longest=60)[0]


def ids(output):
    return [list(one.token_ids) for one in output.outputs]


def all_free(llm: LLM) -> bool:
    pages, scheduler = llm.engine.pages, llm.engine.scheduler
    return pages.free == pages.num_pages - 1 and not scheduler.running and not len(scheduler.waiting)


def watch_steps(monkeypatch, llm: LLM) -> list[list[tuple[str, int]]]:
    """For each step the (request, sample) that ended by themselves in it; checks that when a step returns every page
    that is not free belongs to a sample that goes on."""
    ended, step = [], llm.engine.step
    pages, scheduler = llm.engine.pages, llm.engine.scheduler

    def watched():
        advanced = step()
        stopped = [one for one in advanced if one.finish_reason]
        assert all(one.owner.finish_reason is None for one in scheduler.running)
        owned = {page for one in scheduler.running for page in one.pages}
        assert pages.free + len(owned) == pages.num_pages - 1
        ended.append([(one.request.request_id, one.index) for one in stopped if one.finish_reason != "abort"])
        return advanced

    monkeypatch.setattr(llm.engine, "step", watched)
    return ended


@pytest.mark.parametrize("search", [BestOfN(1), FirstFinish(1)], ids=["best of n", "first finish"])
def test_width_one_is_plain_sampling(search):
    llm, drawn = engine("llama"), prompts(5, 41, longest=40)
    plain = llm.generate(drawn, RACE)
    found = search.generate(llm, drawn, RACE)
    assert [ids(one.output) for one in found] == [ids(one) for one in plain]
    assert [list(one.best.token_ids) for one in found] == [list(one.outputs[0].token_ids) for one in plain]
    assert all(one.tokens_cancelled == one.tokens_dropped == one.tokens_saved == 0 for one in found)


def test_best_of_n_orders_the_samples_of_n():
    llm, drawn = engine("llama"), prompts(3, 42, longest=40)
    plain = llm.generate(drawn, replace(RACE, n=6, logprobs=0))
    for name in ("cumulative", "mean"):
        for whole, found in zip(plain, BestOfN(6, name).generate(llm, drawn, RACE)):
            assert ids(found.output) == ids(whole)
            totals = [sum(e[t].logprob for t, e in zip(o.token_ids, o.logprobs)) for o in whole.outputs]
            scores = [t / len(o.token_ids) if name == "mean" else t for t, o in zip(totals, whole.outputs)]
            assert list(found.choice.order) == sorted(range(6), key=lambda i: -scores[i])
            assert found.choice.scores == pytest.approx(dict(enumerate(scores)))
            assert found.best is found.output.outputs[found.choice.order[0]]
            assert found.tokens_generated == sum(len(o.token_ids) for o in whole.outputs)


def test_a_users_score_sees_the_prompt_and_equal_scores_go_to_the_lower_index():
    llm = engine("llama")
    seen = []

    def score(output, completion):
        seen.append((list(output.prompt_token_ids), completion.index))
        return -(completion.index // 2)

    found = BestOfN(4, score).generate(llm, PROMPT, RACE)[0]
    assert list(found.choice.order) == [0, 1, 2, 3] and found.output.outputs[0].logprobs is None
    assert sorted(seen) == [(PROMPT, index) for index in range(4)]


def shortest(output, k: int = 1) -> list[int]:
    """Brute force over complete samples: those that stopped, by length, then index."""
    stopped = [one for one in output.outputs if one.finish_reason == "stop"]
    return [one.index for one in sorted(stopped, key=lambda one: (len(one.token_ids), one.index))][:k]


@pytest.mark.parametrize("k", [1, 2])
def test_first_finish_is_the_shortest_of_the_complete_samples(k):
    """All n start in one step here, so the order of steps is the order of lengths."""
    llm = engine("llama")
    for seed in range(6):
        params = replace(RACE, seed=seed)
        whole = llm.generate(PROMPT, replace(params, n=4))[0]
        found = FirstFinish(4, k).generate(llm, PROMPT, params)[0]
        assert list(found.choice.order) == shortest(whole, k) and all_free(llm)
        last = len(found.chosen[-1].token_ids)
        for part, full in zip(found.output.outputs, whole.outputs):
            assert list(part.token_ids) == list(full.token_ids)[:last]
            assert part.finish_reason == ("abort" if len(full.token_ids) > last else full.finish_reason)
        spent = sum(len(one.token_ids) for one in whole.outputs)
        assert found.tokens_generated < spent <= found.tokens_generated + found.tokens_saved
        cancelled = [one for one in found.output.outputs if one.finish_reason == "abort"]
        assert found.tokens_cancelled == sum(len(one.token_ids) for one in cancelled)
        assert found.tokens_dropped == len(cancelled)


@pytest.mark.parametrize("kind", [("llama",), ("llama", True), ("hybrid",)], ids=["roomy", "tight", "hybrid"])
def test_the_first_is_first_by_steps_in_company_and_frees_at_once(kind, monkeypatch):
    """More samples than seats, prompts that wait, preemption: late samples run a later race."""
    llm, drawn = engine(*kind), prompts(6, 43, longest=80)
    params = [replace(RACE, seed=seed) for seed in range(6)]
    whole = llm.generate(drawn, [replace(one, n=5) for one in params])
    ended = watch_steps(monkeypatch, llm)
    found = FirstFinish(5).generate(llm, drawn, params)
    assert all_free(llm)
    for one, full in zip(found, whole):
        mine = [sorted(i for r, i in step if r == one.output.request_id) for step in ended]
        assert list(one.ended) == [index for step in mine for index in step]
        accepted = [i for i in one.ended if one.output.outputs[i].finish_reason == "stop"]
        assert [one.best.index] == accepted[:1]
        for part, complete in zip(one.output.outputs, full.outputs):
            assert list(part.token_ids) == list(complete.token_ids)[: len(part.token_ids)]
    never_ran = [c for one in found for c in one.output.outputs if not c.token_ids]
    assert never_ran, "some samples were meant to wait for a seat until their race was over"


def test_cancelled_samples_leave_their_seats_to_the_next_step(monkeypatch):
    """A second prompt waits while four samples race on four seats; the step after the finish runs it alone."""
    llm, works, over = engine("llama"), [], []
    schedule = llm.engine.scheduler.schedule
    monkeypatch.setattr(llm.engine.scheduler, "schedule", lambda: works.append(schedule()) or works[-1])

    def until(ended):
        over.append(len(works))
        return True

    second = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    outputs = llm.generate([PROMPT, PROMPT], [replace(RACE, n=4), second], until=[until, lambda ended: False])
    work = works[over[0]]
    assert len(over) == 1 and not work.decodes
    assert [one.owner.request.request_id for one in work.admitted] == [outputs[1].request_id]
    assert Counter(one.finish_reason for one in outputs[0].outputs)["abort"] == 3
    assert outputs[1].outputs[0].finish_reason == "length" and all_free(llm)


def test_what_is_not_accepted_does_not_win_the_race():
    """Brute force: the accepted samples by length and index, then the others."""
    llm, passed_over = engine("llama"), 0
    for seed in range(8):
        params = replace(RACE, seed=seed)
        whole = llm.generate(PROMPT, replace(params, n=4))[0].outputs
        found = FirstFinish(4, accept=lambda one: one.token_ids[-1] % 2 == 0).generate(llm, PROMPT, params)[0]
        order = sorted(whole, key=lambda one: (one.token_ids[-1] % 2, len(one.token_ids), one.index))
        assert list(found.choice.order) == [order[0].index]
        passed_over += found.ended[0] != order[0].index
    assert passed_over, "some first finisher was meant not to be accepted"


def test_nobody_accepted_falls_back_to_the_order_of_the_ends():
    llm = engine("llama")
    found = FirstFinish(3, 2, accept=lambda one: False).generate(llm, PROMPT, RACE)[0]
    assert list(found.choice.order) == list(found.ended[:2]) and len(found.ended) == 3
    assert found.tokens_saved == 0
    late = FirstFinish(3).generate(llm, PROMPT, replace(RACE, timeout_s=1e-9))[0]
    assert late.best.index == 0 and late.best.finish_reason == "timeout" and not late.ended


def test_a_function_that_fails_ends_its_prompt_only():
    llm, drawn = engine("llama"), prompts(3, 44, longest=30)
    bad = drawn[1]

    def score(output, completion):
        return 1 / (list(output.prompt_token_ids) != bad)

    found = BestOfN(2, score).generate(llm, drawn, RACE)
    assert [one.error is None for one in found] == [True, False, True]
    assert "ZeroDivisionError" in found[1].error and found[1].best is None
    assert ids(found[1].output) == ids(llm.generate(bad, replace(RACE, n=2))[0])
    race = FirstFinish(2, accept=lambda one: 1 / 0).generate(llm, drawn[:1], RACE)[0]
    assert "ZeroDivisionError" in race.error and all_free(llm)
    assert BestOfN(2).generate(llm, drawn, RACE)[0].error is None


def test_bad_settings_are_refused_and_bad_prompts_are_errors_of_their_own():
    llm = engine("llama")
    for make in (
        lambda: BestOfN(0),
        lambda: BestOfN(2, "sum"),
        lambda: FirstFinish(2, 3),
        lambda: FirstFinish(2, 0),
    ):
        with pytest.raises(ValueError, match=r"n=|score=|k="):
            make()
    with pytest.raises(ValueError, match="n=3"):
        BestOfN(2).generate(llm, PROMPT, replace(RACE, n=3))
    with pytest.raises(ValueError, match="segment_tokens"):
        BestOfN(2).generate(llm, PROMPT, replace(RACE, segment_tokens=3))
    with pytest.raises(ValueError, match="`until`"):
        llm.generate([PROMPT, PROMPT], RACE, until=[lambda ended: False])
    refused, fine = FirstFinish(2).generate(llm, [[10**6], PROMPT], RACE)
    assert "vocabulary" in refused.error and refused.choice is None and fine.best is not None


def test_searches_beside_other_requests_change_nobodys_tokens():
    llm, drawn = engine("llama"), prompts(4, 45, longest=40)
    params = [replace(RACE, seed=random.Random(i).getrandbits(64)) for i in range(4)]
    alone = [ids(llm.generate(p, s)[0]) for p, s in zip(drawn, params)]
    race = replace(RACE, n=3)
    judges = [*[lambda ended: False] * 4, *[lambda ended: True] * 2]
    mixed = llm.generate([*drawn, PROMPT, PROMPT], [*params, race, race], until=judges)
    assert [ids(one) for one in mixed[:4]] == alone
    assert all(any(c.finish_reason == "abort" for c in one.outputs) for one in mixed[4:])


def last_token(completion):
    """An answer with few values: some samples agree, some have none."""
    token = completion.token_ids[-1]
    return None if token % 5 == 4 else token % 3


def brute_force(answers):
    """The winner by definition: most votes, then the lowest index. answers: one a sample."""
    given = [answer for answer in answers if answer is not None]
    return min(set(given), key=lambda answer: (-given.count(answer), answers.index(answer)), default=None)


def test_early_stopping_is_exact_for_every_outcome():
    """Three answers (one of them new) and abstentions, up to 5 samples ending in any order: a vote is decided exactly
    when no completion of it changes the winner."""
    seen = Counter()
    for n in range(1, 6):
        for ended in range(n + 1):
            for indices in itertools.combinations(range(n), ended):
                rest = [index for index in range(n) if index not in indices]
                for given in itertools.product([None, "a", "b"], repeat=ended):
                    answers = dict(zip(indices, given))
                    winners = set()
                    for late in itertools.product([None, "a", "b", "c"], repeat=len(rest)):
                        whole = answers | dict(zip(rest, late))
                        winners.add(brute_force([whole[index] for index in range(n)]))
                    assert decided(answers, n) == (len(winners) == 1), (n, answers, winners)
                    if len(winners) == 1:
                        assert winners == {next(iter(standings(answers)), None)}
                    seen[ended < n and len(winners) == 1] += 1
    assert seen[True] > 50, "some votes were meant to be decided early"


@pytest.mark.parametrize("kind", [("llama",), ("llama", True)], ids=["roomy", "tight"])
def test_majority_is_the_brute_force_majority_and_early_stopping_keeps_it(kind):
    llm, drawn = engine(*kind), prompts(8, 46, longest=60)
    whole = llm.generate(drawn, replace(RACE, n=5))
    all_votes = MajorityVote(5, answer=last_token, early_stop=False).generate(llm, drawn, RACE)
    early = MajorityVote(5, answer=last_token).generate(llm, drawn, RACE)
    assert all_free(llm)
    for output, full, part in zip(whole, all_votes, early):
        answers = [last_token(one) for one in output.outputs]
        expected = brute_force(answers)
        assert full.choice.answer == part.choice.answer == expected
        assert full.choice.votes == Counter(answer for answer in answers if answer is not None)
        assert ids(full.output) == ids(output) and full.tokens_saved == 0
        assert full.best.index == answers.index(expected) and last_token(part.best) == expected
        assert part.tokens_generated <= full.tokens_generated <= part.tokens_generated + part.tokens_saved
    assert sum(one.tokens_cancelled > 0 for one in early) >= 3, "some votes were meant to be decided early"


def test_a_search_beside_a_driver():
    """Whoever steps (a server's or a batch job's driver, the search itself), tokens and winner are the same."""
    llm, drawn = engine("llama"), prompts(6, 47, longest=40)
    params = replace(RACE, n=2)
    alone = [ids(one) for one in llm.generate(drawn[2:], params)]
    expected = [
        brute_force([last_token(one) for one in output.outputs])
        for output in llm.generate(drawn[:2], replace(RACE, n=5))
    ]
    arrived: queue.SimpleQueue = queue.SimpleQueue()
    with Driver(llm) as driver:
        for place, prompt in enumerate(drawn[2:]):
            driver.submit(
                prompt, params, lambda update, at=place: arrived.put((at, update)), every_step=False
            )
        found = MajorityVote(5, answer=last_token).generate(llm, drawn[:2], RACE)
        updates = dict(arrived.get(timeout=60) for _ in alone)
    assert [one.choice.answer for one in found] == expected
    assert [ids(updates[place].output) for place in range(len(alone))] == alone and all_free(llm)


def test_answers_by_regular_expression_are_the_last_match_without_spaces():
    def read(pattern, text):
        return MajorityVote(1, answer=pattern).read(CompletionOutput(0, text, [1]))

    assert read(r"answer is (\d+)", "the answer is 3. No: the answer is 42") == "42"
    assert read(r"\d+ ?", "1 or 2 ") == "2" and read(r"(x)|\d", "7") is None and read(r"\d", "none") is None
    for make, match in (
        (lambda: MajorityVote(2, answer="("), "regular expression"),
        (lambda: MajorityVote(2, answer=3), "regular expression"),
        (lambda: MajorityVote(2, answer="a").prepare(replace(RACE, detokenize=False)), "detokenize"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def test_searches_compose_with_structured_outputs():
    pytest.importorskip("llguidance")
    llm = tiny.llm()
    choices, asked = {"yes", "no", "maybe"}, ["Is it so?", "And now?"]
    params = SamplingParams(seed=3, max_tokens=30, structured_outputs={"choice": sorted(choices)})
    whole = llm.generate(asked, replace(params, n=6))
    found = MajorityVote(6, answer=r"\w+").generate(llm, asked, params)
    for full, one in zip(whole, found):
        texts = [sample.text for sample in full.outputs]
        assert one.error is None and one.choice.answer == brute_force(texts) and set(texts) <= choices
    race = FirstFinish(6).generate(llm, "Is it so?", params)[0]
    assert race.best.text in choices and all_free(llm)


def test_an_answer_that_cannot_be_counted_is_the_prompts_error():
    llm = engine("llama")
    found = MajorityVote(2, answer=lambda one: [1]).generate(llm, PROMPT, RACE)[0]
    assert "unhashable" in found.error and found.best is None and all_free(llm)
