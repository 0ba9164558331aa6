"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before, biases, weights stored [in, out]."""

from __future__ import annotations

import numpy as np

from ..config import AttentionConfig, BlockConfig, MLPConfig, ModelConfig, NormConfig
from . import common
from .common import Weights

IGNORED: tuple[str, ...] = ()

PREFIXES = ("transformer.", "")


def config(raw: dict) -> ModelConfig:
    common.refuse(raw, "add_cross_attention", "only decoders without an encoder are")
    raw = {**raw, "hidden_size": raw.get("n_embd"), "max_position_embeddings": raw.get("n_positions")}
    hidden, heads = common.need(raw, "hidden_size"), common.need(raw, "n_head")
    positions = common.need(raw, "max_position_embeddings")
    if hidden % heads:
        raise ValueError(f"n_embd = {hidden} is not a multiple of n_head = {heads}; correct the config")
    norm = NormConfig("layer", common.number(raw, "layer_norm_epsilon", 1e-5), bias=True)
    inner = common.need(raw, "n_inner") if raw.get("n_inner") is not None else 4 * hidden
    channel = MLPConfig(
        inner, common.activation(raw, "activation_function", "gelu_new"), gated=False, bias=True
    )
    dim = hidden // heads
    scale = dim**-0.5 if raw.get("scale_attn_weights", True) else 1.0

    def block(index: int) -> BlockConfig:
        share = index + 1 if raw.get("scale_attn_by_inverse_layer_idx") else 1
        attention = AttentionConfig(heads, heads, dim, scale / share, qkv_bias=True, out_bias=True)
        return BlockConfig(attention, channel, norm)

    blocks = tuple(block(index) for index in range(common.need(raw, "n_layer")))
    return common.decoder(raw, blocks, norm, tie=True, learned_positions=(positions, 0))


def weights(config: ModelConfig) -> Weights:
    hidden = config.hidden_size

    def turned(view: np.ndarray) -> np.ndarray:
        return view.T

    def third(index: int):
        return lambda view: view[..., index * hidden : (index + 1) * hidden].T

    found: Weights = {
        "embedding.weight": common.source(PREFIXES, "wte.weight"),
        "positions.weight": common.source(PREFIXES, "wpe.weight"),
    }
    if not config.tie_embeddings:
        found["lm_head.weight"] = common.source(("lm_head.weight",), "")
    for kind in ("weight", "bias"):
        found[f"final_norm.{kind}"] = common.source(PREFIXES, f"ln_f.{kind}")
        for index in range(config.num_layers):
            ours, theirs = f"blocks.{index}", f"h.{index}"
            for place in (0, 1):
                name = f"{theirs}.ln_{place + 1}.{kind}"
                found[f"{ours}.norms.{place}.{kind}"] = common.source(PREFIXES, name)
            for place, name in enumerate("qkv"):
                stored = f"{theirs}.attn.c_attn.{kind}"
                found[f"{ours}.mixer.{name}.{kind}"] = common.source(PREFIXES, stored, third(place))
            names = {"mixer.o": "attn.c_proj", "channel.up": "mlp.c_fc", "channel.down": "mlp.c_proj"}
            for name, stored in names.items():
                found[f"{ours}.{name}.{kind}"] = common.source(PREFIXES, f"{theirs}.{stored}.{kind}", turned)
    return found
