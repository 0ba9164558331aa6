"""Dropless mixtures of experts."""

from __future__ import annotations

from flax import nnx

from ..config import MoEConfig
from ..layers import Numerics


class MoE(nnx.Module):
    def __init__(self, config: MoEConfig, hidden: int, *, numerics: Numerics, rngs: nnx.Rngs):
        raise NotImplementedError
