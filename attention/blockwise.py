"""Attention over live pages only, in plain JAX: the CPU's fast path and the twin of the kernels.

Loops over live pages (for prompts: of each row, for each block of queries) with an online softmax (Milakov and
Gimelshein 2018, arXiv 1805.02867) in float32. Nothing is padded to the longest row: the work follows the tokens
that exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas_kernels.attention.spec import NEG_INF, AttentionSpec, Layout, PagedView, Tree
from ..pallas_kernels.attention.tiles import Case, TwinTiles
from ..pallas_kernels.attention.tuned import Tuned
from .coded import CodedView
from .pages import Queries, block_view, each_block, scales, unpack


def softmax_row(queries: Queries) -> tuple[jax.Array, jax.Array]:
    """Queries of one row against all they see, page by page: out f32[1,Hkv,N,D] and lse f32[1,Hkv,N]."""
    view, row, live = queries.view, jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
    first, last = queries.sees_from.min() // view.span, (view.lengths[0] - 1) // view.span

    def page(index, carry):
        out, top, total = carry
        scores, seen, where, v = queries.meet(row, index[None], live)
        scores = jnp.where(seen, scores, NEG_INF)
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
        total = total * shrink + weights.sum(-1)
        part = _weighted(weights, view, where, v)
        return out * shrink[..., None] + part, new_top, total

    return _finish(*lax.fori_loop(first, last + 1, page, _nothing(queries.packed)))


def softmax_rows(queries: Queries, width: int) -> tuple[jax.Array, jax.Array]:
    """Queries of B rows against all they see, `width` pages of any rows a step: out f32[B,Hkv,N,D], lse f32[B,Hkv,N].

    Each page gives a partial softmax, merged into its row's.
    """
    view, (total, find) = queries.view, queries.pages
    rows = jnp.arange(queries.packed.shape[0], dtype=jnp.int32)

    def step(index, carry):
        out, top, summed = carry
        row, page, live = find(index * width + jnp.arange(width, dtype=jnp.int32))
        scores, seen, where, v = queries.meet(row, page, live)
        scores = jnp.where(seen, scores, NEG_INF)
        owns = (row[None, :] == rows[:, None]) & live[None, :]
        tops = jnp.where(owns[:, :, None, None], scores.max(-1)[None], NEG_INF)
        new_top = jnp.maximum(top, tops.max(1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.where(seen, jnp.exp(scores - new_top[row][..., None]), 0.0)
        share = owns.astype(jnp.float32)
        summed = summed * shrink + jnp.einsum("bw,whn->bhn", share, weights.sum(-1))
        part = _weighted(weights, view, where, v)
        out = out * shrink[..., None] + jnp.einsum("bw,whnd->bhnd", share, part)
        return out, new_top, summed

    return _finish(*lax.fori_loop(0, (total + width - 1) // width, step, _nothing(queries.packed)))


def _weighted(weights: jax.Array, view: PagedView | CodedView, where: jax.Array, v: jax.Array) -> jax.Array:
    """Values v [W,Hkv,ps,D] of pages `where` summed with weights f32[W,Hkv,N,ps], f32[W,Hkv,N,D].

    Weights are rounded to what is multiplied behind the values' scales, as kernels do it."""
    if view.v_scales is not None:
        weights = weights * scales(view.v_scales, where)
    return jnp.einsum("whns,whsd->whnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _nothing(packed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state of an online softmax before its first key: weighted sum, maximum, sum of weights."""
    zeros = jnp.zeros(packed.shape[:-1], jnp.float32)
    return jnp.zeros(packed.shape, jnp.float32), zeros + NEG_INF, zeros


def _finish(out: jax.Array, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of an online softmax from its weighted sum, its maximum and its sum of weights."""
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)
    return out / jnp.maximum(total, 1e-30)[..., None], lse


@dataclass(frozen=True)
class Blockwise:
    """`query_block` prompt tokens meet one page at a time; decode takes `pages_a_step` pages of any rows. Cases near
    to one that was measured take the `tuned` tiles instead."""

    query_block: int = 128
    pages_a_step: int = 8
    lie: Layout = "transposed"
    tuned: Tuned[TwinTiles] = Tuned()

    def layout(self, head_dim: int) -> Layout:
        del head_dim
        return self.lie

    def tiles(self, case: Case) -> TwinTiles:
        return self.tuned.lookup(case) or TwinTiles(self.query_block, self.pages_a_step)

    def rows(
        self, q: jax.Array, view: PagedView, spec: AttentionSpec, tree: Tree | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The rectangular part: q [B,n,Hq,D].

        The loop runs over the live pages of all rows, `pages_a_step` at a time: a step costs about as much as the
        arithmetic of one page, so pages share it.
        """
        width = min(self.tiles(Case.of("rows", q, view)).pages, q.shape[0])
        out, lse = softmax_rows(Queries.last(q, view, spec, tree), width)
        return unpack(out, q.shape[1]).astype(q.dtype), unpack(lse, q.shape[1])

    def prompt(
        self, q: jax.Array, view: PagedView, query_starts: jax.Array, spec: AttentionSpec,
        ends: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """The prompt part: q [C,Hq,D], rows by query_starts i32[R+1]. `ends` as in `Backend.prompt`."""
        C, heads, dim = q.shape
        step = min(self.tiles(Case.of("prompt", q, view)).queries, C)
        # One block of slack, so that a row's last block may run over the end of the chunk.
        padded = jnp.pad(q, ((0, step), (0, 0), (0, 0)))

        def block(row, at, positions, carry):
            out, lse = carry
            chunk = lax.dynamic_slice_in_dim(padded, at, step)[None]
            queries = Queries.of(chunk, block_view(view, row, spec, positions), spec, positions[None])
            got, got_lse = softmax_row(queries)
            # What runs over belongs to the next row, which is written later, or to the slack.
            out = lax.dynamic_update_slice_in_dim(out, unpack(got, step)[0], at, 0)
            return out, lax.dynamic_update_slice_in_dim(lse, unpack(got_lse, step)[0], at, 0)

        start = (
            jnp.zeros((C + step, heads, dim), jnp.float32),
            jnp.full((C + step, heads), -jnp.inf, jnp.float32),
        )
        out, lse = each_block(query_starts, view.lengths if ends is None else ends, step, block, start)
        return out[:C].astype(q.dtype), lse[:C]
