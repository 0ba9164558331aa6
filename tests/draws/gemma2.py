"""Gemma 2: soft caps small enough to bend the scores, alternating windows."""

from __future__ import annotations

import random

from .common import sizes


def draw(rng: random.Random) -> dict:
    raw = sizes(rng) | {"attention_bias": rng.random() < 0.5, "sliding_window": rng.choice([5, 8])}
    raw |= {
        "query_pre_attn_scalar": rng.choice([8, 24]),
        "attn_logit_softcapping": rng.choice([1.5, 50.0, None]),
    }
    raw |= {"final_logit_softcapping": rng.choice([3.0, 30.0, None])}
    return raw | {"hidden_activation": rng.choice(["gelu_pytorch_tanh", "gelu"])}


def control(raw: dict) -> None:
    raw["attn_logit_softcapping"] = 1.0
