"""Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1; Chen et al. 2023, arXiv 2302.01318).

A drawn token x is accepted with probability min(1, p(x) / q(x)); where it is not, the token is drawn from
max(p - q, 0), normalised. What is emitted has the target's distribution p, whatever q is. p and q are both taken behind
penalties, masks, temperature and truncation, in float32, and q is what was sampled from.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..sampling.inverse import inverse
from ..sampling.keys import Purpose
from ..sampling.sampler import Sampler, SamplerState
from .draft import Accepted, Draft, Rows
from .matching import descend


@dataclass(frozen=True)
class RejectionSampling:
    """The verifier for chains whose tokens were drawn from `Draft.probs`."""

    def accept(
        self, sampler: Sampler, seated: SamplerState, draft: Draft, logits: jax.Array, rows: Rows, depth: int
    ) -> tuple[Accepted, SamplerState]:
        assert draft.probs is not None
        last, probs = draft.token.shape[1] - 1, draft.probs

        def advance(seated: SamplerState, raw: jax.Array, node: jax.Array, alive: jax.Array):
            positions, seats = seated.length[rows.seats], rows.seats
            z = sampler.process(seated, raw, seats, positions, alive)
            p = sampler.probabilities(seated, z, seats)
            following = jnp.minimum(node + 1, last)
            drafted = (node < last) & jnp.take_along_axis(draft.valid, following[:, None], 1)[:, 0]
            token = jnp.take_along_axis(draft.token, following[:, None], 1)[:, 0]
            q = jnp.take_along_axis(probs, node[:, None, None], 1)[:, 0]

            def of(x: jax.Array) -> jax.Array:
                return jnp.take_along_axis(x, token[:, None], 1)[:, 0]

            u = sampler.uniforms(seated, seats, positions, Purpose.ACCEPT)
            accepted = drafted & (u * of(q) < of(p))
            rest = jnp.where(drafted[:, None], jnp.maximum(p - q, 0.0), p)
            rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)
            other, _ = inverse(rest, sampler.uniforms(seated, seats, positions, Purpose.SAMPLE))
            token = jnp.where(accepted, token, other)
            one, seated = sampler.settle(seated, raw, z, token, seats, positions, alive)
            return one, jnp.where(accepted, node + 1, -1), seated

        return descend(advance, sampler, seated, logits, rows, depth)
