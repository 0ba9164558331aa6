"""GPT-NeoX: shares of rotary features in both generations of keys, both residuals, biases, scalings."""

from __future__ import annotations

import random

SCALINGS: tuple[dict | None, ...] = (
    None,
    None,
    {"type": "linear", "factor": 2.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
)


def draw(rng: random.Random) -> dict:
    heads = rng.choice([2, 3, 5])
    raw = {
        "vocab_size": rng.choice([53, 64, 96]),
        "hidden_size": heads * rng.choice([8, 16]),
        "num_attention_heads": heads,
        "num_hidden_layers": rng.choice([2, 3]),
        "intermediate_size": rng.choice([40, 56]),
        "max_position_embeddings": rng.choice([64, 256]),
        "hidden_act": rng.choice(["gelu", "gelu", "gelu_fast"]),
        "layer_norm_eps": rng.choice([1e-5, 1e-2]),
        "use_parallel_residual": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.7,
        "tie_word_embeddings": rng.random() < 0.2,
    }
    share, base, scaling = rng.choice([None, 0.5, 1.0]), rng.choice([100, 10000]), rng.choice(SCALINGS)
    if rng.random() < 0.5:
        old = {"rotary_emb_base": base, "rope_scaling": scaling}
        return raw | old | ({} if share is None else {"rotary_pct": share})
    rope = {"rope_theta": float(base), "rope_type": "default"} | (scaling or {})
    rope |= {} if share is None else {"partial_rotary_factor": share}
    return raw | {"rope_parameters": rope}


def control(raw: dict) -> None:
    raw["use_parallel_residual"] = not raw["use_parallel_residual"]
