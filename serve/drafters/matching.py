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
    """Where the rows stand: at bool[B,N], the slots that hold what was accepted so far (several where lines share it;
    none where the row left its tree), how far they came, what was emitted and by which slots."""

    step: jax.Array
    at: jax.Array
    seated: SamplerState
    sampled: Sampled
    count: jax.Array
    path: jax.Array


# (seated, logits of a slot in `at` [B,V], at bool[B,N], alive bool[B]) -> (Sampled of one token, the slots bool[B,N]
# that hold it below `at`, seated)
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
    root = jnp.zeros(logits.shape[:2], bool).at[:, 0].set(rows.live)
    zeros = jnp.zeros((B,), jnp.int32)
    start = Walk(jnp.int32(0), root, seated, nothing, zeros, jnp.zeros((B, T), jnp.int32))

    def go_on(walk: Walk) -> jax.Array:
        return walk.at.any() & (walk.step < T)

    def step(walk: Walk) -> Walk:
        place, alive = walk.step, walk.at.any(1)
        one, below, seated = advance(walk.seated, of_slot(logits, walk.at), walk.at, alive)
        so_far = walk.sampled
        emitted = Sampled(
            so_far.token.at[:, place].set(one.token), so_far.detail.at[:, place].set(one.detail),
            so_far.carry.at[:, place].set(one.carry),
        )  # fmt: skip
        path = walk.path.at[:, place].set(first_slot(walk.at))
        return Walk(place + 1, below & alive[:, None], seated, emitted, walk.count + alive, path)

    end = lax.while_loop(go_on, step, start)
    return Accepted(replace(end.sampled, count=end.count), end.path), end.seated


def first_slot(at: jax.Array) -> jax.Array:
    """i32[B]: the first slot of at bool[B,N]; 0 where there is none."""
    return jnp.argmax(at, 1).astype(jnp.int32)


def of_slot(values: jax.Array, at: jax.Array) -> jax.Array:
    """[B,...] of values [B,N,...] at the first slot of at bool[B,N]: slots that share a text share what follows."""
    where = first_slot(at).reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.take_along_axis(values, where, 1)[:, 0]


def children(draft: Draft, at: jax.Array) -> jax.Array:
    """bool[B,N]: the valid slots whose parents are in at bool[B,N]."""
    return jnp.take_along_axis(at, jnp.maximum(draft.parent, 0), 1) & (draft.parent >= 0) & draft.valid


def holding(draft: Draft, slots: jax.Array, token: jax.Array) -> jax.Array:
    """bool[B,N]: those of slots bool[B,N] that hold token i32[B]."""
    return slots & (draft.token == token[:, None])


@dataclass(frozen=True)
class SampleMatching:
    """The verifier for drafts of any law."""

    def accept(
        self, sampler: Sampler, seated: SamplerState, draft: Draft, logits: jax.Array, rows: Rows, depth: int
    ) -> tuple[Accepted, SamplerState]:
        def advance(seated, z, at, alive):
            one, seated = sampler.sample(seated, z, rows.seats, seated.length[rows.seats], alive)
            return one, holding(draft, children(draft, at), one.token), seated

        return descend(advance, sampler, seated, logits, rows, depth)
