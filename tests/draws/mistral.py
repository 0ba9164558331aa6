"""Mistral: windows shorter than the prompts, or none."""

from __future__ import annotations

import random

from .common import sizes


def draw(rng: random.Random) -> dict:
    return sizes(rng) | {"sliding_window": rng.choice([5, 8, None]), "rope_theta": rng.choice([100.0, 1e6])}


def control(raw: dict) -> None:
    raw["sliding_window"] = None if raw["sliding_window"] else 5
