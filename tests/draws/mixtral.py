"""Mixtral: few and many experts, one to all of them a token, windows."""

from __future__ import annotations

import random

from .common import sizes


def draw(rng: random.Random) -> dict:
    experts, raw = rng.choice([2, 4, 7]), sizes(rng)
    return raw | {
        "hidden_size": raw["num_attention_heads"] * 8,  # torch's grouped product wants rows of 16 bytes
        "num_local_experts": experts,
        "num_experts_per_tok": rng.choice([1, 2, min(3, experts)]),
        "intermediate_size": rng.choice([12, 20]),
        "sliding_window": rng.choice([None, 5]),
        "rope_theta": rng.choice([100.0, 1e6]),
    }


def control(raw: dict) -> None:
    raw["num_experts_per_tok"] = raw["num_local_experts"] if raw["num_experts_per_tok"] == 1 else 1
