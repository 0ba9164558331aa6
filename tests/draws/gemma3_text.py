"""Gemma 3, text only: both kinds of layers, each with its rope, in either generation of keys."""

from __future__ import annotations

import random

from .common import sizes


def draw(rng: random.Random) -> dict:
    raw = sizes(rng) | {"sliding_window": rng.choice([5, 8]), "query_pre_attn_scalar": rng.choice([8, 24])}
    raw["num_hidden_layers"] = 3
    if rng.random() < 0.5:
        raw["sliding_window_pattern"] = 2
    else:
        raw["layer_types"] = ["full_attention", "sliding_attention", "sliding_attention"]
    scaling = rng.choice([None, {"rope_type": "linear", "factor": 8.0}])
    old = {"rope_theta": 3000.0, "rope_local_base_freq": 50.0, "rope_scaling": scaling}
    new = {
        "full_attention": {"rope_theta": 3000.0, **(scaling or {"rope_type": "default"})},
        "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"},
    }
    raw |= rng.choice([old, {"rope_parameters": new}])
    return raw | {"final_logit_softcapping": rng.choice([3.0, None])}


def control(raw: dict) -> None:
    raw["rope_parameters"]["sliding_attention"]["rope_theta"] = 3000.0
