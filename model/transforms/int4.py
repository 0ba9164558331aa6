"""Int4: weights of 4 bits, with a scale and a zero point for each group of inputs."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import QuantConfig
from .quantisation import Quantisation


@dataclass(frozen=True)
class Int4(Quantisation):
    """group_size: inputs that share a scale (2 bytes) and a zero point (1 byte); 64 makes 4.4 bits a weight. The
    token table and the head are stored in 8 bits: their errors reach the scores directly."""

    group_size: int = 64

    def stored(self) -> QuantConfig:
        return QuantConfig("int4", self.group_size)

    def stored_embeddings(self) -> QuantConfig:
        return QuantConfig("int8")
