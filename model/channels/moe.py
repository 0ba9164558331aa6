"""Dropless mixtures of gated experts (Shazeer et al. 2017, arXiv 1701.06538; MegaBlocks, arXiv 2211.15841).

Every token reaches its top-k experts, whatever the others choose: rows are sorted by expert and multiplied
group by group. So a token's output does not depend on its neighbours, and there is no capacity to set.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from ...attention.batch import Batch
from ..config import MoEConfig
from ..grouped_matmul import grouped_matmul
from ..layers import ACTIVATIONS, Linear, Numerics, matrix
from ..quantised import QuantisedWeight


def route(logits: jax.Array, top_k: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """Router logits [T,X] -> weights f32[T,k] and experts i32[T,k], heaviest first.

    Softmax over all experts in float32, then top-k, then (`normalise`) divided by the sum of the k kept.
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), -1), top_k)
    if normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights, experts


class MoE(nnx.Module):
    """x [T,E] -> [T,E]; no memory between tokens. gate and up are [X,I,E], down is [X,E,I]."""

    def __init__(self, config: MoEConfig, hidden: int, *, numerics: Numerics, rngs: nnx.Rngs):
        if not 1 <= config.top_k <= config.experts:
            raise ValueError(
                f"a token cannot use {config.top_k} of {config.experts} experts; choose top_k from 1 to experts"
            )
        self.config, self.platform = config, numerics.platform
        X, size = config.experts, config.intermediate
        plain = replace(numerics, weights=None)  # rounding would change who is chosen
        self.router = Linear(hidden, X, (None, "embed"), numerics=plain, rngs=rngs)
        wide, narrow = ("experts", "mlp", "embed"), ("experts", "embed", "mlp")
        self.gate = matrix(rngs, (X, size, hidden), wide, numerics, hidden**-0.5)
        self.up = matrix(rngs, (X, size, hidden), wide, numerics, hidden**-0.5)
        self.down = matrix(rngs, (X, hidden, size), narrow, numerics, size**-0.5)

    def _grouped(self, rows: jax.Array, weight: nnx.Param | QuantisedWeight, sizes: jax.Array) -> jax.Array:
        """Rows sorted by expert [N,in] through their experts' matrices -> [N,out]."""
        if isinstance(weight, QuantisedWeight):
            return grouped_matmul(rows, weight.parts(), sizes, self.platform, weight.config)
        return grouped_matmul(rows, weight[...], sizes, self.platform)

    def __call__(self, x: jax.Array, batch: Batch) -> jax.Array:
        c, T = self.config, x.shape[0]
        with jax.named_scope("router"):
            weights, experts = route(self.router(x), c.top_k, c.normalise)
            # Padding tokens choose expert X, which does not exist: their rows sort last and cost nothing.
            chosen = jnp.where(batch.valid[:, None], experts, c.experts).reshape(-1)
            order = jnp.argsort(chosen, stable=True)
            sizes = (chosen[:, None] == jnp.arange(c.experts, dtype=jnp.int32)).sum(0, dtype=jnp.int32)
        with jax.named_scope("experts"):
            rows = x[order // c.top_k]
            gate, up = self._grouped(rows, self.gate, sizes), self._grouped(rows, self.up, sizes)
            h = ACTIVATIONS[c.activation](gate) * up
            y = self._grouped(h, self.down, sizes)
        with jax.named_scope("combine"):
            y = y[jnp.argsort(order)].reshape(T, c.top_k, -1)
            return (y * weights[..., None].astype(y.dtype)).sum(1)
