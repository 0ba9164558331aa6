"""Gemma 3 with a vision tower (one tiny layer, never run): the text part is drawn as gemma3_text."""

from __future__ import annotations

import random

from . import gemma3_text


def draw(rng: random.Random) -> dict:
    text = gemma3_text.draw(rng)
    text["tie_word_embeddings"] = True
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    return {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}


def control(raw: dict) -> None:
    raw["text_config"]["query_pre_attn_scalar"] *= 4
