"""Mamba-2: groups, widths of the convolution, biases, bounds of the time step."""

from __future__ import annotations

import random


def draw(rng: random.Random) -> dict:
    heads, dim, hidden = rng.choice([(4, 8, 16), (6, 6, 18), (8, 4, 16), (4, 6, 24)])
    return {
        "vocab_size": rng.choice([53, 64, 96]),
        "hidden_size": hidden,
        "num_hidden_layers": rng.choice([2, 3]),
        "num_heads": heads,
        "head_dim": dim,
        "expand": heads * dim // hidden,
        "state_size": rng.choice([5, 16]),
        "n_groups": rng.choice([1, 2]),
        "conv_kernel": rng.choice([2, 4]),
        "chunk_size": rng.choice([8, 256]),
        "use_bias": rng.random() < 0.5,
        "use_conv_bias": rng.random() < 0.7,
        "layer_norm_epsilon": rng.choice([1e-5, 1e-3]),
        "time_step_limit": rng.choice([(0.0, float("inf")), (0.02, 0.3)]),
        "tie_word_embeddings": rng.random() < 0.5,
    }


def control(raw: dict) -> None:
    raw["time_step_limit"] = [0.0, 0.01]
