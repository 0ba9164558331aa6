"""Unified Layer Skipping (Liu et al. 2024, arXiv 2404.06954): generated tokens run through evenly spaced layers.

The prompt runs through all of them. Which layers stay follows from the speed-up alone, so every token costs the same.
The authors fine-tune the model for its set of layers; without that, text degrades quickly.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..decoder import Decoder
from ..depth import ReservedLayers
from .calibration import with_depth
from .transform import Calibration


@dataclass(frozen=True)
class UnifiedLayerSkipping:
    """speedup s: floor(layers / s) layers run for generated tokens (1: all of them, and the model stays as it is)."""

    speedup: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.speedup, bool) or not isinstance(self.speedup, int) or self.speedup < 1:
            raise ValueError(f"speedup={self.speedup!r} must be a whole number of at least 1")

    @property
    def calibrated(self) -> bool:
        return False

    def __call__(self, model: Decoder, calibration: Calibration | None = None) -> Decoder:
        del calibration
        if self.speedup == 1:
            return model
        return with_depth(model, ReservedLayers(reserved(model.config.num_layers, self.speedup)))


def reserved(layers: int, speedup: int) -> tuple[int, ...]:
    """The layers that stay, as the authors' code picks them: the first, the last, and multiples of an interval from
    below until there are floor(layers / speedup), which leaves the top sparser than the rest."""
    count = layers // speedup
    if count < 3:
        raise ValueError(
            f"speedup={speedup} leaves {count} of {layers} layers, and at least 3 must stay; choose a speedup of at "
            f"most {layers // 3}"
        )
    interval = layers // (count - 1)
    chosen = {0, layers - 1}
    for layer in range(1, layers - 1):
        if layer % interval == 0 and len(chosen) < count:
            chosen.add(layer)
    return tuple(sorted(chosen))
