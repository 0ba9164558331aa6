"""Phi-3 and Phi-4-mini (arXiv 2404.14219): Llama with fused projections and LongRoPE."""

from __future__ import annotations

from ..config import AttentionConfig, BlockConfig, MLPConfig, ModelConfig, NormConfig
from . import common
from .common import Weights

IGNORED: tuple[str, ...] = ()


def config(raw: dict) -> ModelConfig:
    raw = {"original_max_position_embeddings": 4096, **raw}
    query, kv, dim = common.heads(raw)
    norm = NormConfig("rms", common.number(raw, "rms_norm_eps", 1e-5))
    rope = common.rope(raw, dim, max_position=4096, renamed={"yarn": "longrope"})
    attention = AttentionConfig(query, kv, dim, dim**-0.5, rope, common.window(raw))
    block = BlockConfig(attention, common.mlp(raw, common.activation(raw)), norm)
    return common.decoder(raw, (block,) * common.need(raw, "num_hidden_layers"), norm, max_position=4096)


def weights(config: ModelConfig) -> Weights:
    found = common.llama_weights(config)
    for index, block in enumerate(config.blocks):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        assert isinstance(block.mixer, AttentionConfig) and isinstance(block.channel, MLPConfig)
        q, kv = block.mixer.heads * block.mixer.head_dim, block.mixer.kv_heads * block.mixer.head_dim
        fused = f"{theirs}.self_attn.qkv_proj.weight"
        for name, start, stop in (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv)):
            found[f"{ours}.mixer.{name}.weight"] = common.rows(fused, start, stop)
        fused, size = f"{theirs}.mlp.gate_up_proj.weight", block.channel.intermediate
        found[f"{ours}.channel.gate.weight"] = common.rows(fused, 0, size)
        found[f"{ours}.channel.up.weight"] = common.rows(fused, size, 2 * size)
    return found
