"""The flat prompt part on GPU: FlashAttention-2's order (Dao 2023, arXiv 2307.08691) over paged keys.

A program owns an aligned block of the chunk's tokens for one KV head, the query heads of that head packed into rows of
its products. It walks the rows (requests) that overlap the block, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .spec import AttentionSpec, PagedView
from .tiles import TritonTiles, power_of_two
from .triton_softmax import (
    Keys,
    Product,
    Span,
    load,
    load_pieces,
    over,
    pieces,
    rest,
    store_pieces,
    total,
)


@dataclass(frozen=True)
class PromptKernel:
    """Grid (blocks of `tiles.queries` tokens, KV heads); the blocks at the chunk's end, which see most, go first."""

    spec: AttentionSpec
    tiles: TritonTiles
    product: Product

    def __call__(self, q: Any, starts: Any, view: PagedView, ends: Any, out: Any, lse: Any) -> None:
        """Refs: q [C,Hq,D], starts i32[R+1], pages, ends i32[R] or None; out [C,Hq,D] in q's dtype, lse
        f32[C,Hq]."""
        C, heads, rows = q.shape[0], q.shape[1], view.lengths.shape[0]
        group = heads // view.kv_heads
        block, head = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
        begin = block * self.tiles.queries
        end = jnp.minimum(begin + self.tiles.queries, C)
        packed = jnp.arange(self.tiles.rows(group), dtype=jnp.int32)
        token, head_of = begin + over(packed, group), head * group + rest(packed, group)
        live = token < end
        owned = (token >= starts[0]) & (token < starts[rows])
        nothing = tuple(jnp.zeros((packed.size, size), jnp.float32) for _, size in pieces(q.shape[-1]))
        store_pieces(out, (token[:, None], head_of[:, None]), (live & ~owned)[:, None], nothing)
        plgpu.store(lse.at[token, head_of], jnp.full_like(nothing[0][:, 0], -jnp.inf), mask=live & ~owned)
        queries = load_pieces(q, (token[:, None], head_of[:, None]), live[:, None])

        def row(index: jax.Array, carry: None) -> None:
            low, high = jnp.maximum(begin, starts[index]), jnp.minimum(end, starts[index + 1])
            shift = (view.lengths if ends is None else ends)[index] - starts[index + 1]
            keys = Keys(view, self.spec, self.tiles.keys, self.product, index, head)
            outs, lses = self.row(queries, keys, token + shift, low + shift, high + shift)
            mine = (token >= low) & (token < high)
            store_pieces(out, (token[:, None], head_of[:, None]), mine[:, None], outs)
            plgpu.store(lse.at[token, head_of], lses, mask=mine)
            return carry

        index = jnp.arange(power_of_two(rows), dtype=jnp.int32)
        first = total((index < rows) & (load(starts, (index + 1,), index < rows) <= begin))
        stop = total((index < rows) & (load(starts, (index,), index < rows) < end))
        lax.fori_loop(first, stop, row, None)

    def row(
        self, queries: Any, keys: Keys, positions: jax.Array, low: jax.Array, high: jax.Array
    ) -> tuple[Any, jax.Array]:
        """A block's queries against one row, of which positions low..high are theirs: out in pieces, lse.

        Others' tokens run along, and what comes out for them means nothing.
        """
        length, visible = keys.view.lengths[keys.row], partial(keys.view.share.visible, self.spec)
        sees_from, sees_to = visible(positions, length)
        (first, clear_to), (clear_from, last) = visible(low, length), visible(high - 1, length)
        last = jnp.where(high > low, last, -1)
        span = Span.of(first, last + 1, clear_from, clear_to + 1, self.tiles.keys)

        def seen(at: jax.Array) -> jax.Array:
            return (at >= sees_from[:, None]) & (at <= jnp.broadcast_to(sees_to, positions.shape)[:, None])

        return keys.attend(queries, span, seen)
