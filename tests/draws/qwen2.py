"""Qwen2: windows in the upper layers, by number or by list; no head_dim of its own."""

from __future__ import annotations

import random

from .common import sizes


def draw(rng: random.Random) -> dict:
    raw = sizes(rng)
    raw["hidden_size"] = raw["num_attention_heads"] * raw.pop("head_dim")
    raw |= {"use_sliding_window": True, "sliding_window": rng.choice([5, 8]), "max_window_layers": 1}
    if rng.random() < 0.5:
        raw["num_hidden_layers"] = 3
        raw["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    return raw | {"rope_theta": rng.choice([100.0, 1e6]), "rope_scaling": rng.choice([None, yarn])}


def control(raw: dict) -> None:
    raw["layer_types"] = raw["layer_types"][::-1]
    if raw["layer_types"] == raw["layer_types"][::-1]:
        raw["sliding_window"] += 2
