"""OpenAI's objects: what requests become, what answers look like, and that a stream joined is the whole answer."""

import json
import queue
import random
from itertools import chain

import numpy as np
import pytest
from tokenloom import SamplingParams, StructuredOutputs
from tokenloom.serve import openai
from tokenloom.serve.driver import Driver
from tokenloom.serve.openai import CHAT, COMPLETIONS, Refusal, error_object, error_status, parse
from tokenloom.serve.openai_answers import Chunks, response
from tokenloom.serve.outputs import CompletionOutput, Logprob, RequestOutput
from tokenloom.tests import tiny

USER = [{"role": "user", "content": "hello"}]
NAMES = ["tiny", "other"]


@pytest.fixture(scope="module")
def llm():
    return tiny.llm()


def completion(llm, prompt="def f(", **body):
    return parse(COMPLETIONS, {"prompt": prompt, **body}, llm, NAMES)


def chat(llm, messages=USER, **body):
    return parse(CHAT, {"messages": messages, **body}, llm, NAMES)


def test_fields_become_sampling_params(llm):
    body = dict(
        n=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=0.3, frequency_penalty=-0.2,
        repetition_penalty=1.1, stop=["a", "b"], stop_token_ids=[4], ignore_eos=True, min_tokens=1, seed=9,
        allowed_token_ids=[3, 4, 5], bad_words=["x"], timeout_s=60,
    )  # fmt: skip
    shared = {**body, "logit_bias": {"5": 1.5}, "max_tokens": 8, "user": "u", "stop": ["a", "b"]}
    expected = SamplingParams(**body, logit_bias={5: 1.5}, max_tokens=8)
    assert completion(llm, **shared).params == expected
    assert chat(llm, **shared).params == expected
    scored = completion(llm, logprobs=3, echo=True).params
    assert (scored.logprobs, scored.prompt_logprobs) == (3, 3)
    assert chat(llm, logprobs=True, top_logprobs=4).params.logprobs == 4
    assert chat(llm, logprobs=True).params.logprobs == 0
    assert chat(llm, top_logprobs=0, logprobs=False).params.logprobs is None


def test_defaults_are_openais(llm):
    assert completion(llm).params == SamplingParams(max_tokens=16)
    assert chat(llm).params == SamplingParams(max_tokens=None)
    assert chat(llm, max_completion_tokens=3).params.max_tokens == 3
    assert completion(llm, temperature=None, max_tokens=None, stop=None).params == SamplingParams(
        max_tokens=16
    )
    assert completion(llm).model == "tiny" and completion(llm, model="other").model == "other"


def test_prompts_of_every_form(llm):
    ids = llm.tokenizer.encode("def f(")
    for prompt in ("def f(", ids, ["def f("], [ids]):
        assert [one["prompt_token_ids"] for one in completion(llm, prompt).prompts] == [ids]
    assert [one["prompt"] for one in completion(llm, ["a", [5]], echo=True).prompts] == [
        "a", llm.tokenizer.decode([5])
    ]  # fmt: skip


def test_a_cache_salt_reaches_the_prompt(llm):
    call = completion(llm, ["a", [5]], cache_salt="mine")
    assert [prompt["cache_salt"] for prompt in call.prompts] == ["mine", "mine"]
    assert llm.generate(call.prompts, call.params)[0].outputs
    with pytest.raises(Refusal, match="cache_salt must be text"):
        completion(llm, cache_salt=5)


def test_messages_reach_the_template(llm):
    prompt = llm.chat_prompt(USER)
    assert chat(llm).prompts == [prompt]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert "hel\nlo" in chat(llm, parts).prompts[0]["prompt"]
    started = [*USER, {"role": "assistant", "content": "def start"}]
    assert chat(llm, started, continue_final_message=True).prompts[0]["prompt"].endswith("def start")
    assert not chat(llm, add_generation_prompt=False).prompts[0]["prompt"].endswith("<|assistant|>")


def test_tools_reach_the_template_unless_choice_is_none(llm, monkeypatch):
    template = "{{ tools | tojson }} {% for m in messages %}{{ m | tojson }}{% endfor %} {{ style }}"
    monkeypatch.setitem(llm.tokenizer.chat_templates, "default", template)
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = chat(llm, messages, tools=[tool], chat_template_kwargs={"style": "dry"}).prompts[0]["prompt"]
    assert text.startswith(json.dumps([tool])) and text.endswith(" dry") and '"arguments": {"a": 1}' in text
    assert chat(llm, tools=[tool], tool_choice="none").prompts[0]["prompt"].startswith("null")


REFUSED = {
    "field": (COMPLETIONS, {"prompt": "a", "temprature": 1}, "'temprature' is not supported", 400),
    "chat field": (COMPLETIONS, {"prompt": "a", "messages": USER}, "'messages' is not supported", 400),
    "template": (CHAT, {"messages": USER, "chat_template": "x"}, "'chat_template' is not supported", 400),
    "model": (COMPLETIONS, {"prompt": "a", "model": "gpt"}, "'gpt' is not served here", 404),
    "model type": (COMPLETIONS, {"prompt": "a", "model": [1]}, "not served here", 404),
    "url": ("/v1/files", {}, "not served", 404),
    "body": (CHAT, [1], "JSON object", 400),
    "no prompt": (COMPLETIONS, {}, "prompt must be", 400),
    "no prompts": (COMPLETIONS, {"prompt": []}, "prompt must be", 400),
    "mixed": (COMPLETIONS, {"prompt": ["a", 5]}, "prompt must be", 400),
    "surrogate": (COMPLETIONS, {"prompt": "\ud800"}, "surrogate", 400),
    "no messages": (CHAT, {}, "messages must be", 400),
    "no role": (CHAT, {"messages": [{"content": "a"}]}, "role", 400),
    "no content": (CHAT, {"messages": [{"role": "user"}]}, "content must be", 400),
    "image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "must be text",
        400,
    ),
    "forced": (CHAT, {"messages": USER, "tool_choice": "required"}, "cannot be forced", 400),
    "json": (CHAT, {"messages": USER, "response_format": {"type": "json_schema"}}, "response_format", 400),
    "schema": (
        CHAT,
        {
            "messages": USER,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}},
        },
        "cannot be compiled.*objekt",
        400,
    ),
    "two grammars": (
        COMPLETIONS,
        {"prompt": "a", "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "exclude each other",
        400,
    ),
    "kwargs": (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"template": "x"}},
        "chat_template_kwargs",
        400,
    ),
    "n": (COMPLETIONS, {"prompt": "a", "n": 129}, "n=129 is more", 400),
    "best_of": (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of", 400),
    "suffix": (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", 400),
    "two limits": (CHAT, {"messages": USER, "max_tokens": 1, "max_completion_tokens": 2}, "differ", 400),
    "bias": (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "no token id", 400),
    "top": (CHAT, {"messages": USER, "top_logprobs": 2}, "needs logprobs=true", 400),
    "options": (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "needs stream", 400),
    "scored echo": (
        COMPLETIONS,
        {"prompt": "a", "echo": True, "logprobs": 1, "stream": True},
        "streamed",
        400,
    ),
    "zero": (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens=0", 400),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_honoured_is_refused_by_name(llm, name):
    url, body, reason, status = REFUSED[name]
    with pytest.raises(ValueError, match=reason) as refused:
        parse(url, body, llm, NAMES)
    error = error_object(refused.value)
    assert error_status(refused.value) == status and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_response_formats_become_structured_outputs(llm):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    for ask in (chat, completion):
        format = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
        call = ask(llm, response_format=format, max_tokens=40, seed=3)
        assert call.params.structured_outputs == StructuredOutputs(json=schema)
        call = ask(llm, response_format={"type": "json_object"})
        assert call.params.structured_outputs == StructuredOutputs(json_object=True)
        assert ask(llm, response_format={"type": "text"}).params.structured_outputs is None
        call = ask(llm, structured_outputs={"choice": ["yes", "no"]}, max_tokens=9)
        [text] = [one.text for output in llm.generate(call.prompts, call.params) for one in output.outputs]
        assert text in ("yes", "no")


def test_a_schema_that_fails_on_its_way_is_an_error_of_its_request(llm, monkeypatch):
    updates = queue.SimpleQueue()
    call = completion(llm, structured_outputs={"regex": "[0-9]{9}"}, max_tokens=12)
    make = llm.engine.grammars.masks
    monkeypatch.setattr(llm.engine.grammars, "masks", lambda *a: (make(*a)[0], ~np.zeros_like(make(*a)[1])))
    with Driver(llm) as driver:
        driver.submit(call.prompts[0], call.params, updates.put)
        while not (update := updates.get(timeout=60)).last:
            pass
    assert update.output is None and "structured_outputs failed" in str(update.error)


def test_json_is_written_and_read_whatever_it_holds():
    value = {"text": "\ud800 é \N{GRINNING FACE} \n", "list": [1.5, None]}
    assert json.loads(openai.dumps(value)) == value
    for data in (b"{", b"\xff", b"[" * 10**5, "1" * 5000):
        with pytest.raises(Refusal):
            openai.loads(data)


def test_logprobs_in_both_shapes(llm):
    a, b = llm.tokenizer.encode(" def")[0], llm.tokenizer.encode("(")[0]
    minus = Logprob(float("-inf"), 3, "(")
    entries = [{a: Logprob(-0.5, 1, " def"), b: minus}, {b: minus, a: Logprob(-0.1, 1, " def")}]
    done = CompletionOutput(0, " def(", [a, b], -9.0, entries, "stop", 5)
    output = RequestOutput("0", "x", [1, 2, 3], None, [done], True)
    whole = response(completion(llm, logprobs=1), "id", 7, [output])
    assert whole["choices"][0] == {
        "index": 0, "text": " def(", "finish_reason": "stop", "stop_reason": 5,
        "logprobs": {"tokens": [" def", "("], "token_logprobs": [-0.5, -9999.0], "text_offset": [0, 4],
                     "top_logprobs": [{" def": -0.5, "(": -9999.0}, {" def": -0.1, "(": -9999.0}]},
    }  # fmt: skip
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert (whole["id"], whole["object"], whole["created"]) == ("cmpl-id", "text_completion", 7)
    scored = response(chat(llm, logprobs=True, top_logprobs=1), "id", 7, [output])["choices"][0]["logprobs"]
    shown = {"token": " def", "logprob": -0.1, "bytes": list(b" def")}
    assert scored["content"][1] == {
        "token": "(", "logprob": -9999.0, "bytes": [40], "top_logprobs": [shown]
    }  # fmt: skip
    assert json.dumps(whole, allow_nan=False)


def test_echo_begins_with_the_prompt(llm):
    call = completion(llm, ["def f(", [5, 6]], echo=True, logprobs=1, max_tokens=3, seed=1)
    whole = response(call, "id", 0, llm.generate(call.prompts, call.params))
    for choice, prompt in zip(whole["choices"], call.prompts):
        count = len(prompt["prompt_token_ids"])
        assert choice["text"].startswith(prompt["prompt"])
        assert len(choice["logprobs"]["tokens"]) == count + 3
        assert choice["logprobs"]["token_logprobs"][0] is None and choice["logprobs"]["text_offset"][0] == 0
    scores = completion(llm, "def f(", echo=True, logprobs=1, max_tokens=0)
    only = response(scores, "id", 0, llm.generate(scores.prompts, scores.params))
    assert only["choices"][0]["text"] == "def f(" and only["usage"]["completion_tokens"] == 0
    first = whole["choices"][0]["logprobs"]["token_logprobs"][1:]
    assert only["choices"][0]["logprobs"]["token_logprobs"][1:] == first[:-3] and len(first) > 3


def _drawn(draw, kind):
    body = {
        "n": draw.choice([1, 2]), "max_tokens": draw.randint(1, 20), "seed": draw.getrandbits(60), "stream": True,
        "stop": draw.choice([None, [" "], ["e", "th"]]), "ignore_eos": draw.random() < 0.5,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if kind == CHAT:
        return {**body, "messages": USER, "logprobs": draw.choice([True, False])}
    echo = draw.choice([True, False])
    prompt = draw.choice(["def f(", ["a", [5, 6]]])
    return {**body, "prompt": prompt, "echo": echo, "logprobs": None if echo else draw.choice([None, 2])}


@pytest.mark.parametrize("kind", [COMPLETIONS, CHAT])
def test_chunks_joined_are_the_whole_answer(llm, kind):
    draw, updates = random.Random(3), queue.SimpleQueue()
    with Driver(llm) as driver:
        for _ in range(12):
            call = parse(kind, _drawn(draw, kind), llm, NAMES)
            for place, prompt in enumerate(call.prompts):
                driver.submit(prompt, call.params, lambda update, place=place: updates.put((place, update)))
            chunks, outputs = Chunks(call, "id", 0), {}
            joined = [{"text": "", "entries": [], "finish_reason": None} for _ in range(call.samples)]
            events = chunks.first()
            while len(outputs) < len(call.prompts):
                place, update = updates.get(timeout=60)
                events += [chunk for d in update.deltas if (chunk := chunks.delta(place, d)) is not None]
                if update.output is not None:
                    outputs[place] = update.output
            for event in events:
                choice = event["choices"][0]
                assert event["usage"] is None and joined[choice["index"]]["finish_reason"] is None
                text = choice["delta"].get("content", "") if call.chat else choice["text"]
                joined[choice["index"]]["text"] += text
                joined[choice["index"]]["entries"].append(choice["logprobs"])
                joined[choice["index"]]["finish_reason"] = choice["finish_reason"]
            whole = response(call, "id", 0, [outputs[place] for place in range(len(outputs))])
            assert chunks.usage([*outputs.values()])["usage"] == whole["usage"]
            for choice, pieces in zip(whole["choices"], joined, strict=True):
                assert (choice["message"]["content"] if call.chat else choice["text"]) == pieces["text"]
                assert choice["finish_reason"] == pieces["finish_reason"]
                for name in ("content",) if call.chat else ("tokens", "token_logprobs", "text_offset"):
                    parts = [entry[name] for entry in pieces["entries"] if entry]
                    assert [*chain.from_iterable(parts)] == (choice["logprobs"] or {name: []})[name]
