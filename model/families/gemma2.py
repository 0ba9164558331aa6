"""Gemma 2 (arXiv 2408.00118): sandwich norms, soft caps, every other layer with a sliding window."""

from __future__ import annotations

from ..config import AttentionConfig, BlockConfig, ModelConfig, NormConfig
from . import common
from .common import Weights

IGNORED: tuple[str, ...] = ()


def config(raw: dict) -> ModelConfig:
    common.refuse(raw, "use_bidirectional_attention", "a decoder attends causally only")
    query, kv, dim = common.heads(raw, default_dim=256)
    norm = NormConfig("rms", common.number(raw, "rms_norm_eps", 1e-6), offset=1.0)
    channel = common.mlp(raw, common.activation(raw, "hidden_activation", "gelu_pytorch_tanh"))
    rope = common.rope(raw, dim, max_position=8192)
    scale = common.number(raw, "query_pre_attn_scalar", 256) ** -0.5
    window = common.window(raw, 4096)
    cap = common.optional(raw, "attn_logit_softcapping", 50.0)
    bias = bool(raw.get("attention_bias", False))

    def block(sliding: bool) -> BlockConfig:
        attention = AttentionConfig(
            query, kv, dim, scale, rope, window if sliding else None, cap, qkv_bias=bias, out_bias=bias
        )
        return BlockConfig(attention, channel, norm, "sandwich")

    return common.decoder(
        raw,
        tuple(block(sliding) for sliding in common.sliding_layers(raw, lambda index: index % 2 == 0)),
        norm,
        tie=True,
        max_position=8192,
        embed_scale=common.need(raw, "hidden_size") ** 0.5,
        logit_softcap=common.optional(raw, "final_logit_softcapping", 30.0),
    )


def weights(config: ModelConfig) -> Weights:
    return common.llama_weights(config, norms=common.SANDWICH_NORMS)
