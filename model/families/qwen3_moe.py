"""Qwen3 with experts (arXiv 2505.09388): Qwen3's attention; most layers have many small experts."""

from __future__ import annotations

from ..config import AttentionConfig, BlockConfig, MLPConfig, ModelConfig, MoEConfig, NormConfig
from . import common
from .common import Weights
from .mixtral import expert_weights

IGNORED: tuple[str, ...] = ()


def config(raw: dict) -> ModelConfig:
    query, kv, dim = common.heads(raw)
    norm = NormConfig("rms", common.number(raw, "rms_norm_eps", 1e-6))
    bias = bool(raw.get("attention_bias", False))
    rope = common.rope(raw, dim, max_position=32768)
    window = common.window(raw, 4096) if raw.get("use_sliding_window") else None
    attention = AttentionConfig(
        query, kv, dim, dim**-0.5, rope, window, qkv_bias=bias, out_bias=bias, qk_norm=norm
    )

    def block(index: int) -> BlockConfig:
        return BlockConfig(attention, sparse if _is_sparse(raw, index) else common.mlp(raw, act), norm)

    act = common.activation(raw)
    sparse = _experts(raw, act)
    blocks = tuple(block(index) for index in range(common.need(raw, "num_hidden_layers")))
    return common.decoder(raw, blocks, norm, tie=False, max_position=32768)


def _experts(raw: dict, act: str) -> MoEConfig | MLPConfig:
    """The channel mixer of sparse layers; without experts there are none, and it is the dense one."""
    count = common.need(raw, "num_local_experts" if "num_local_experts" in raw else "num_experts")
    if count == 0:
        return common.mlp(raw, act)
    return MoEConfig(
        experts=count,
        top_k=common.need(raw, "num_experts_per_tok"),
        intermediate=common.need(raw, "moe_intermediate_size"),
        activation=act,
        normalise=bool(raw.get("norm_topk_prob", False)),
    )


def _is_sparse(raw: dict, index: int) -> bool:
    """Every `decoder_sparse_step`-th layer has experts, except those that `mlp_only_layers` names."""
    step = common.need({"decoder_sparse_step": 1, **raw}, "decoder_sparse_step")
    return index not in (raw.get("mlp_only_layers") or ()) and (index + 1) % step == 0


def weights(config: ModelConfig) -> Weights:
    names = ("gate_proj", "up_proj", "down_proj")
    return common.llama_weights(config) | expert_weights(config, ("mlp",), names)
