"""The rectangular part (decode, draft trees) on GPU: LeanAttention's flat list of work, in two kernels.

Every sequence is cut into segments that depend on its own length alone; (row, segment, KV head, block of queries) are
laid on one line, and a fixed number of programs walk it with a stride, so a long sequence beside short ones keeps the
whole chip busy. Each item leaves a partial softmax; the second kernel merges a row's by their lse, in fixed order.
(LeanAttention: Sanovar et al. 2024, arXiv 2405.10480, in its form with a second kernel instead of spinning on flags.)
The list is never written down: each program finds its items in the running sum of the rows' numbers of segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .spec import NEG_INF, AttentionSpec, PagedView, Share, Tree
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

MOST_SEGMENTS = 128
MERGED_AT_ONCE = 16


@dataclass(frozen=True)
class Cut:
    """How rows of n query tokens and at most `reach` stored tokens are cut, in multiples of `keys` tokens."""

    spec: AttentionSpec
    n: int
    reach: int
    keys: int
    segment: int

    @property
    def most(self) -> int:
        """The most segments that a row has."""
        span = self.reach
        if self.spec.window is not None:
            span = min(span, self.spec.window + self.n + self.keys)
        return min(-(-span // self.segment), MOST_SEGMENTS)

    def low(self, lengths: jax.Array, share: Share) -> jax.Array:
        """The first key that a query of rows of these lengths sees, of those that lie here."""
        return share.visible(self.spec, lengths - self.n, lengths)[0]

    def of(self, lengths: jax.Array, share: Share) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(start, size, segments) i32 like lengths: segment s holds keys start + s*size.. of its row, as far as they
        lie here.

        The size doubles until MOST_SEGMENTS suffice. Where no row can have more than one segment, all have one: an
        empty row's item then writes that nothing was seen, and nothing is to be merged.
        """
        start = over(self.low(lengths, share), self.keys) * self.keys
        span = jnp.maximum(share.before(lengths) - start, 0)
        size = jnp.full_like(lengths, self.segment)
        longest = self.segment * MOST_SEGMENTS
        while longest < self.reach:
            size = jnp.where(span > longest, size * 2, size)
            longest *= 2
        segments = lax.div(span + size - 1, size)
        return start, size, jnp.ones_like(segments) if self.most == 1 else segments


@dataclass(frozen=True)
class RowsKernel:
    """Partial results of every item of the list; `programs` walk it."""

    cut: Cut
    tiles: TritonTiles
    product: Product
    programs: int

    def __call__(self, q: Any, view: PagedView, tree: Tree | None, out: Any, lse: Any) -> None:
        """Refs: q [B,n,Hq,D], pages, tree; out [items,n,Hq,D] and lse f32 [items,n,Hq], an item a row's segment."""
        B, n = q.shape[:2]
        blocks = -(-n // self.tiles.queries)
        units = view.kv_heads * blocks
        program, (rows, lengths) = pl.program_id(0), all_rows(view.lengths)
        segments = self.cut.of(lengths, view.share)[2]
        ends = jnp.cumsum(segments, dtype=jnp.int32)
        items = jnp.int32(B) if self.cut.most == 1 else total(segments)

        def work(turn: jax.Array, carry: None) -> None:
            index = program + turn * self.programs
            item, unit = over(index, units), rest(index, units)
            if self.cut.most == 1:
                row, part = item, jnp.int32(0)
            else:
                row, part = total(ends <= item), item - total(jnp.where(ends <= item, segments, 0))
            at = item, row, part, total(jnp.where(rows == row, lengths, 0))
            self.segment(q, view, tree, out, lse, at, over(unit, blocks), rest(unit, blocks))
            return carry

        left = jnp.maximum(items * units - program, 0)
        lax.fori_loop(0, over(left + self.programs - 1, self.programs), work, None)

    def segment(
        self, q: Any, view: PagedView, tree: Tree | None, out: Any, lse: Any,
        at: tuple[jax.Array, jax.Array, jax.Array, jax.Array], head: jax.Array, block: jax.Array,
    ) -> None:  # fmt: skip
        """One item, `at` (item, row, segment, length), for one KV head and one block of the row's queries."""
        item, row, part, length = at
        n, group = q.shape[1], q.shape[2] // view.kv_heads
        spec, share = self.cut.spec, view.share
        packed = jnp.arange(self.tiles.rows(group), dtype=jnp.int32)
        token, heads = block * self.tiles.queries + over(packed, group), head * group + rest(packed, group)
        live = (over(packed, group) < self.tiles.queries) & (token < n)
        depths = token
        words = []
        if tree is not None:
            depths = load(tree.depths, (row, token), live)
            words = [
                load(tree.bits, (row, token, jnp.full_like(token, word)), live)[:, None]
                for word in range(tree.bits.shape[2])
            ]
        sees_from, sees_to = share.visible(spec, length - n + depths, length)
        sees_to = jnp.broadcast_to(sees_to if tree is None else share.before(length) - 1, token.shape)

        def seen(keys: jax.Array) -> jax.Array:
            inside = (keys >= sees_from[:, None]) & (keys <= sees_to[:, None])
            return inside if tree is None else inside & Tree.sees(words, share.positions(keys) - (length - n))

        start, size, _ = self.cut.of(length, share)
        span = Span.of(
            self.cut.low(length, share), share.before(length), share.visible(spec, length - 1, length)[0],
            share.before(length - n) if tree is not None else share.visible(spec, length - n, length)[1] + 1,
            self.tiles.keys, start + part * size, start + (part + 1) * size,
        )  # fmt: skip
        queries = load_pieces(q, (row, token[:, None], heads[:, None]), live[:, None])
        keys = Keys(view, spec, self.tiles.keys, self.product, row, head)
        outs, lses = keys.attend(queries, span, seen)
        store_pieces(out, (item, token[:, None], heads[:, None]), live[:, None], outs)
        plgpu.store(lse.at[item, token, heads], lses, mask=live)


@dataclass(frozen=True)
class MergeKernel:
    """Merges a row's segments, for one query token and head a program: grid (B, n, Hq)."""

    cut: Cut

    def __call__(self, lengths: Any, share: Share, outs: Any, lses: Any, out: Any, lse: Any) -> None:
        """Refs: lengths i32[B], what lies here; partial outs f32 [items,n,Hq,D] and lses f32 [items,n,Hq]; out
        [B,n,Hq,D], lse."""
        row, token, head = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        index, all_lengths = all_rows(lengths)
        segments = self.cut.of(all_lengths, share)[2]
        begin, own = (total(jnp.where(which, segments, 0)) for which in (index < row, index == row))

        def some(step: jax.Array, carry: Any) -> Any:
            merged, top, weight = carry
            part = step * MERGED_AT_ONCE + jnp.arange(MERGED_AT_ONCE, dtype=jnp.int32)
            live = part < own
            found = jnp.where(live, load(lses, (begin + part, token, head), live), -jnp.inf)
            new_top = jnp.maximum(top, found.max())
            shrink, weights = jnp.exp(top - new_top), jnp.exp(found - new_top)
            pages = load_pieces(outs, ((begin + part)[:, None], token, head), live[:, None])
            parts = [
                (jnp.where(live, weights, 0.0)[:, None] * jnp.where(live[:, None], x, 0.0)).sum(0)
                for x in pages
            ]
            merged = tuple(a * shrink + b for a, b in zip(merged, parts))
            return merged, new_top, weight * shrink + weights.sum()

        zeros = tuple(jnp.zeros((size,), jnp.float32) for _, size in pieces(out.shape[-1]))
        carry = zeros, jnp.float32(NEG_INF), jnp.float32(0.0)
        merged, top, weight = lax.fori_loop(0, over(own + MERGED_AT_ONCE - 1, MERGED_AT_ONCE), some, carry)
        whole = jnp.where(weight > 0, weight, 1.0)
        store_pieces(out, (row, token, head), None, tuple((x / whole)[None, :] for x in merged))
        lse[row, token, head] = jnp.where(weight > 0, top + jnp.log(whole), -jnp.inf)


def all_rows(lengths: Any) -> tuple[jax.Array, jax.Array]:
    """(numbers, lengths) of all rows of ref i32[B], empty ones behind them up to a power of two."""
    index = jnp.arange(power_of_two(lengths.shape[0]), dtype=jnp.int32)
    live = index < lengths.shape[0]
    return index, jnp.where(live, load(lengths, (index,), live), 0)
