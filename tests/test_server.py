"""The server as clients see it: the official client against a loopback server, one a module."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from tokenloom import SamplingParams
from tokenloom.serve.driver import Driver
from tokenloom.serve.locks import FairLock
from tokenloom.serve.server import create_app
from tokenloom.tests import tiny

KEY = "secret"
PROMPTS = [f"def f{index}(" for index in range(16)]
LONG = dict(prompt="def f(", max_tokens=100, extra_body={"ignore_eos": True})


@contextmanager
def serving(llm, **settings):
    """The server's address while it runs in a thread."""
    app = create_app(llm, api_key=KEY, **settings)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def llm():
    return tiny.llm()


@pytest.fixture(scope="module")
def url(llm):
    with serving(llm, max_body_bytes=50_000, served_model_names=["tiny"]) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def metrics(url) -> dict[str, float]:
    """Sample name, with its outcome, to value."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            found[":".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def until(condition):
    """Wait for what happens in other threads; the limit is far beyond any pause of the machine."""
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def params(index, **more):
    return SamplingParams(temperature=0.9, seed=index, max_tokens=20, **more)


def expected(llm, index, prompt=None):
    return llm.generate(prompt or PROMPTS[index], params(index))[0].outputs[0].text


def test_models_and_health(client, url):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tokenloom"
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_completion_equals_generate(client, llm):
    answer = client.completions.create(
        model="tiny", prompt=PROMPTS[:3], n=2, seed=3, max_tokens=9, logprobs=2, stop=["zzz"],
        extra_body={"top_k": 50, "min_p": 0.0001},
    )  # fmt: skip
    shape = SamplingParams(n=2, seed=3, max_tokens=9, logprobs=2, stop=["zzz"], top_k=50, min_p=0.0001)
    outputs = [one for output in llm.generate(PROMPTS[:3], shape) for one in output.outputs]
    assert [choice.text for choice in answer.choices] == [one.text for one in outputs]
    assert [choice.index for choice in answer.choices] == list(range(6))
    for choice, one in zip(answer.choices, outputs):
        scores = [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs)]
        assert choice.logprobs.token_logprobs == pytest.approx(scores, abs=1e-4)
    assert answer.usage.completion_tokens == sum(len(one.token_ids) for one in outputs)


def test_chat_whole_and_streamed(client, llm):
    messages = [{"role": "user", "content": "hello"}]
    shape = dict(model="tiny", messages=messages, seed=4, temperature=0.9, max_completion_tokens=20)
    whole = client.chat.completions.create(**shape, logprobs=True, top_logprobs=2)
    text = expected(llm, 4, llm.chat_prompt(messages))
    assert whole.choices[0].message.content == text and whole.choices[0].message.role == "assistant"
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(**shape, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == [whole.choices[0].finish_reason]


def test_a_stream_ends_with_done(url):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    events = answer.text.strip().split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events[-1] == "data: [DONE]" and all(event.startswith("data: {") for event in events[:-1])


def test_sixteen_concurrent_requests_equal_generate(url, llm):
    """Streamed and whole, with a `generate` in another thread beside them."""
    alone = [expected(llm, index) for index in range(16)]
    beside: list[list[str]] = []

    def notebook():
        outputs = llm.generate(PROMPTS, [params(index) for index in range(16)], use_tqdm=False)
        beside.append([output.outputs[0].text for output in outputs])

    async def ask(client, index):
        shape = dict(model="tiny", prompt=PROMPTS[index], seed=index, temperature=0.9, max_tokens=20)
        if index % 2:
            return (await client.completions.create(**shape)).choices[0].text
        stream = await client.completions.create(**shape, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everyone():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(16)))

    thread = threading.Thread(target=notebook)
    thread.start()
    answers = asyncio.run(everyone())
    thread.join()
    assert answers == alone and beside == [alone]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(client, url, llm, stream):
    def count(name):
        return metrics(url).get(f"tokenloom_{name}", 0)

    cancelled, generated = count("requests_total:cancelled"), count("generation_tokens_total")
    if stream:
        answer = client.completions.create(model="tiny", **{**LONG, "prompt": ["a", "b"]}, n=16, stream=True)
        next(answer)
    with llm._lock:  # no step until the server knows
        if stream:
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(model="tiny", **LONG, timeout=httpx.Timeout(None, read=0.3))
        until(lambda: count("requests_total:cancelled") == cancelled + 1)
    until(lambda: not llm.engine.scheduler.busy)
    assert count("generation_tokens_total") - generated < (32 * 100 if stream else 1)
    assert llm.engine.pages.free == llm.engine.pages.num_pages - 1


def test_mistakes_get_openais_errors(client, url):
    def create(**body):
        return lambda: client.completions.create(**{"model": "tiny", "prompt": "a", **body})

    mistakes = [
        (create(temperature=-1), openai.BadRequestError, "temperature=-1.0 must lie|temperature=-1 must lie"),
        (create(prompt=[7] * 500), openai.BadRequestError, "500 tokens"),
        (create(prompt=[7] * 500, stream=True), openai.BadRequestError, "500 tokens"),
        (create(prompt=["a", [10**6]]), openai.BadRequestError, "vocabulary"),
        (create(extra_body={"speed": 1}), openai.BadRequestError, "'speed' is not supported"),
        (create(model="gpt-5"), openai.NotFoundError, "'gpt-5' is not served"),
        (create(prompt="a" * 60_000), openai.APIStatusError, "longer than 50000 bytes"),
        (lambda: client.models.retrieve("gpt-5"), openai.NotFoundError, "not served"),
        (client.with_options(api_key="guess").models.list, openai.AuthenticationError, "API key"),
    ]
    for call, kind, reason in mistakes:
        with pytest.raises(kind, match=reason) as raised:
            call()
        assert raised.value.body["message"] and raised.value.body["type"]
    with pytest.raises(openai.APIStatusError) as raised:
        create(prompt="a" * 60_000)()
    assert raised.value.status_code == 413
    headers = {"Authorization": f"Bearer {KEY}"}
    for content in (b"", b"{", b"\xff", b"[" * 40_000, b"[]"):
        answer = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert create(max_tokens=2)().choices[0].text


def test_metrics_count_what_happened(client, url):
    before = metrics(url)
    client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=6, extra_body={"ignore_eos": True})
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=[])
    after = metrics(url)

    def grown(name):
        return after[f"tokenloom_{name}"] - before.get(f"tokenloom_{name}", 0)

    assert grown("requests_total:length") == 1 and grown("requests_total:refused") == 1
    assert grown("prompt_tokens_total") == 3 and grown("generation_tokens_total") == 6
    assert grown("time_to_first_token_seconds_count") == 1 and grown("inter_token_seconds_count") == 5
    assert grown("steps_total") >= 6 and after["tokenloom_running"] == after["tokenloom_waiting"] == 0
    assert 0 < after["tokenloom_pages_free"] <= after["tokenloom_pages_total"]


def test_a_full_queue_answers_429(llm):
    with serving(llm, max_waiting=2) as url:
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {"prompt": "a", "n": 2, "max_tokens": 3}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            answers = []
            with llm._lock:  # no step: the first request waits
                thread = threading.Thread(
                    target=lambda: answers.append(client.post("/v1/completions", json=body))
                )
                thread.start()
                until(lambda: metrics(url)["tokenloom_waiting"] == 2)
                full = client.post("/v1/completions", json=body)
            thread.join()
            assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
            assert full.json()["error"]["code"] == "rate_limit_exceeded"
            assert answers[0].status_code == 200
            assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("part", ["step", "add"])
def test_a_broken_engine_is_reported(llm, monkeypatch, part):
    with serving(llm) as url, monkeypatch.context() as patch:

        def broken(*_):
            raise RuntimeError("the device is gone")

        patch.setattr(llm.engine, part, broken)
        body = {"prompt": ["a", "b"]}
        for _ in range(2):
            answer = httpx.post(
                f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}
            )
            assert answer.status_code == 500 and "the device is gone" in answer.json()["error"]["message"]
        assert httpx.get(f"{url}/health").status_code == 503
    llm.abort()


def test_a_driver_finishes_or_aborts_when_it_stops(llm):
    for finish in (True, False):
        updates = []
        driver = Driver(llm)
        with llm._lock:
            driver.submit("def f(", SamplingParams(max_tokens=60, ignore_eos=True), updates.append)
            stopping = threading.Thread(target=driver.stop, kwargs={"finish": finish})
            stopping.start()
        stopping.join()
        reason = updates[-1].output.outputs[0].finish_reason
        assert reason == ("length" if finish else "abort") and sum(update.last for update in updates) == 1
        with pytest.raises(RuntimeError, match="has stopped"):
            driver.submit("a", SamplingParams(), updates.append)


def test_a_loop_of_steps_keeps_nobody_out():
    """What a plain lock does not promise: whoever waits is next."""
    lock, steps, stop = FairLock(), [0], threading.Event()

    def loop():
        while not stop.is_set():
            with lock:
                steps[0] += 1
                time.sleep(0.002)

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    waits = []
    for _ in range(40):
        asked = steps[0]
        with lock, lock:  # reentrant
            waits.append(steps[0] - asked)
    stop.set()
    for thread in threads:
        thread.join()
    assert sorted(waits)[len(waits) // 2] <= 6 and steps[0] > 2


def test_sigterm_finishes_requests_and_exits_with_0(tmp_path):
    folder = tiny.save(tmp_path / "model")
    command = ["serve", str(folder), "--port", "0", "--max-model-len", str(tiny.LENGTH), "--max-num-seqs", "2",
               "--max-num-batched-tokens", "32", "--served-model-name", "tiny"]  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "-m", "tokenloom.serve.cli", *command], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TOKENLOOM_API_KEY": KEY},
    )  # fmt: skip
    seen = []
    try:
        for line in server.stderr:
            seen.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                break
        rest = threading.Thread(target=lambda: seen.extend(server.stderr))
        rest.start()
        with openai.OpenAI(base_url=f"{found[1]}/v1", api_key=KEY) as client:
            stream = client.completions.create(model="tiny", **LONG, stream=True)
            first = next(stream)
            server.send_signal(signal.SIGTERM)
            chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.wait() == 0
        rest.join()
    finally:
        server.kill()
    assert "Traceback" not in "".join(seen), json.dumps(seen)
