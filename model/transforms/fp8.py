"""Fp8: weights in float8 (e4m3: 4 bits of exponent, 3 of mantissa; arXiv 2209.05433), a scale an output channel."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import QuantConfig
from .quantisation import Quantisation


@dataclass(frozen=True)
class Fp8(Quantisation):
    """Inputs stay as they are; the largest weight of a channel becomes 448, the format's largest number."""

    def stored(self) -> QuantConfig:
        return QuantConfig("fp8")
