"""OPT (Zhang et al. 2022, arXiv 2205.01068): learned positions from row 2 on, LayerNorm before or after, ReLU."""

from __future__ import annotations

from dataclasses import replace

from ..config import AttentionConfig, BlockConfig, MLPConfig, ModelConfig, NormConfig
from . import common
from .common import Weights

IGNORED: tuple[str, ...] = ()

PREFIXES = ("model.decoder.", "decoder.")
OFFSET = 2  # the first two rows of the position table are for padding


def config(raw: dict) -> ModelConfig:
    query, _, dim = common.heads({**raw, "num_key_value_heads": None, "head_dim": None})
    bias, affine = bool(raw.get("enable_bias", True)), bool(raw.get("layer_norm_elementwise_affine", True))
    before = bool(raw.get("do_layer_norm_before", True))
    norm = NormConfig("layer", 1e-5, bias=affine, scale=affine)
    attention = AttentionConfig(query, query, dim, dim**-0.5, qkv_bias=bias, out_bias=bias)
    act = common.activation(raw, "activation_function", "relu")
    channel = MLPConfig(common.need(raw, "ffn_dim"), act, gated=False, bias=bias)
    block = BlockConfig(attention, channel, norm, wiring="pre" if before else "after")
    size = raw.get("word_embed_proj_dim")
    positions = common.need(raw, "max_position_embeddings")
    made = common.decoder(
        raw,
        (block,) * common.need(raw, "num_hidden_layers"),
        norm,
        tie=True,
        learned_positions=(positions + OFFSET, OFFSET),
        embed_size=None
        if size in (None, raw.get("hidden_size"))
        else common.need(raw, "word_embed_proj_dim"),
    )
    return made if before and not raw.get("_remove_final_layer_norm") else replace(made, final_norm=None)


def weights(config: ModelConfig) -> Weights:
    found: Weights = {
        "embedding.weight": common.source(PREFIXES, "embed_tokens.weight"),
        "positions.weight": common.source(PREFIXES, "embed_positions.weight"),
    }
    if not config.tie_embeddings:
        found["lm_head.weight"] = common.source(("lm_head.weight",), "")
    if config.embed_size is not None:
        for name in ("project_in", "project_out"):
            found[f"{name}.weight"] = common.source(PREFIXES, f"{name}.weight")
    if config.final_norm is not None and config.final_norm.scale:
        for kind in ("weight", "bias"):
            found[f"final_norm.{kind}"] = common.source(PREFIXES, f"final_layer_norm.{kind}")
    linear = {"channel.up": "fc1", "channel.down": "fc2", "mixer.o": "self_attn.out_proj"}
    linear |= {f"mixer.{name}": f"self_attn.{name}_proj" for name in "qkv"}
    norms = {"norms.0": "self_attn_layer_norm", "norms.1": "final_layer_norm"}
    for index, block in enumerate(config.blocks):
        parts = {**linear, **norms} if block.norm.scale else linear
        for ours, theirs in parts.items():
            biased = ours in norms or (isinstance(block.mixer, AttentionConfig) and block.mixer.qkv_bias)
            for kind in ("weight", "bias") if biased else ("weight",):
                stored = f"layers.{index}.{theirs}.{kind}"
                found[f"blocks.{index}.{ours}.{kind}"] = common.source(PREFIXES, stored)
    return found
