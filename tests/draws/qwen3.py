"""Qwen3: head norms, a head_dim of its own, biases by request."""

from __future__ import annotations

import random

from .common import sizes


def draw(rng: random.Random) -> dict:
    raw = sizes(rng) | {"attention_bias": rng.random() < 0.5, "rope_theta": rng.choice([100.0, 1e6])}
    if rng.random() < 0.5:
        raw |= {"use_sliding_window": True, "sliding_window": rng.choice([5, 8]), "max_window_layers": 1}
    return raw


def control(raw: dict) -> None:
    raw["rms_norm_eps"] += 0.1
