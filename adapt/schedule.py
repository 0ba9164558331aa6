"""The learning rate of a run that may be cut short: warm-up, stable, decay.

Warm-up-stable-decay (Hu et al. 2024, arXiv 2404.06395; Wen et al. 2024, arXiv 2410.05192): linear from 0 to the
peak, constant, then linear to exactly 0 over the last steps. Until the decay begins nothing depends on the total,
so a run resumed from any checkpoint of the stable part may choose a new end.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class WarmupStableDecay:
    """rate(step) for steps 0..total-1; `warmup` and `decay` are counts of steps, `peak` the stable rate."""

    peak: float
    total: int
    warmup: int
    decay: int

    def __post_init__(self):
        if self.peak <= 0 or self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > self.total:
            raise ValueError(
                f"a peak of {self.peak}, {self.warmup} steps of warm-up and {self.decay} of decay do not make a "
                f"schedule of {self.total} steps; the peak must be positive and the parts fit the total"
            )

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The rate of the update after `step` updates; 0 from `total` on."""
        step = jnp.asarray(step, jnp.float32)
        rising = (step + 1) / max(self.warmup, 1)
        falling = (self.total - step) / max(self.decay, 1)
        return self.peak * jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)
