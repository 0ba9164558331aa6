"""Qwen3 with experts: which layers are sparse, renormalised weights, windows, biases, both keys for the count."""

from __future__ import annotations

import random

from .common import sizes


def draw(rng: random.Random) -> dict:
    raw = sizes(rng) | {
        rng.choice(["num_experts", "num_local_experts"]): rng.choice([4, 7]),
        "num_experts_per_tok": rng.choice([1, 2, 4]),
        "moe_intermediate_size": rng.choice([12, 20]),
        "norm_topk_prob": rng.random() < 0.5,
        "decoder_sparse_step": rng.choice([1, 1, 2]),
        "mlp_only_layers": rng.choice([[], None, [0]]),
        "use_sliding_window": rng.random() < 0.3,
        "sliding_window": 6,
        "attention_bias": rng.random() < 0.3,
        "rope_theta": rng.choice([100.0, 1e6]),
    }
    # torch's grouped product wants rows of 16 bytes.
    return raw | {"num_hidden_layers": 3, "hidden_size": raw["num_attention_heads"] * 8}


def control(raw: dict) -> None:
    raw["norm_topk_prob"] = not raw["norm_topk_prob"]
