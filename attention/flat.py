"""Attention over tokens that lie side by side, each told apart by its row and position, in plain JAX.

Nothing is in pages: queries, keys and values are shards of a batch's prompt part, in any order. Blocks of queries meet
blocks of keys with an online softmax in float32; pairs of blocks in which nobody can see anybody are left out, which
is what makes the work of causal shards equal (`attention.spread`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .ops import NEG_INF, AttentionSpec

QUERIES, KEYS = 128, 256


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "positions", "lengths"], meta_fields=[])
@dataclass(frozen=True)
class Marks:
    """Where N tokens belong: rows i32[N], positions i32[N] in their rows (-1: padding, which sees and shows nothing),
    and the lengths i32[N] of their rows."""

    rows: jax.Array
    positions: jax.Array
    lengths: jax.Array

    def blocks(self, size: int) -> Marks:
        """[N] -> [blocks, size]; what is missing at the end is padding."""
        pad = -self.rows.shape[0] % size

        def cut(x: jax.Array) -> jax.Array:
            return jnp.pad(x, (0, pad), constant_values=-1).reshape(-1, size)

        return jax.tree.map(cut, self)


def meets(queries: Marks, keys: Marks, spec: AttentionSpec) -> jax.Array:
    """bool[blocks of queries, blocks of keys]: False where no query can see any key. Blocks [n, size] of both."""
    first, last = spec.visible(queries.positions, queries.lengths)
    large = jnp.int32(jnp.iinfo(jnp.int32).max)

    def bounds(values: jax.Array, marks: Marks) -> tuple[jax.Array, jax.Array]:
        live = marks.positions >= 0
        return jnp.where(live, values, large).min(1), jnp.where(live, values, -1).max(1)

    (q_low, q_high), (k_low, k_high) = bounds(queries.rows, queries), bounds(keys.rows, keys)
    sees_from, sees_to = bounds(first, queries)[0], bounds(last, queries)[1]
    shows_from, shows_to = bounds(keys.positions, keys)
    share = (q_low[:, None] <= k_high[None]) & (k_low[None] <= q_high[:, None])
    one_row = (q_low == q_high)[:, None] & (k_low == k_high)[None]
    apart = (shows_from[None] > sees_to[:, None]) | (shows_to[None] < sees_from[:, None])
    return share & ~(one_row & apart)


def flat(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Marks, keys: Marks, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    """q [N,Hq,D] over k and v [S,Hkv,D] -> (out f32[N,Hq,D], lse f32[N,Hq]), to be merged.

    A query sees the keys of its row within `spec.visible`; one that sees none has out = 0, lse = -inf.
    """
    N, heads, dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    step, width = min(QUERIES, -(-N // 2)), min(KEYS, -(-k.shape[0] // 2))
    query_marks, key_marks = queries.blocks(step), keys.blocks(width)
    pairs = meets(query_marks, key_marks, spec)

    def cut(x: jax.Array, size: int) -> jax.Array:
        return jnp.pad(x, ((0, -x.shape[0] % size), (0, 0), (0, 0))).reshape(-1, size, *x.shape[1:])

    k_blocks, v_blocks = cut(k, width), cut(v, width)

    def one(block):
        q, marks, met = block
        packed = (
            q.reshape(step, kv_heads, group, dim).transpose(1, 0, 2, 3).reshape(kv_heads, step * group, dim)
        )
        first, last = spec.visible(marks.positions, marks.lengths)

        def meet(index, carry):
            out, top, total = carry
            here = jax.tree.map(lambda x: x[index], key_marks)
            scores = jnp.einsum(
                "hnd,shd->hns", packed, k_blocks[index].astype(q.dtype), preferred_element_type=jnp.float32
            )
            scores = spec.capped(scores * spec.scale)
            seen = (
                (marks.rows[:, None] == here.rows) & (marks.positions[:, None] >= 0) & (here.positions >= 0)
            )
            seen &= (here.positions >= first[:, None]) & (here.positions <= last[:, None])
            seen = jnp.repeat(seen, group, 0)
            new_top = jnp.maximum(top, jnp.where(seen, scores, NEG_INF).max(-1))
            shrink = jnp.exp(top - new_top)
            weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
            part = jnp.einsum(
                "hns,shd->hnd", weights.astype(q.dtype), v_blocks[index].astype(q.dtype),
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            return out * shrink[..., None] + part, new_top, total * shrink + weights.sum(-1)

        zeros = jnp.zeros(packed.shape[:2], jnp.float32)
        out, top, total = lax.fori_loop(
            0, len(k_blocks),
            lambda index, carry: lax.cond(met[index], meet, lambda _, carry: carry, index, carry),
            (jnp.zeros(packed.shape, jnp.float32), zeros + NEG_INF, zeros),
        )  # fmt: skip
        lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)
        out = out / jnp.maximum(total, 1e-30)[..., None]
        out = out.reshape(kv_heads, step, group, dim).transpose(1, 0, 2, 3).reshape(step, heads, dim)
        return out, lse.reshape(kv_heads, step, group).transpose(1, 0, 2).reshape(step, heads)

    out, lse = lax.map(one, (cut(q, step), query_marks, pairs))
    return out.reshape(-1, heads, dim)[:N], lse.reshape(-1, heads)[:N]
