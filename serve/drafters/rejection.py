"""Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1; Chen et al. 2023, arXiv 2302.01318).

A drawn token x is accepted with probability min(1, p(x) / q(x)); where it is not, the token is drawn from
max(p - q, 0), normalised. What is emitted has the target's distribution p, whatever q is. p and q are both taken behind
penalties, masks, temperature and truncation, in float32, and q is what was sampled from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..sampling.inverse import inverse, pick
from ..sampling.keys import Purpose
from ..sampling.sampler import Sampler, SamplerState
from .draft import Accepted, Draft, Rows
from .matching import children, descend, holding, of_slot

# (seated, positions i32[B], p and q f32[B,V], the slots below bool[B,N]) -> (the slots bool[B,N] of which the first is
# accepted, what is left of p f32[B,V], not normalised, where none is)
Judge = Callable[[SamplerState, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def reject(
    judge: Judge,
    sampler: Sampler,
    seated: SamplerState,
    draft: Draft,
    logits: jax.Array,
    rows: Rows,
    depth: int,
) -> tuple[Accepted, SamplerState]:
    """Walk down a tree drawn from `Draft.probs`: accept what `judge` does, or draw from what it leaves."""
    assert draft.probs is not None
    probs = draft.probs

    def advance(seated: SamplerState, raw: jax.Array, at: jax.Array, alive: jax.Array):
        positions, seats, below = seated.length[rows.seats], rows.seats, children(draft, at)
        z = sampler.process(seated, raw, seats, positions, alive)
        p, q = sampler.probabilities(seated, z, seats), of_slot(probs, at)
        taken, rest = judge(seated, positions, p, q, below)
        accepted = taken.any(1)
        other, _ = inverse(rest, sampler.uniforms(seated, seats, positions, Purpose.SAMPLE))
        token = jnp.where(accepted, of_slot(draft.token, taken), other)
        one, seated = sampler.settle(seated, raw, z, token, seats, positions, alive)
        return one, holding(draft, below, token) & accepted[:, None], seated

    return descend(advance, sampler, seated, logits, rows, depth)


@dataclass(frozen=True)
class RejectionSampling:
    """The verifier for chains whose tokens were drawn from `Draft.probs`."""

    def accept(
        self, sampler: Sampler, seated: SamplerState, draft: Draft, logits: jax.Array, rows: Rows, depth: int
    ) -> tuple[Accepted, SamplerState]:
        def judge(seated: SamplerState, positions: jax.Array, p: jax.Array, q: jax.Array, below: jax.Array):
            drafted, token = below.any(1), of_slot(draft.token, below)
            u = sampler.uniforms(seated, rows.seats, positions, Purpose.ACCEPT)
            accepted = drafted & (u * pick(q, token[:, None]) < pick(p, token[:, None]))
            rest = jnp.where(drafted[:, None], jnp.maximum(p - q, 0.0), p)
            rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)
            return below & accepted[:, None], rest

        return reject(judge, sampler, seated, draft, logits, rows, depth)
