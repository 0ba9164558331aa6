"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama with a sliding window in every layer."""

from __future__ import annotations

from ..config import AttentionConfig, BlockConfig, ModelConfig, NormConfig
from . import common
from .common import Weights

IGNORED: tuple[str, ...] = ()


def config(raw: dict) -> ModelConfig:
    layers = common.need(raw, "num_hidden_layers")
    query, kv, dim = common.heads(raw)
    norm = NormConfig("rms", common.number(raw, "rms_norm_eps", 1e-6))
    channel = common.mlp(raw, common.activation(raw))
    rope = common.rope(raw, dim, max_position=131072)
    attention = AttentionConfig(query, kv, dim, dim**-0.5, rope, window=common.window(raw))
    return common.decoder(raw, (BlockConfig(attention, channel, norm),) * layers, norm, max_position=131072)


def weights(config: ModelConfig) -> Weights:
    return common.llama_weights(config)
