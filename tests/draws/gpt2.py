"""GPT-2: every way of scaling the scores, inner sizes, tied and untied heads."""

from __future__ import annotations

import random


def draw(rng: random.Random) -> dict:
    heads = rng.choice([2, 3, 5])
    return {
        "vocab_size": rng.choice([53, 64, 96]),
        "n_embd": heads * rng.choice([8, 12]),
        "n_head": heads,
        "n_layer": rng.choice([2, 3]),
        "n_positions": rng.choice([24, 64]),
        "n_inner": rng.choice([None, 40]),
        "activation_function": rng.choice(["gelu_new", "gelu_new", "gelu", "relu"]),
        "layer_norm_epsilon": rng.choice([1e-5, 1e-2]),
        "scale_attn_weights": rng.random() < 0.7,
        "scale_attn_by_inverse_layer_idx": rng.random() < 0.5,
        "reorder_and_upcast_attn": rng.random() < 0.3,
        "tie_word_embeddings": rng.random() < 0.7,
    }


def control(raw: dict) -> None:
    raw["scale_attn_by_inverse_layer_idx"] = not raw["scale_attn_by_inverse_layer_idx"]
