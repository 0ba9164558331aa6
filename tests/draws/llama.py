"""Llama: biases and every scaling of rotary positions."""

from __future__ import annotations

import random

from .common import sizes

SCALINGS: tuple[dict | None, ...] = (
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"type": "linear", "factor": 2.5},
    {"type": "dynamic", "factor": 2.0},
    None,
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16.0,
     "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
)  # fmt: skip


def draw(rng: random.Random) -> dict:
    scaling = rng.choice(SCALINGS)
    raw = sizes(rng) | {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    raw |= {"rope_theta": rng.choice([100.0, 10000.0]), "rope_scaling": scaling}
    if scaling and "dynamic" in scaling.values():
        raw["max_position_embeddings"] = 12
    return raw


def control(raw: dict) -> None:
    raw["rope_parameters"]["rope_theta"] *= 3
