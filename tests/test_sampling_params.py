"""SamplingParams: every impossible value is refused at construction, by name, with the limit and the remedy."""

import math
import pickle

import numpy as np
import pytest
from tokenloom.serve.sampling.params import SamplingParams

NAN, INF = float("nan"), float("inf")

REFUSED = {
    "n": [0, -1, 1.5, True, "2", None, NAN],
    "temperature": [-0.1, INF, NAN, True, "1", None, 1e39],
    "top_p": [0, -0.1, 1.01, NAN, False, "0.9", None],
    "top_k": [-2, 1.0, True, "5", None],
    "min_p": [-0.01, 1.01, NAN, True, "0"],
    "mirostat_mode": [3, -1, 1.0, True, None],
    "mirostat_tau": [-0.1, 65, NAN, True, "3", None],
    "mirostat_eta": [-0.1, 1.01, NAN, True],
    "reflection_amplitude": [-1, 101, NAN, True, None],
    "reflection_period": [0, 1, 2.5, True, 2**23 + 1, None],
    "reflection_shift": [-0.1, 1.1, NAN],
    "reflection_token_ids": [[-1], "12", [0.5], list(range(65))],
    "thinking_end_token_ids": [[-1], list(range(9))],
    "repetition_penalty": [0, -1, INF, NAN, True, "1"],
    "presence_penalty": [-2.1, 2.1, NAN, INF, True],
    "frequency_penalty": [-2.1, 2.1, NAN, -INF, True],
    "logit_bias": [
        {1: 101}, {1: -100.5}, {1: NAN}, {1: True}, {1: "5"}, {"1": 5.0}, {-1: 5.0}, {True: 5.0}, {1.0: 5.0}, [1, 2],
        dict.fromkeys(range(321), 1.0),
    ],
    "allowed_token_ids": [[], [-1], [1.5], [True], ["1"], "12", 3],
    "bad_words": ["word", [""], [3], [None], ["a"] * 65],
    "stop": [[""], "", [3], 5, b"x", ["a"] * 17],
    "stop_token_ids": [[-1], [0.5], [False], ["7"], "7", list(range(65))],
    "max_tokens": [0, -1, 1.5, True, "16"],
    "min_tokens": [-1, 17, 1.5, True, None],
    "seed": [-1, 2**64, 1.0, True, "1"],
    "logprobs": [-1, 21, 1.0, True, "3"],
    "prompt_logprobs": [-1, 21, 1.0, True],
    "logprobs_mode": ["raw_logits", None, 1],
    "include_stop_str_in_output": [1, None, "no"],
    "ignore_eos": [0, None],
    "detokenize": [1, None],
    "skip_special_tokens": ["yes"],
    "spaces_between_special_tokens": [2],
}  # fmt: skip

ACCEPTED = {
    "n": [1, 7, np.int64(3)],
    "temperature": [0, 0.0, 1e-7, 2.5, 100, np.float32(0.5)],
    "top_p": [1, 1.0, 1e-9, 0.5],
    "top_k": [-1, 0, 1, 10**9],
    "min_p": [0, 1, 0.05],
    "mirostat_mode": [0, 1, 2],
    "mirostat_tau": [0, 3, 64.0],
    "mirostat_eta": [0, 1, np.float32(0.5)],
    "reflection_amplitude": [0, 5.0],
    "reflection_period": [2, 1200, 2**23],
    "reflection_shift": [0, 0.25, 1],
    "reflection_token_ids": [None, [], [3, 4], list(range(64))],
    "thinking_end_token_ids": [None, [], (7,)],
    "repetition_penalty": [0.01, 1, 3.0],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2.0, 2.0],
    "logit_bias": [None, {}, {0: 100, 5: -100}, dict.fromkeys(range(320), 1.0)],
    "allowed_token_ids": [None, [0], (1, 2), np.array([1, 2])],
    "bad_words": [None, [], ["a"] * 64],
    "stop": [None, "END", ["a", "b"], [], ["a"] * 16],
    "stop_token_ids": [None, [], list(range(64))],
    "max_tokens": [None, 1, 10**6],
    "min_tokens": [0, 16],
    "seed": [None, 0, 2**64 - 1],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "logprobs_mode": ["raw", "processed"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in REFUSED.items() for v in values])
def test_impossible_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ACCEPTED.items() for v in values])
def test_possible_values_are_kept(name, value):
    kept = getattr(SamplingParams(**{name: value}), name)
    if isinstance(value, str) and name == "stop":
        value = (value,)
    if isinstance(value, list | tuple | np.ndarray):
        value = tuple(value)
    assert kept == value
    assert not isinstance(kept, np.generic)


def test_messages_name_the_limit_and_the_remedy():
    with pytest.raises(ValueError, match=r"top_p=1\.5 must lie in \(0, 1\]; use 1 to keep every token"):
        SamplingParams(top_p=1.5)
    with pytest.raises(
        ValueError, match=r"min_tokens=20 is more than max_tokens=16; lower min_tokens or raise"
    ):
        SamplingParams(min_tokens=20)
    for name, value in {"top_p": 0.9, "top_k": 1, "min_p": 1.0}.items():
        with pytest.raises(ValueError, match=rf"mirostat_mode=2 stands instead of .* but {name}={value}"):
            SamplingParams(mirostat_mode=2, **{name: value})
    with pytest.raises(ValueError, match="stop_token_ids, or detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


def test_later_changes_of_the_callers_lists_do_not_matter():
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("")
    bias[1] = NAN
    assert params.stop == ("a",)
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(AttributeError):
        params.top_p = 3.0
    assert pickle.loads(pickle.dumps(params)) == params


def test_validate_for_checks_ids_against_the_vocabulary():
    for name, value in {
        "allowed_token_ids": [3, 10],
        "stop_token_ids": [10],
        "logit_bias": {10: 1.0},
    }.items():
        params = SamplingParams(**{name: value})
        params.validate_for(11)
        with pytest.raises(ValueError, match=rf"{name} has token id 10, but the vocabulary has 10 tokens"):
            params.validate_for(10)
    for name in ("stop", "bad_words"):
        with pytest.raises(ValueError, match=f"{name}.*needs a tokenizer"):
            SamplingParams(**{name: ["x"]}).validate_for(10, tokenizer=False)


def test_greedy_is_temperature_zero():
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams().greedy
    assert math.isclose(SamplingParams(temperature=0.7).temperature, 0.7)
