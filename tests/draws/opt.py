"""OPT: norms before and after, with and without a last one, parameters in them, projected embeddings, biases."""

from __future__ import annotations

import random


def draw(rng: random.Random) -> dict:
    heads = rng.choice([2, 3, 4])
    hidden = heads * rng.choice([8, 10])
    return {
        "vocab_size": rng.choice([53, 64, 96]),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": rng.choice([2, 3]),
        "ffn_dim": rng.choice([40, 56]),
        "max_position_embeddings": rng.choice([24, 64]),
        "do_layer_norm_before": rng.random() < 0.6,
        "_remove_final_layer_norm": rng.random() < 0.3,
        "word_embed_proj_dim": rng.choice([hidden, None, 14]),
        "activation_function": rng.choice(["relu", "relu", "gelu"]),
        "enable_bias": rng.random() < 0.7,
        "layer_norm_elementwise_affine": rng.random() < 0.7,
        "tie_word_embeddings": rng.random() < 0.7,
    }


def control(raw: dict) -> None:
    raw["activation_function"] = "relu" if raw["activation_function"] == "gelu" else "gelu"
