"""OLMo 2: norms after each half, queries and keys normalised whole."""

from __future__ import annotations

import random

from .common import sizes


def draw(rng: random.Random) -> dict:
    raw = sizes(rng)
    raw["hidden_size"] = raw["num_attention_heads"] * raw.pop("head_dim")
    return raw | {"attention_bias": rng.random() < 0.5, "rope_theta": rng.choice([100.0, 500000.0])}


def control(raw: dict) -> None:
    raw["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, **raw["rope_parameters"]}
    raw["rope_parameters"]["rope_type"] = "linear"
