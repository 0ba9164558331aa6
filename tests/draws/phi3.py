"""Phi-3: fused projections, partial rotation, LongRoPE on either side of the original length, windows."""

from __future__ import annotations

import random

from .common import sizes


def draw(rng: random.Random) -> dict:
    raw = sizes(rng)
    dim = 8
    raw["hidden_size"] = raw["num_attention_heads"] * dim
    del raw["head_dim"]
    share = rng.choice([0.5, 0.75, 1.0])
    raw |= {"partial_rotary_factor": share, "sliding_window": rng.choice([None, 7]), "pad_token_id": 0}
    if rng.random() < 0.7:
        count = int(dim * share) // 2
        raw |= {"original_max_position_embeddings": rng.choice([16, 32]), "max_position_embeddings": 128}
        factors = {
            f"{name}_factor": [round(rng.uniform(1, 6), 2) for _ in range(count)]
            for name in ("short", "long")
        }
        raw["rope_scaling"] = {"type": "longrope", **factors}
    return raw


def control(raw: dict) -> None:
    raw["hidden_act"] = "gelu"
