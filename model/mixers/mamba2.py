"""Mamba-2."""

from __future__ import annotations

from flax import nnx

from ..config import Mamba2Config
from ..layers import Numerics


class Mamba2(nnx.Module):
    def __init__(self, config: Mamba2Config, hidden: int, *, numerics: Numerics, rngs: nnx.Rngs):
        raise NotImplementedError
