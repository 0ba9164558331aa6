"""The public API on the embedded model: text in, text out, and every mistake answered with the remedy."""

import asyncio
import signal
import threading
import time

import pytest
from tokenloom import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256, strict=True) as llm:
        yield llm


def text(output) -> str:
    return output.outputs[0].text


def test_strings_ids_and_dicts_are_the_same_prompt(llm):
    prompt = "import os\n\ndef main("
    ids = llm.tokenizer.encode(prompt)
    forms = [prompt, ids, {"prompt": prompt}, {"prompt_token_ids": ids}]
    outputs = llm.generate(forms, GREEDY)
    assert len({text(output) for output in outputs}) == 1 and text(outputs[0])
    assert text(llm.generate(prompt, GREEDY)[0]) == text(outputs[0])
    assert outputs[0].prompt == prompt and outputs[1].prompt is None
    assert outputs[0].outputs[0].finish_reason == "length" and len(outputs[0].outputs[0].token_ids) == 24


def test_the_demo_writes_python(llm):
    """It was trained on the standard library: after `import`, a module it has seen."""
    written = text(llm.generate("#!/usr/bin/env python3\n\nimport os\nimport ", GREEDY)[0])
    assert written.split()[0].rstrip(",").isidentifier()


def test_stream_equals_generate(llm):
    prompt = "class Stack:\n    def push("
    stream = llm.stream(prompt, GREEDY)
    pieces = list(stream)
    assert len(pieces) > 1 and "".join(pieces) == text(llm.generate(prompt, GREEDY)[0])
    assert stream.output.finished and stream.output.outputs[0].text == "".join(pieces)


def test_async_streams_run_side_by_side(llm):
    prompts = ["def add(", "class A", "import "]

    async def read(prompt):
        return "".join([piece async for piece in llm.stream(prompt, GREEDY)])

    async def both():
        return await asyncio.gather(*map(read, prompts))

    assert asyncio.run(both()) == [text(output) for output in llm.generate(prompts, GREEDY)]


def test_a_stream_left_early_frees_its_place(llm):
    stream = llm.stream("def f(", SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    while llm.engine.busy:
        llm.engine.step()
    assert llm.engine.pages.free == llm.engine.pages.num_pages - 1
    assert stream.output.outputs[0].finish_reason == "abort"


def test_stop_strings_and_tokens(llm):
    free = llm.generate("def f(x):", GREEDY)[0].outputs[0]
    stop = free.text[5:8]
    cut = llm.generate("def f(x):", SamplingParams(temperature=0.0, max_tokens=24, stop=stop))[0].outputs[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop" and cut.stop_reason == stop
    token = free.token_ids[3]
    params = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[token])
    cut = llm.generate("def f(x):", params)[0].outputs[0]
    assert cut.stop_reason == token and list(cut.token_ids) == list(free.token_ids[: len(cut.token_ids)])
    assert cut.token_ids[-1] == token and token not in cut.token_ids[:-1]


def test_chat_uses_the_template_once(llm):
    messages = [{"role": "user", "content": "hello"}]
    prompt = llm.chat_prompt(messages)
    bos = llm.tokenizer.bos_token_id
    assert "hello" in prompt["prompt"] and prompt["prompt_token_ids"][:2].count(bos) <= 1
    one = llm.chat(messages, GREEDY)[0]
    several = llm.chat([messages, messages], GREEDY)
    assert text(one) == text(several[0]) == text(several[1])
    started = [*messages, {"role": "assistant", "content": "def start"}]
    assert llm.chat_prompt(started, continue_final_message=True, add_generation_prompt=False)[
        "prompt"
    ].endswith("def start")
    assert llm.chat(started, GREEDY, continue_final_message=True)[0].outputs[0].text


def test_n_samples_logprobs_and_metrics(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=8, logprobs=3, prompt_logprobs=0)
    output = llm.generate("def ", params)[0]
    assert [c.index for c in output.outputs] == [0, 1, 2]
    for c in output.outputs:
        assert len(c.logprobs) == len(c.token_ids)
        total = sum(entry[t].logprob for t, entry in zip(c.token_ids, c.logprobs))
        assert c.cumulative_logprob == pytest.approx(total)
    metrics = output.metrics
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


BAD = {
    "empty": ("", SamplingParams(), "empty"),
    "too long": ([1] * 300, SamplingParams(), "300 tokens"),
    "outside": ([1, 10**6], SamplingParams(), "outside the vocabulary"),
    "negative": ([-1], SamplingParams(), "outside the vocabulary"),
    "not ids": ([1, "a"], SamplingParams(), "list of token ids"),
    "bias": ([1], SamplingParams(logit_bias={10**6: 1.0}), "vocabulary has"),
    "keys": ({"text": "a"}, SamplingParams(), "prompt_token_ids"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_request_is_refused_alone(llm, name):
    prompt, params, reason = BAD[name]
    if isinstance(prompt, list) and not all(isinstance(t, int) for t in prompt):
        good, bad, after = llm.generate(["def ", prompt, "def "], [GREEDY, params, GREEDY])
    else:
        with pytest.raises(ValueError, match=reason):
            llm.generate(prompt, params)
        good, bad, after = llm.generate(["def ", prompt, "def "], [GREEDY, params, GREEDY])
    assert reason in bad.error and bad.finished and not bad.outputs
    assert text(good) == text(after) and good.error is None
    assert llm.engine.pages.free == llm.engine.pages.num_pages - 1


def test_mistakes_in_the_call(llm):
    with pytest.raises(ValueError, match="2 prompts came with 3 SamplingParams"):
        llm.generate(["a", "b"], [GREEDY] * 3)
    with pytest.raises(ValueError, match="stream writes one text, but n=2"):
        llm.stream("a", SamplingParams(n=2))
    with pytest.raises(ValueError, match="max_model_len=4096 exceeds the 2048 positions"):
        LLM("demo", max_model_len=4096)
    with pytest.raises(ValueError, match="dtype 'float8' is not known"):
        LLM("demo", dtype="float8")
    with pytest.raises(ValueError, match="max_num_seqs=0 must be"):
        LLM("demo", max_num_seqs=0)
    with pytest.raises(TypeError):
        LLM("demo", speed="fast")


def test_an_interrupt_leaves_the_engine_usable(llm):
    expected = text(llm.generate("def f(", GREEDY)[0])
    long = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        for _ in range(200):
            llm.generate(["a"] * 40, long)
    assert not llm.engine.scheduler.busy
    assert text(llm.generate("def f(", GREEDY)[0]) == expected


def test_two_models_in_one_process_and_close(llm):
    other = LLM("demo-draft", max_num_seqs=1, max_num_batched_tokens=64, max_model_len=128, progress=False)
    assert "demo-draft" in repr(other) and "llama" in repr(other)
    assert text(other.generate("import ", GREEDY)[0])
    other.close()
    assert "closed" in repr(other)
    with pytest.raises(ValueError, match="is closed"):
        other.generate("a")
    assert text(llm.generate("import ", GREEDY)[0])


def test_a_saved_model_opens_again(llm, tmp_path):
    """Orbax: weights, config and tokenizer travel together."""
    llm.save(tmp_path / "saved")
    sizes = dict(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256, progress=False)
    with LLM(tmp_path / "saved", **sizes) as again:
        assert text(again.generate("class A", GREEDY)[0]) == text(llm.generate("class A", GREEDY)[0])
        assert again.chat_prompt([{"role": "user", "content": "hi"}]) == llm.chat_prompt(
            [{"role": "user", "content": "hi"}]
        )
    with pytest.raises(ValueError, match="exists"):
        llm.save(tmp_path / "saved")


def test_threads_share_one_engine(llm):
    prompts = ["def a(", "def b(", "def c("]
    expected = [text(output) for output in llm.generate(prompts, GREEDY)]
    results: dict[int, str] = {}

    def work(index):
        time.sleep(0.01 * index)
        results[index] = text(llm.generate(prompts[index], GREEDY, use_tqdm=False)[0])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(3)] == expected
