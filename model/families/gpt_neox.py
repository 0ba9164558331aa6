"""GPT-NeoX and Pythia (Black et al. 2022, arXiv 2204.06745): partial rotary positions, parallel residuals."""

from __future__ import annotations

import numpy as np

from ..config import AttentionConfig, BlockConfig, MLPConfig, ModelConfig, NormConfig
from . import common
from .common import Weights

IGNORED: tuple[str, ...] = ()

PREFIXES = ("gpt_neox.",)
HEADS = ("embed_out.weight", "lm_head.weight")


def config(raw: dict) -> ModelConfig:
    query, _, dim = common.heads({**raw, "num_key_value_heads": None, "head_dim": None})
    theta = common.number(raw, "rotary_emb_base", 10000.0)
    rope = common.rope(raw, dim, theta=theta, partial=common.number(raw, "rotary_pct", 0.25))
    bias = bool(raw.get("attention_bias", True))
    norm = NormConfig("layer", common.number(raw, "layer_norm_eps", 1e-5), bias=True)
    attention = AttentionConfig(query, query, dim, dim**-0.5, rope, qkv_bias=bias, out_bias=bias)
    act = common.activation(raw, default="gelu")
    channel = MLPConfig(common.need(raw, "intermediate_size"), act, gated=False, bias=True)
    wiring = "parallel" if raw.get("use_parallel_residual", True) else "pre"
    block = BlockConfig(attention, channel, norm, wiring=wiring)
    return common.decoder(raw, (block,) * common.need(raw, "num_hidden_layers"), norm, tie=False)


def _one_of_three(index: int, heads: int):
    """Queries, keys and values are fused head by head: stored [heads * 3 * head_dim, ...]."""

    def part(view: np.ndarray) -> np.ndarray:
        rest = view.shape[1:]
        return view.reshape(heads, 3, -1, *rest)[:, index].reshape(-1, *rest)

    return part


def weights(config: ModelConfig) -> Weights:
    found: Weights = {"embedding.weight": common.source(PREFIXES, "embed_in.weight")}
    if not config.tie_embeddings:
        found["lm_head.weight"] = common.source(HEADS, "")
    for kind in ("weight", "bias"):
        found[f"final_norm.{kind}"] = common.source(PREFIXES, f"final_layer_norm.{kind}")
    names = {
        "norms.0": "input_layernorm",
        "norms.1": "post_attention_layernorm",
        "channel.up": "mlp.dense_h_to_4h",
        "channel.down": "mlp.dense_4h_to_h",
        "mixer.o": "attention.dense",
    }
    for index, block in enumerate(config.blocks):
        ours, theirs = f"blocks.{index}", f"layers.{index}"
        assert isinstance(block.mixer, AttentionConfig)
        for kind in ("weight", "bias"):
            held = kind == "weight" or block.mixer.qkv_bias
            for name, stored in names.items():
                if held or name != "mixer.o":
                    found[f"{ours}.{name}.{kind}"] = common.source(PREFIXES, f"{theirs}.{stored}.{kind}")
            for place, name in enumerate("qkv" if held else ""):
                stored, part = (
                    f"{theirs}.attention.query_key_value.{kind}",
                    _one_of_three(place, block.mixer.heads),
                )
                found[f"{ours}.mixer.{name}.{kind}"] = common.source(PREFIXES, stored, part)
    return found
