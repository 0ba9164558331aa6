"""Sample matching: the target samples each token as it would without a draft, and accepts a draft that is equal.

Any drafter, any processor, greedy or sampled: the emitted tokens are those of plain decoding with the same random
numbers. A draft that was not drawn at random is accepted as often as by any exact rule; for one that was, rejection
sampling (`rejection`) accepts more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..sampling.sampler import Sampled, Sampler, SamplerState
from .draft import Accepted, Draft, Rows


class Walk(NamedTuple):
    """Where the rows stand: node i32[B], alive bool[B], how far they came, what was emitted and by which slots."""

    step: jax.Array
    node: jax.Array
    alive: jax.Array
    seated: SamplerState
    sampled: Sampled
    count: jax.Array
    path: jax.Array


# (seated, logits of the node [B,V], node, alive) -> (Sampled of one token, the child that it leads to or -1, seated)
Advance = Callable[[SamplerState, jax.Array, jax.Array, jax.Array], tuple[Sampled, jax.Array, SamplerState]]


def descend(
    advance: Advance, sampler: Sampler, seated: SamplerState, logits: jax.Array, rows: Rows, depth: int
) -> tuple[Accepted, SamplerState]:
    """Emit tokens from the root down, logits f32[B,N,V], until every row left its tree: `depth` + 1 at most."""
    B, T, carried = len(rows.seats), depth + 1, sampler.carry(seated, rows.seats)
    K = min(sampler.max_logprobs, sampler.vocab_size)
    nothing = Sampled(
        jnp.zeros((B, T), jnp.int32), jnp.zeros((B, T, 2 + 2 * K), jnp.int32),
        jnp.zeros((B, T, carried.shape[1]), jnp.float32),
    )  # fmt: skip
    zeros = jnp.zeros((B,), jnp.int32)
    start = Walk(jnp.int32(0), zeros, rows.live, seated, nothing, zeros, jnp.zeros((B, T), jnp.int32))

    def go_on(walk: Walk) -> jax.Array:
        return walk.alive.any() & (walk.step < T)

    def step(walk: Walk) -> Walk:
        at, z = walk.step, jnp.take_along_axis(logits, walk.node[:, None, None], 1)[:, 0]
        one, child, seated = advance(walk.seated, z, walk.node, walk.alive)
        so_far = walk.sampled
        emitted = Sampled(
            so_far.token.at[:, at].set(one.token), so_far.detail.at[:, at].set(one.detail),
            so_far.carry.at[:, at].set(one.carry),
        )  # fmt: skip
        path = walk.path.at[:, at].set(jnp.where(walk.alive, walk.node, 0))
        node, alive = jnp.where(walk.alive, child, walk.node), walk.alive & (child >= 0)
        return Walk(at + 1, node, alive, seated, emitted, walk.count + walk.alive, path)

    end = lax.while_loop(go_on, step, start)
    return Accepted(replace(end.sampled, count=end.count), end.path), end.seated


def child_with(draft: Draft, node: jax.Array, token: jax.Array) -> jax.Array:
    """i32[B]: the first valid child of node i32[B] that holds token i32[B]; -1 where there is none."""
    match = (draft.parent == node[:, None]) & (draft.token == token[:, None]) & draft.valid
    return jnp.where(match.any(1), jnp.argmax(match, 1).astype(jnp.int32), -1)


@dataclass(frozen=True)
class SampleMatching:
    """The verifier for drafts of any law."""

    def accept(
        self, sampler: Sampler, seated: SamplerState, draft: Draft, logits: jax.Array, rows: Rows, depth: int
    ) -> tuple[Accepted, SamplerState]:
        def advance(seated, z, node, alive):
            one, seated = sampler.sample(seated, z, rows.seats, seated.length[rows.seats], alive)
            return one, child_with(draft, node, one.token), seated

        return descend(advance, sampler, seated, logits, rows, depth)
