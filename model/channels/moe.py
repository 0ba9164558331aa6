"""Dropless mixtures of gated experts (Shazeer et al. 2017, arXiv 1701.06538; MegaBlocks, arXiv 2211.15841).

Every token reaches its top-k experts, whatever the others choose: rows are sorted by expert and multiplied
group by group. So a token's output does not depend on its neighbours, and there is no capacity to set.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from ...attention.batch import Batch
from ..config import MoEConfig, QuantConfig
from ..grouped_matmul import grouped_matmul
from ..layers import ACTIVATIONS, Linear, Numerics, matrix
from ..quantised import Parts, QuantisedWeight


def route(logits: jax.Array, top_k: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """Router logits [T,X] -> weights f32[T,k] and experts i32[T,k], heaviest first.

    Softmax over all experts in float32, then top-k, then (`normalise`) divided by the sum of the k kept.
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), -1), top_k)
    if normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights, experts


def mixture(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    matrices: tuple[jax.Array | Parts, ...],
    first: jax.Array | int,
    *,
    activation: str,
    platform: str,
    stored: QuantConfig | None,
) -> jax.Array:
    """What the experts `first`, first + 1, ... say, whose gate, up and down [X',...] are given, summed by weight.

    x [T,E], weights [T,k] and experts i32[T,k], all different in a row -> [T,E]. Rows that belong to other experts (or
    to none) sort behind, where the grouped product does not count them.
    """
    T, k = experts.shape
    here = jax.tree.leaves(matrices)[0].shape[0]
    with jax.named_scope("sort"):
        local = (experts - first).reshape(-1)
        chosen = jnp.where((local >= 0) & (local < here), local, here)
        order = jnp.argsort(chosen, stable=True)
        sizes = (chosen[:, None] == jnp.arange(here, dtype=jnp.int32)).sum(0, dtype=jnp.int32)
    with jax.named_scope("experts"):
        # A token's experts differ, so of its k rows at most as many belong here as there are experts.
        rows = x[order[: T * min(k, here)] // k]
        gate, up = (grouped_matmul(rows, w, sizes, platform, stored) for w in matrices[:2])
        y = grouped_matmul(ACTIVATIONS[activation](gate) * up, matrices[2], sizes, platform, stored)
    with jax.named_scope("combine"):
        y = y.at[jnp.argsort(order)].get(mode="fill", fill_value=0).reshape(T, k, -1)
        return (y * weights[..., None].astype(y.dtype)).sum(1)


class MoE(nnx.Module):
    """x [T,E] -> [T,E]; no memory between tokens. gate and up are [X,I,E], down is [X,E,I].

    Where `numerics.experts` says so each device has some of the experts, and computes what they say.
    """

    def __init__(self, config: MoEConfig, hidden: int, *, numerics: Numerics, rngs: nnx.Rngs):
        if not 1 <= config.top_k <= config.experts:
            raise ValueError(
                f"a token cannot use {config.top_k} of {config.experts} experts; choose top_k from 1 to experts"
            )
        self.config, self.platform, self.split = config, numerics.platform, numerics.experts
        self.stored = numerics.weights
        X, size = config.experts, config.intermediate
        plain = replace(numerics, weights=None)  # rounding would change who is chosen
        self.router = Linear(hidden, X, (None, "embed"), numerics=plain, rngs=rngs)
        wide, narrow = ("experts", "expert_mlp", "embed"), ("experts", "embed", "expert_mlp")
        self.gate = matrix(rngs, (X, size, hidden), wide, numerics, hidden**-0.5)
        self.up = matrix(rngs, (X, size, hidden), wide, numerics, hidden**-0.5)
        self.down = matrix(rngs, (X, hidden, size), narrow, numerics, size**-0.5)

    def takes_apart(self, batch: Batch) -> bool:
        """Whether rows are sent to their experts from where tokens lie between mixers, and not gathered: where a token
        has fewer experts than there are devices."""
        return batch.weave is not None and self.split is not None and self.config.top_k < self.split.devices

    def __call__(self, x: jax.Array, batch: Batch) -> jax.Array:
        c = self.config
        with jax.named_scope("router"):
            weights, experts = route(self.router(x), c.top_k, c.normalise)
            # Padding tokens choose expert X, which does not exist: their rows sort last and cost nothing.
            experts = jnp.where(batch.valid[:, None], experts, c.experts)
        matrices = tuple(
            weight.parts() if isinstance(weight, QuantisedWeight) else weight[...]
            for weight in (self.gate, self.up, self.down)
        )
        mix = partial(mixture, activation=c.activation, platform=self.platform, stored=self.stored)
        if self.split is None:
            return mix(x, weights, experts, matrices, 0)
        if self.takes_apart(batch):
            return self.split.exchange(mix, x, weights, experts, matrices, self.platform)
        return self.split.run(mix, x, weights, experts, matrices, batch.spread is not None)
