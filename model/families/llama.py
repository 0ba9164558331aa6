"""Llama (Touvron et al. 2023, arXiv 2302.13971): RMSNorm before, rotary positions, gated SiLU."""

from __future__ import annotations

from ..config import AttentionConfig, BlockConfig, ModelConfig, NormConfig
from . import common
from .common import Weights

IGNORED: tuple[str, ...] = ()


def config(raw: dict) -> ModelConfig:
    query, kv, dim = common.heads(raw)
    bias = bool(raw.get("attention_bias", False))
    attention = AttentionConfig(
        query, kv, dim, dim**-0.5, common.rope(raw, dim), qkv_bias=bias, out_bias=bias
    )
    norm = NormConfig("rms", common.number(raw, "rms_norm_eps", 1e-6))
    channel = common.mlp(raw, common.activation(raw), bias=bool(raw.get("mlp_bias", False)))
    block = BlockConfig(attention, channel, norm)
    return common.decoder(raw, (block,) * common.need(raw, "num_hidden_layers"), norm, tie=False)


def weights(config: ModelConfig) -> Weights:
    return common.llama_weights(config)
