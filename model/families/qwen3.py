"""Qwen3 (arXiv 2505.09388): Qwen2 with each head's queries and keys normalised, and biases only by request."""

from __future__ import annotations

from ..config import AttentionConfig, BlockConfig, ModelConfig, NormConfig
from . import common
from .common import Weights

IGNORED: tuple[str, ...] = ()


def config(raw: dict) -> ModelConfig:
    query, kv, dim = common.heads(raw, default_dim=128)
    norm = NormConfig("rms", common.number(raw, "rms_norm_eps", 1e-6))
    channel = common.mlp(raw, common.activation(raw))
    rope = common.rope(raw, dim, max_position=32768)
    bias = bool(raw.get("attention_bias", False))

    def block(window: int | None) -> BlockConfig:
        attention = AttentionConfig(
            query, kv, dim, dim**-0.5, rope, window, qkv_bias=bias, out_bias=bias, qk_norm=norm
        )
        return BlockConfig(attention, channel, norm)

    blocks = tuple(block(window) for window in common.upper_windows(raw))
    return common.decoder(raw, blocks, norm, max_position=32768)


def weights(config: ModelConfig) -> Weights:
    return common.llama_weights(config)
