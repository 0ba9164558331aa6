"""Numbers that most families' draws share: tiny sizes with odd head ratios."""

from __future__ import annotations

import random


def sizes(rng: random.Random) -> dict:
    """The sizes of a Llama-like config."""
    heads, kv_heads, head_dim = rng.choice([(6, 2, 8), (3, 1, 10), (4, 4, 6), (4, 2, 8), (5, 1, 8)])
    return {
        "vocab_size": rng.choice([53, 64, 96]),
        "hidden_size": heads * rng.choice([6, 8, 10]),
        "intermediate_size": rng.choice([40, 52]),
        "num_hidden_layers": rng.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": rng.choice([64, 256]),
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.5,
    }
