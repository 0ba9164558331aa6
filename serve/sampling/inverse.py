"""The inverse of a cumulative sum, in two levels: first the block of entries, then the entry in it.

One pass over the row sums the blocks; the cumulative sums are over V / 128 blocks and 128 entries only. Entries
that weigh nothing are never candidates, on either level, whatever rounding does to the sums.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128


def draw(z: jax.Array, u: jax.Array, fallback: jax.Array) -> jax.Array:
    """i32[N]: tokens from softmax(z [N,V]) at u f32[N] in [0, 1); a token of probability zero is never drawn.

    Rows in which nothing has a positive weight (logits that are not numbers) give `fallback` i32[N].
    """
    token, usable = inverse(jnp.exp(z - z.max(-1, keepdims=True)), u)
    return jnp.where(usable, token, fallback)


def inverse(weights: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(i32[N], bool[N]): in each row of weights [N,V] the first entry of positive weight at which the cumulative
    sum is beyond share f32[N] of the total (the last one where rounding leaves none), and whether there is one.
    """
    N, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(N, -1, BLOCK)
    sums = blocks.sum(-1)
    ends = jnp.cumsum(sums, axis=-1)
    goal = share * ends[:, -1]
    block = first_beyond(ends, sums, goal)[:, None]
    start = pick(ends, block) - pick(sums, block)
    inner = jnp.take_along_axis(blocks, block[:, :, None], 1)[:, 0]
    entry = first_beyond(jnp.cumsum(inner, axis=-1), inner, goal - start)[:, None]
    return (block * BLOCK + entry)[:, 0], pick(inner, entry) > 0


def first_beyond(ends: jax.Array, weights: jax.Array, goal: jax.Array) -> jax.Array:
    """i32[N]: the first entry with positive weight whose cumulative sum `ends` [N,M] is beyond goal [N], else
    the last with positive weight, else 0."""
    M = weights.shape[1]
    ids = jnp.arange(M, dtype=jnp.int32)
    positive = weights > 0
    first = jnp.where(positive & (ends > goal[:, None]), ids, M).min(-1)
    last = jnp.where(positive, ids, 0).max(-1)
    return jnp.minimum(first, last)


def pick(x: jax.Array, at: jax.Array) -> jax.Array:
    """[N] from x [N,M] and at i32[N,1]."""
    return jnp.take_along_axis(x, at, 1)[:, 0]
