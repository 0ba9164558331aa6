"""SkipDecode (Del Corro et al. 2023, arXiv 2307.02628): the later a token, the fewer layers it runs through.

Every token at a position does the same work, and the layers left out lie in the lower middle: after `warmup` layers a
token jumps to the last ones. Depth never grows along a text, so keys and values are there wherever they are read. The
authors fine-tune for the schedule; without that, text degrades quickly.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..decoder import Decoder
from ..depth import DecayingDepth
from .calibration import with_depth
from .transform import Calibration


@dataclass(frozen=True)
class SkipDecode:
    """n_max layers run in the prompt (None: all), falling linearly to n_min at position `horizon` (None: the longest
    text of the model); both count the `warmup` layers. n_min = n_max = all: the model stays as it is."""

    n_min: int
    n_max: int | None = None
    warmup: int = 1
    horizon: int | None = None

    @property
    def calibrated(self) -> bool:
        return False

    def __call__(self, model: Decoder, calibration: Calibration | None = None) -> Decoder:
        del calibration
        layers = model.config.num_layers
        largest = layers if self.n_max is None else self.n_max
        horizon = model.config.max_position if self.horizon is None else self.horizon
        if not 0 <= self.warmup < self.n_min <= largest <= layers or horizon < 1:
            raise ValueError(
                f"{self} does not fit a model of {layers} layers: 0 <= warmup < n_min <= n_max <= {layers} must hold, "
                f"and horizon be positive"
            )
        if self.n_min == layers:
            return model
        return with_depth(model, DecayingDepth(self.warmup, largest, self.n_min, horizon))
