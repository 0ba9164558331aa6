"""Gemma 3, text only (arXiv 2503.19786): five local layers to a global one, each kind with its own rope."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import AttentionConfig, BlockConfig, ModelConfig, NormConfig
from . import common
from .common import Weights

IGNORED: tuple[str, ...] = ()

DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
"""Published files leave out what equals these."""


def config(raw: dict) -> ModelConfig:
    raw = {**DEFAULTS, **raw}
    common.refuse(raw, "use_bidirectional_attention", "a decoder attends causally only")
    query, kv, dim = common.heads(raw)
    norm = NormConfig("rms", common.number(raw, "rms_norm_eps", 1e-6), offset=1.0)
    channel = common.mlp(raw, common.activation(raw, "hidden_activation", "gelu_pytorch_tanh"))
    scale = common.number(raw, "query_pre_attn_scalar", 256) ** -0.5
    cap = common.optional(raw, "attn_logit_softcapping", None)
    bias = bool(raw.get("attention_bias", False))
    ropes = {
        True: _local_rope(raw, dim),
        False: common.rope(raw, dim, layer_type="full_attention", theta=1e6),
    }
    windows = {True: common.window(raw), False: None}

    def block(sliding: bool) -> BlockConfig:
        attention = AttentionConfig(
            query, kv, dim, scale, ropes[sliding], windows[sliding], cap,
            qkv_bias=bias, out_bias=bias, qk_norm=norm,
        )  # fmt: skip
        return BlockConfig(attention, channel, norm, "sandwich")

    pattern = common.need(raw, "sliding_window_pattern")
    return common.decoder(
        raw,
        tuple(
            block(sliding) for sliding in common.sliding_layers(raw, lambda index: (index + 1) % pattern != 0)
        ),
        norm,
        tie=True,
        embed_scale=common.need(raw, "hidden_size") ** 0.5,
        logit_softcap=common.optional(raw, "final_logit_softcapping", None),
    )


def _local_rope(raw: dict, dim: int):
    """Sliding layers have their own theta and no scaling, unless `rope_parameters` gives them one."""
    nested = raw.get("rope_parameters") or {}
    theta = common.number(raw, "rope_local_base_freq", 10000.0)
    left_out = ("rope_theta", "rope_scaling", "rope_parameters")
    own = {name: value for name, value in raw.items() if name not in left_out}
    own["rope_parameters"] = nested.get("sliding_attention")
    return common.rope(own, dim, theta=theta)


def weights(config: ModelConfig, prefixes: Sequence[str] = ("model.",)) -> Weights:
    return common.llama_weights(config, prefixes=prefixes, norms=common.SANDWICH_NORMS)
