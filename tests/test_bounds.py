"""What a server bounds whatever the model does: tokens, time, the queue, repetition, and what requests may hold."""

import os
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenloom import LLM, SamplingParams
from tokenloom.serve.bounds import Bounds, Deadlines, QueueFull
from tokenloom.serve.repetition import RepetitionDetectionParams, RepetitionDetector
from tokenloom.serve.request import Request
from tokenloom.tests.engines import engine, greedy, prompts

EXAMPLES = int(os.environ.get("TOKENLOOM_EXAMPLES", "200"))
SIZES = dict(max_num_seqs=2, max_num_batched_tokens=32, max_model_len=128, strict=True, progress=False)


@pytest.fixture(scope="module")
def bounded() -> LLM:
    """At most 6 tokens a sample, at most 3 waiting sequences."""
    return LLM("demo-draft", max_output_tokens=6, max_waiting=3, **SIZES)


def ends(output) -> list[tuple[str, int]]:
    return [(one.finish_reason, len(one.token_ids)) for one in output.outputs]


# -- output budgets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [dict(max_tokens=None), dict(max_tokens=100), dict(max_tokens=50, min_tokens=50, ignore_eos=True)],
)
def test_no_sample_outgrows_the_server(bounded, asked):
    params = SamplingParams(n=2, seed=1, logit_bias={bounded.tokenizer.eos_token_id: -100.0}, **asked)
    assert ends(bounded.generate("def f(", params)[0]) == [("length", 6)] * 2
    assert ends(bounded.generate("def f(", SamplingParams(temperature=0.0, max_tokens=2))[0]) == [
        ("length", 2)
    ]
    # In segments too: the cap is on the whole generation.
    [paused] = bounded.generate("def f(", replace(params, segment_tokens=4))
    assert ends(paused) == [("segment", 4)] * 2
    assert ends(bounded.resume(paused, segment_tokens=4)[0]) == [("length", 6)] * 2


# -- the queue ---------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_recovers(bounded):
    streams = [bounded.stream("def f(") for _ in range(3)]
    with pytest.raises(QueueFull, match=r"3 sequences wait already and max_waiting=3.*or raise max_waiting"):
        bounded.stream("def f(")
    assert isinstance(QueueFull("x"), ValueError)
    assert all("".join(stream) for stream in streams)
    assert "".join(bounded.stream("def f("))


def test_generate_feeds_the_queue_as_room_appears(bounded):
    """Outputs, seeds included, are those of an engine without a limit."""
    params = SamplingParams(temperature=1.0, max_tokens=3, n=2)
    drawn = [f"x{index} = " for index in range(40)]
    most, add = [], bounded.engine.add
    bounded.engine.add = lambda request: (add(request), most.append(len(bounded.engine.scheduler.waiting)))
    outputs = bounded.generate(drawn, params)
    bounded.engine.add = add
    assert len(most) == 40 and max(most) <= 3 + 1
    again = bounded.generate(drawn, [replace(params, seed=output.seed) for output in outputs])
    assert [ends(output) for output in outputs] == [ends(output) for output in again]
    assert len({output.seed for output in outputs}) == 40
    assert outputs[7].outputs[0].text == again[7].outputs[0].text


def test_bad_bounds_are_refused():
    for name in ("max_output_tokens", "max_waiting"):
        for value in (0, -1, 2.5, True, "many"):
            with pytest.raises(ValueError, match=f"{name}=.*at least 1, or None"):
                LLM("demo-draft", **{name: value})
    assert Bounds().room(10**9) and Bounds().length(3, None, 50) == 50
    assert Bounds(max_output_tokens=4).length(3, 2, 50) == 5


# -- deadlines and cancellation ----------------------------------------------------------------------------


def test_deadlines_end_running_and_waiting_requests(monkeypatch):
    llm, timed = engine("llama"), replace(greedy(60), timeout_s=1000.0)
    drawn = prompts(7, 51)
    whole = llm.generate(drawn, greedy(60))
    requests = [llm._submit(prompt, timed) for prompt in drawn]
    untimed = llm._submit(drawn[0], greedy(60))
    for _ in range(12):
        llm.engine.step()
    assert not any(request.finished for request in requests), "no deadline has come yet"
    monkeypatch.setattr(llm.engine.deadlines, "clock", lambda: time.monotonic() + 1001.0)
    reported = {id(sample.request) for sample in llm.engine.step()}
    assert {id(request) for request in requests} <= reported
    outputs = [request.output() for request in requests]
    assert {one.outputs[0].finish_reason for one in outputs} == {"timeout"}
    lengths = [len(one.outputs[0].token_ids) for one in outputs]
    assert lengths[0] > 0 and lengths[-1] == 0, "one had run, one had waited"
    for one, other in zip(outputs, whole):
        got = list(one.outputs[0].token_ids)
        assert got == list(other.outputs[0].token_ids)[: len(got)]
    while not untimed.finished:
        llm.engine.step()
    assert untimed.samples[0].finish_reason == "length"
    late = llm.generate(drawn, timed)  # past their deadline when they come: none of them runs
    assert [ends(one) for one in late] == [[("timeout", 0)]] * len(drawn)
    assert not llm.engine.scheduler.busy and llm.engine.pages.free == llm.engine.pages.num_pages - 1


def test_deadlines_come_in_order_and_ended_requests_are_swept():
    now = [0.0]
    deadlines, draw = Deadlines(clock=lambda: now[0]), random.Random(1)
    requests = []
    for index in range(2000):
        request = Request(str(index), None, [1], SamplingParams(timeout_s=draw.uniform(1, 100)), 0)
        request.arrival, request.error = 0.0, "ended" if draw.random() < 0.9 else None
        deadlines.add(request)
        requests.append(request)
        assert len(deadlines._heap) <= 64 + 2 * sum(not one.finished for one in requests)
    deadlines.add(Request("free", None, [1], SamplingParams(), 0))
    found = []
    for now[0] in range(0, 120, 7):
        due = deadlines.due()
        assert all(request.params.timeout_s <= now[0] for request in due)
        found += due
    alive = [request for request in requests if not request.finished]
    assert sorted(found, key=id) == sorted(alive, key=id)
    assert [r.params.timeout_s // 7 for r in found] == sorted(r.params.timeout_s // 7 for r in found)


def test_abort_from_another_thread(bounded):
    """While generate runs: what runs, what waits and what is held back ends, and the engine goes on."""
    params, results = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True), []
    started, step = threading.Event(), bounded.engine.step

    def slow():
        found = step()
        started.set()
        return found

    bounded.engine.step = slow
    thread = threading.Thread(target=lambda: results.append(bounded.generate(["def f("] * 400, params)))
    thread.start()
    assert started.wait(60)
    ended = bounded.abort()
    thread.join()
    bounded.engine.step = step
    reasons = [output.outputs[0].finish_reason for output in results[0]]
    assert ended == reasons.count("abort") > 0 and set(reasons) <= {"abort", "length"}
    assert all(output.finished for output in results[0])
    assert bounded.abort() == 0 == bounded.abort("no such request")
    stream, other = bounded.stream("def f(", params), bounded.stream("def f(", params)
    first = next(stream)
    assert bounded.abort(stream.output.request_id) == 1
    rest = "".join(stream)
    assert stream.output.outputs[0].finish_reason == "abort" and stream.output.outputs[0].text == first + rest
    assert "".join(other) == bounded.generate("def f(", params)[0].outputs[0].text


def test_a_forgotten_stream_ends_at_the_next_step(bounded):
    stream = bounded.stream("def f(")
    next(stream)
    request = stream._request
    del stream
    assert request.samples[0].finish_reason is None, "collected anywhere, so nothing happens at once"
    bounded.engine.step()
    assert request.samples[0].finish_reason == "abort" and not bounded.engine.scheduler.busy


# -- repetition --------------------------------------------------------------------------------------------


def qualifies(tokens: list[int], params: RepetitionDetectionParams) -> bool:
    """The definition: the last tokens, as many as are asked for, are one pattern that repeats."""
    for size in range(max(1, params.min_pattern_size), params.max_pattern_size + 1):
        span = max(size * params.min_count, params.min_covered)
        tail = tokens[-span:]
        if len(tail) == span and all(tail[i] == tail[i - size] for i in range(size, span)):
            return True
    return False


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.lists(st.integers(0, 2), max_size=60), st.integers(0, 4), st.integers(0, 5), st.integers(2, 5),
    st.integers(0, 20),
)  # fmt: skip
def test_the_detector_is_the_definition(tokens, low, more, count, covered):
    params = RepetitionDetectionParams(max(1, low + more), low, count, covered)
    detector = RepetitionDetector(params)
    for end, token in enumerate(tokens, 1):
        assert detector.push(token) == qualifies(tokens[:end], params)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_cycles_stop_at_the_first_qualifying_token(size, count):
    prefix, pattern = list(range(1000, 1100)), list(range(size))
    detector = RepetitionDetector(RepetitionDetectionParams(64, 0, count))
    pushed = [detector.push(token) for token in prefix + pattern * (count + 1)]
    assert pushed.index(True) == len(prefix) + size * count - 1


def test_a_million_random_tokens_do_not_repeat():
    detector = RepetitionDetector(RepetitionDetectionParams(32, 1, 3, 16))
    tokens = np.random.default_rng(0).integers(0, 300, 10**6).tolist()
    assert not any(map(detector.push, tokens))


def test_a_loop_ends_with_its_own_finish_reason():
    llm, [prompt] = engine("llama"), prompts(1, 52)
    loop = replace(greedy(60), logit_bias={5: 100.0})
    [plain] = llm.generate(prompt, loop)
    watching = dict(max_pattern_size=8, min_count=3, min_covered=20)
    [cut] = llm.generate(prompt, replace(loop, repetition_detection=watching))
    assert ends(plain) == [("length", 60)] and ends(cut) == [("repetition", 20)]
    assert cut.outputs[0].stop_reason == "repetition_detected"
    # min_tokens comes first, as for every stop; the length comes before repetition.
    assert ends(llm.generate(prompt, replace(loop, repetition_detection=watching, min_tokens=33))[0]) == [
        ("repetition", 33)
    ]
    assert ends(llm.generate(prompt, replace(loop, repetition_detection=watching, max_tokens=20))[0]) == [
        ("length", 20)
    ]
    # Off, and on where nothing repeats: the same numbers.
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=40, logprobs=2, ignore_eos=True)
    off, zero, on = llm.generate(
        [prompt] * 3,
        [
            replace(params, repetition_detection=detection)
            for detection in (None, RepetitionDetectionParams(), RepetitionDetectionParams(16, 0, 4, 24))
        ],
    )
    assert off.outputs[0].token_ids == zero.outputs[0].token_ids == on.outputs[0].token_ids
    assert RepetitionDetectionParams(max_pattern_size=0, min_count=0) == RepetitionDetectionParams()


@pytest.mark.parametrize(
    "settings, reason",
    [
        (
            dict(max_pattern_size=4, min_pattern_size=5, min_count=2),
            "min_pattern_size=5 .*max_pattern_size=4",
        ),
        (dict(max_pattern_size=4), "min_count=0 must be at least 2 .*max_pattern_size=4"),
        (dict(max_pattern_size=10**6, min_count=2), "max_pattern_size=1000000 .*from 0 to 4096"),
        (dict(max_pattern_size=True), "max_pattern_size=True must be a whole number"),
        (dict(max_pattern=4), "some of max_pattern_size, min_pattern_size, min_count, min_covered"),
        ("yes", "must be RepetitionDetectionParams, or a dict"),
    ],
)
def test_bad_detection_is_refused(settings, reason):
    with pytest.raises(ValueError, match=f"repetition_detection.*{reason}"):
        SamplingParams(repetition_detection=settings)


# -- malformed requests ------------------------------------------------------------------------------------

NUMBERS = [
    -1, 0, 1, 2, 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), 2**31, 2**63, 2**64, 10**30,
    -(10**30), 10**400, True, False, 1 + 2j, np.int64(3), np.float32(0.5), np.nan,
]  # fmt: skip
WEIRD = st.one_of(
    st.none(), st.sampled_from(NUMBERS), st.text(max_size=5), st.binary(max_size=5),
    st.sampled_from(["\ud800", "\x00", "</s>", object(), len, SamplingParams(), np.zeros(2), np.zeros((2, 2), int)]),
)  # fmt: skip
NESTED = st.recursive(
    WEIRD,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.sampled_from([0, -1, 10**6, None, 1.5])), inner, max_size=3),
    ),
    max_leaves=6,
)  # fmt: skip
FIELDS = sorted(SamplingParams.__dataclass_fields__)
PROMPTS = st.one_of(
    NESTED, st.just("def f("), st.lists(st.integers(-2, 5000), max_size=200),
    st.dictionaries(st.sampled_from(["prompt", "prompt_token_ids", "cache_salt", "text"]), NESTED, max_size=3),
)  # fmt: skip


GOOD = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def answer(bounded):
    return bounded.generate("def f(", GOOD)[0].outputs[0]


@settings(max_examples=EXAMPLES, deadline=None)
@given(PROMPTS, st.dictionaries(st.sampled_from(FIELDS), NESTED, max_size=3))
def test_malformed_requests_get_an_error_and_spoil_nothing(bounded, answer, prompt, fields):
    try:
        params = SamplingParams(**fields)
        outputs = bounded.generate(prompt, params)
    except ValueError as error:
        assert len(str(error)) > 10
    else:
        for output in outputs:
            if output.error is not None:
                assert len(output.error) > 10
                continue
            assert output.finished and len(output.outputs) == params.n
            for one in output.outputs:
                assert one.finish_reason in ("stop", "length", "timeout", "segment", "repetition")
                assert len(one.token_ids) <= 6
    after = bounded.generate("def f(", GOOD)[0].outputs[0]
    assert (after.text, after.logprobs) == (answer.text, answer.logprobs)
    assert not bounded.engine.scheduler.busy
