"""Int8: weights of 8 bits with a scale an output channel, and by default inputs of 8 bits with a scale a row.

Dynamic quantisation of each token's inputs: ZeroQuant (arXiv 2206.01861), LLM.int8() (arXiv 2208.07339) without its
part for outliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import QuantConfig
from .quantisation import Quantisation


@dataclass(frozen=True)
class Int8(Quantisation):
    """activations: "int8" rounds the inputs of every product to 8 bits as well, which is what makes several rows
    and prompts fast; None leaves them, and only memory and single rows gain."""

    activations: Literal["int8"] | None = "int8"

    def stored(self) -> QuantConfig:
        return QuantConfig("int8", activations=self.activations)
