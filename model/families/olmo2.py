"""OLMo 2 (arXiv 2501.00656): norms after each half, queries and keys normalised over the whole projection."""

from __future__ import annotations

from ..config import AttentionConfig, BlockConfig, ModelConfig, NormConfig
from . import common
from .common import Weights

IGNORED: tuple[str, ...] = ()


def config(raw: dict) -> ModelConfig:
    query, kv, dim = common.heads(raw)
    norm = NormConfig("rms", common.number(raw, "rms_norm_eps", 1e-5))
    bias = bool(raw.get("attention_bias", False))
    attention = AttentionConfig(
        query, kv, dim, dim**-0.5, common.rope(raw, dim),
        qkv_bias=bias, out_bias=bias, qk_norm=norm, qk_norm_over="all",
    )  # fmt: skip
    block = BlockConfig(attention, common.mlp(raw, common.activation(raw)), norm, "post")
    return common.decoder(raw, (block,) * common.need(raw, "num_hidden_layers"), norm)


def weights(config: ModelConfig) -> Weights:
    return common.llama_weights(config, norms=("post_attention_layernorm", "post_feedforward_layernorm"))
