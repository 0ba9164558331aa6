"""Every family against transformers: recorded outputs always, live draws where torch is there (`-m parity`)."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from tokenloom.model.families import common, find, supported
from tokenloom.tests import families

RECORDED = Path(__file__).parent / "data" / "families"


@pytest.mark.parametrize("model_type", supported())
def test_recorded_outputs(model_type):
    """Chunked prefill and decode give the logits that transformers gave (whole sequences: the live test)."""
    folder = RECORDED / model_type
    families.compare(folder, families.recorded_reference(folder), whole=False)


def test_a_wrong_weight_is_noticed(tmp_path):
    """The control of the recorded test: one norm weight off by 2 % fails it."""
    folder = RECORDED / "llama"
    config = families.tested_config(families.load_config(folder)[1])
    params = families.load(folder, config)
    reference = families.recorded_reference(folder)
    params["final_norm"]["weight"] = params["final_norm"]["weight"].at[0].multiply(1.02)
    got = families.whole_logits(config, params, reference.tokens)
    assert abs(got - reference.logits).max() > 2 * reference.limit


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", supported())
def test_drawn_configs(model_type, seed):
    """A drawn config, live; draw 0 also shows that one changed fact of the config is noticed."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    families.check_drawn(model_type, seed)


@pytest.mark.parametrize("model_type", supported())
def test_weights_name_exactly_the_parameters(model_type):
    """For many drawn configs: `weights` has one entry for each parameter of the decoder."""
    family, seen = find(model_type), set()
    for seed in range(6):
        config = family.config({"model_type": model_type, **families.drawn(model_type, seed)})
        specs = jax.tree_util.tree_flatten_with_path(families.abstract(config)[1])[0]
        paths = {".".join(str(key.key) for key in path) for path, _ in specs}
        assert family.weights(config).keys() == paths
        seen.add(config)
    assert len(seen) > 1


@pytest.mark.parametrize("name", ["nope", "common", "../llama", "", None, 3, "__init__", "llama.config"])
def test_unknown_model_types_are_refused(name):
    with pytest.raises(ValueError, match=r"is not supported; supported: .*gemma2.*llama"):
        find(name)


BASE = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    "old, new",
    [
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ({"rope_theta": 5.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}},
        ),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "su", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "partial_rotary_factor": 0.5}},
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": None}},
            {
                "rope_parameters": {
                    "sliding_attention": {},
                    "full_attention": {"rope_type": "yarn", "factor": 2.0},
                }
            },
        ),
    ],
)
def test_both_generations_of_rope_keys_mean_the_same(old, new):
    kind = {"layer_type": "full_attention"}
    assert common.rope({**BASE, **old}, 8, **kind) == common.rope({**BASE, **new}, 8, **kind)


GEMMA = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 12,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def test_gemma3_ropes_and_windows_by_layer():
    """Five local layers, then a global one; only the global ones are scaled."""
    blocks = find("gemma3_text").config({**GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e4}).blocks
    assert [block.mixer.window for block in blocks] == ([4096] * 5 + [None]) * 2
    assert {(block.mixer.rope.theta, block.mixer.rope.scaling) for block in blocks[:5]} == {(1e4, None)}
    assert (blocks[5].mixer.rope.theta, blocks[5].mixer.rope.scaling) == (1e6, "linear")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": None}, "hidden_size = None, but a whole number is needed"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads = 3"),
        ({"hidden_act": "tanhshrink"}, "'tanhshrink' is not known; known: silu"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small', but a number is needed"),
        ({"eos_token_id": ["</s>"]}, "a token id is a whole number"),
    ],
)
def test_wrong_facts_are_refused_by_name(change, message):
    raw = BASE | {"vocab_size": 9, "intermediate_size": 8, "num_hidden_layers": 1}
    find("llama").config(raw)
    with pytest.raises(ValueError, match=message):
        find("llama").config(raw | change)


def test_bidirectional_gemma_is_refused():
    with pytest.raises(ValueError, match="use_bidirectional_attention = True, which is not supported"):
        find("gemma3_text").config({**GEMMA, "use_bidirectional_attention": True})


def test_layer_types_must_fit():
    raw = BASE | {"vocab_size": 9, "intermediate_size": 8, "num_hidden_layers": 2, "use_sliding_window": True}
    with pytest.raises(ValueError, match=r"must name one of .* for each of 2 layers"):
        find("qwen2").config(raw | {"layer_types": ["chunked_attention", "full_attention"]})


def test_token_ids_in_every_form():
    assert common.token_ids(None) == ()
    assert common.token_ids(7) == (7,)
    assert common.token_ids([7, 8]) == (7, 8)
