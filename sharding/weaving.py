"""Which steps of a tensor-parallel model run in TokenWeave's order (`attention/weave.py`), and how they compile."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..attention.batch import Batch, Shape
from ..attention.weave import Weave, halves

FEWEST = 1024
"""From so many tokens on a half is enough work to read the weights twice for (the rule of the authors' code)."""
OPTIONS: dict[str, dict[str, str | bool]] = {
    # Without them libtpu leaves some gathers and scatters synchronous; with them each becomes permutes between parts
    # of the product that takes or makes it.
    "tpu": {
        "xla_tpu_all_gather_collective_matmul_mode": "post_spmd",
        "xla_tpu_reduce_scatter_collective_matmul_mode": "post_spmd",
    },
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}
"""What the compiler is told for such a step, by platform."""


@dataclass(frozen=True)
class Weaving:
    """weave: where activations lie; devices: how many share the weights; tokens: how many a step must have at least."""

    weave: Weave
    devices: int
    platform: str
    tokens: int = FEWEST

    def over(self, shape: Shape) -> bool:
        """Whether a step of this shape runs in two halves: both come out even on the devices."""
        cut = shape.C // 2
        first, rest = shape.B * shape.q + cut, shape.C - cut
        return cut > 0 and self.tokens <= shape.T and first % self.devices == rest % self.devices == 0

    def split(self, batch: Batch) -> tuple[Batch, ...]:
        return halves(batch, self.weave) if self.over(batch.shape) else (batch,)

    def placed(self, x: jax.Array, part: Batch) -> jax.Array:
        return part.apart(x)

    def joined(self, xs: tuple[jax.Array, ...], shape: Shape) -> jax.Array:
        # Gathered one by one, the first half travels while the second computes.
        return jnp.concatenate([self.weave.gather(x) for x in xs]) if self.over(shape) else xs[0]

    def options(self, shape: Shape) -> dict[str, str | bool]:
        return OPTIONS.get(self.platform, {}) if self.over(shape) else {}
