"""Layouts that other writers use: each stored spelling of the same weights gives the same parameters."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenloom.model.checkpoint import abstract, flatten, load, unflatten
from tokenloom.model.families import find
from tokenloom.model.families.common import Either, Source

ATTENTION = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXTRAL = ATTENTION | {
    "model_type": "mixtral", "intermediate_size": 6, "num_key_value_heads": 1, "num_local_experts": 3,
    "num_experts_per_tok": 2,
}  # fmt: skip
QWEN = ATTENTION | {
    "model_type": "qwen3_moe", "intermediate_size": 10, "moe_intermediate_size": 6, "num_experts": 3,
    "num_experts_per_tok": 2, "mlp_only_layers": [1],
}  # fmt: skip
NEOX = ATTENTION | {"model_type": "gpt_neox", "intermediate_size": 10}
OPT = ATTENTION | {
    "model_type": "opt",
    "ffn_dim": 10,
    "max_position_embeddings": 16,
    "word_embed_proj_dim": 6,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}


def split_experts(params: dict, room: str, names: tuple[str, str, str]) -> dict[str, np.ndarray]:
    """One tensor an expert, one of three names each."""
    stored = {}
    for layer, channel in experts(params):
        for ours, theirs in zip(("gate", "up", "down"), names):
            for expert, weight in enumerate(np.asarray(channel[ours])):
                stored[f"model.layers.{layer}.{room}.experts.{expert}.{theirs}.weight"] = weight
    return stored


def fused_experts(params: dict, room: str) -> dict[str, np.ndarray]:
    """gate and up stacked, one above the other; all experts in one tensor."""
    stored = {}
    for layer, channel in experts(params):
        prefix = f"model.layers.{layer}.{room}.experts"
        stored[f"{prefix}.gate_up_proj"] = np.concatenate([channel["gate"], channel["up"]], axis=1)
        stored[f"{prefix}.down_proj"] = np.asarray(channel["down"])
    return stored


def experts(params: dict):
    blocks = params["blocks"].items()
    return [(index, block["channel"]) for index, block in blocks if "router" in block["channel"]]


def routers(params: dict, room: str) -> dict[str, np.ndarray]:
    return {
        f"model.layers.{layer}.{room}.gate.weight": np.asarray(channel["router"]["weight"])
        for layer, channel in experts(params)
    }


def plain(raw: dict, params: dict, option: int) -> dict[str, np.ndarray]:
    """Every parameter that is one whole stored tensor, under option number `option` of its names."""
    config, leaves, stored = find(raw["model_type"]).config(raw), flatten(params), {}
    for path, entry in find(raw["model_type"]).weights(config).items():
        options = entry.options if isinstance(entry, Either) else (entry,)
        chosen = options[min(option, len(options) - 1)]
        if isinstance(chosen, Source) and chosen.part is None and ".channel.router" not in path:
            stored[chosen.name] = np.asarray(leaves[path])
    return stored


def agree(tmp_path, raw: dict, params: dict, stored: dict[str, np.ndarray]) -> None:
    """What is loaded from `stored` is `params`, to the bit."""
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file({name: np.ascontiguousarray(a) for name, a in stored.items()}, tmp_path / "model.safetensors")
    got, wanted = flatten(load(tmp_path, find(raw["model_type"]).config(raw))), flatten(params)
    assert got.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def made(raw: dict) -> dict:
    """Random parameters, no two alike."""
    rng = np.random.default_rng(0)
    specs = flatten(abstract(find(raw["model_type"]).config(raw))[1])
    return unflatten({path: rng.standard_normal(spec.shape).astype("f4") for path, spec in specs.items()})


@pytest.mark.parametrize("room", ["block_sparse_moe", "mlp"])
@pytest.mark.parametrize("fused", [False, True])
def test_mixtral(tmp_path, room, fused):
    params = made(MIXTRAL)
    stored = {n: a for n, a in plain(MIXTRAL, params, 0).items() if ".experts." not in n}
    names = ("w1", "w3", "w2")
    stored |= fused_experts(params, room) if fused else split_experts(params, room, names)
    agree(tmp_path, MIXTRAL, params, stored | routers(params, room))


@pytest.mark.parametrize("fused", [False, True])
def test_qwen3_moe(tmp_path, fused):
    params = made(QWEN)
    stored = {n: a for n, a in plain(QWEN, params, 0).items() if ".experts." not in n}
    names = ("gate_proj", "up_proj", "down_proj")
    stored |= fused_experts(params, "mlp") if fused else split_experts(params, "mlp", names)
    agree(tmp_path, QWEN, params, stored | routers(params, "mlp"))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2(tmp_path, prefix):
    params = made(GPT2)
    stored = plain(GPT2, params, 0 if prefix else 1)
    for index, block in params["blocks"].items():
        room = f"{prefix}h.{index}"
        for kind in ("weight", "bias"):
            fused = np.concatenate([block["mixer"][name][kind] for name in "qkv"])
            stored[f"{room}.attn.c_attn.{kind}"] = fused.T
            stored[f"{room}.attn.c_proj.{kind}"] = np.asarray(block["mixer"]["o"][kind]).T
            stored[f"{room}.mlp.c_fc.{kind}"] = np.asarray(block["channel"]["up"][kind]).T
            stored[f"{room}.mlp.c_proj.{kind}"] = np.asarray(block["channel"]["down"][kind]).T
        stored[f"{room}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))  # a mask, not a weight
    agree(tmp_path, GPT2, params, stored)


@pytest.mark.parametrize("option", [0, 1])
def test_opt(tmp_path, option):
    """With the prefix of today's files, and with that of the first ones."""
    params = made(OPT)
    stored = plain(OPT, params, option)
    assert ("decoder.embed_tokens.weight" in stored) == (option == 1)
    agree(tmp_path, OPT, params, stored)


@pytest.mark.parametrize("option", [0, 1])
def test_gpt_neox(tmp_path, option):
    """The output head under both names; the fused projection goes head by head."""
    params = made(NEOX)
    stored = plain(NEOX, params, option)
    assert ("lm_head.weight" in stored) == (option == 1)
    for index, block in params["blocks"].items():
        for kind in ("weight", "bias"):
            parts = [np.asarray(block["mixer"][name][kind]) for name in "qkv"]
            heads = [part[head * 4 : head * 4 + 4] for head in range(2) for part in parts]
            stored[f"gpt_neox.layers.{index}.attention.query_key_value.{kind}"] = np.concatenate(heads)
    agree(tmp_path, NEOX, params, stored)


@pytest.mark.parametrize(
    ("raw", "change", "message"),
    [
        (GPT2, {"add_cross_attention": True}, "add_cross_attention = True.*not supported"),
        (GPT2, {"n_head": 3}, "n_embd = 8 is not a multiple of n_head = 3"),
        (MIXTRAL, {"num_local_experts": None}, "num_local_experts = None.*whole number"),
        (QWEN, {"hidden_act": "swoosh"}, "'swoosh' is not known"),
        ({"model_type": "mamba2", "num_heads": 3, "head_dim": 4, "hidden_size": 8}, {}, "= 16, but.* = 12"),
    ],
)
def test_configs_that_cannot_be(raw, change, message):
    with pytest.raises(ValueError, match=message):
        find(raw["model_type"]).config(raw | change)
