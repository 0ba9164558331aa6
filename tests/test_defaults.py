"""Requests that say nothing of sampling: the checkpoint's generation_config.json speaks for them."""

import json

import pytest
from tokenloom import LLM, SamplingParams
from tokenloom.serve.openai import CHAT, COMPLETIONS, parse
from tokenloom.serve.sampling.defaults import asked, default_sampling_params
from tokenloom.tests import tiny


def test_the_file_is_read_as_vllm_reads_it(tmp_path):
    def said(**values):
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        return default_sampling_params(tmp_path)

    assert default_sampling_params(None) == default_sampling_params(tmp_path) == SamplingParams()
    sampled = said(
        temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05, do_sample=True, eos_token_id=2
    )
    assert sampled == SamplingParams(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05)
    assert said(max_new_tokens=7, min_p=0.1) == SamplingParams(max_tokens=7, min_p=0.1)
    greedy = said(do_sample=False, temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    assert greedy == SamplingParams(temperature=0.0, repetition_penalty=1.1)
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p=1\.5 "):
        said(top_p=1.5)


def test_a_request_may_say_otherwise():
    defaults = SamplingParams(temperature=0.6, top_p=0.9, top_k=20)
    assert asked(defaults, {"top_p": 0.5}) == SamplingParams(temperature=0.6, top_p=0.5, top_k=20)
    mirostat = asked(defaults, {"mirostat_mode": 2})
    assert mirostat == SamplingParams(temperature=0.6, mirostat_mode=2)


def test_requests_without_parameters_take_them(tmp_path):
    folder = tiny.save(tmp_path / "model")
    said = {"do_sample": False, "repetition_penalty": 1.3, "max_new_tokens": 5}
    (folder / "generation_config.json").write_text(json.dumps(said))
    wanted = SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=5)
    with LLM(folder, progress=False, **tiny.SIZES) as llm:
        assert llm.get_default_sampling_params() == wanted
        (silent,), (told,) = llm.generate(["def f("]), llm.generate(["def f("], wanted)
        assert silent.outputs[0].token_ids == told.outputs[0].token_ids
        assert "".join(llm.stream("def f(")) == silent.outputs[0].text
        completion = parse(COMPLETIONS, {"prompt": "def f(", "repetition_penalty": 1.0}, llm, ["tiny"])
        assert completion.params == SamplingParams(temperature=0.0, max_tokens=16)
        chat = parse(CHAT, {"messages": [{"role": "user", "content": "f"}], "temperature": 1}, llm, ["tiny"])
        assert chat.params == SamplingParams(temperature=1.0, repetition_penalty=1.3, max_tokens=None)
