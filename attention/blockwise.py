"""Attention over live pages only, in plain JAX: the CPU's fast path and the twin of the kernels.

Loops over live pages (for prompts: of each row, for each block of queries) with an online softmax (Milakov and
Gimelshein 2018, arXiv 1805.02867) in float32. Nothing is padded to the longest row: the work follows the tokens
that exist. The query heads of a KV head are packed into the rows of one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas_kernels.attention.spec import NEG_INF, AttentionSpec, Layout, PagedView, Tree
from ..pallas_kernels.attention.tiles import Case, TwinTiles
from ..pallas_kernels.attention.tuned import Tuned


def _read(view: PagedView, where: jax.Array, dim: int) -> tuple[jax.Array, jax.Array, str]:
    """Pages `where` i32[W] of heads of size `dim` in float32.

    Returns keys, values [W,Hkv,ps,D], and how keys lie in an einsum ("ds" or "sd").

    Scales are left for `_scales`: on scores and weights they cost a factor D less.
    """
    k = view.k_pages.at[where].get(mode="promise_in_bounds").astype(jnp.float32)
    if view.v_pages is None:
        return k[..., :dim], k[..., dim:], "sd"
    v = view.v_pages.at[where].get(mode="promise_in_bounds").astype(jnp.float32)
    if view.layout == "transposed":
        return k, v, "ds"
    return k[..., :dim], v[..., :dim], "sd"


def _scales(scales: jax.Array, where: jax.Array) -> jax.Array:
    """Scales of pages `where` i32[W] as f32[W,Hkv,1,ps], beside scores or weights [W,Hkv,N,ps]."""
    return scales.at[where].get(mode="promise_in_bounds")[:, :, None, :]


def _block(
    q: jax.Array, positions: jax.Array, row: jax.Array, first: jax.Array, last: jax.Array,
    view: PagedView, spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """q f32[Hkv,N,D], scaled, at positions i32[N] (-1: sees nothing) against pages first..last of one row.

    Returns out f32[Hkv,N,D] and lse f32[Hkv,N].
    """
    kv_heads, rows, dim = q.shape
    size = view.page_size
    sees_from, sees_to = spec.visible(positions, view.lengths[row])
    sees_to = jnp.where(positions < 0, -1, sees_to)

    def page(index, carry):
        out, top, total = carry
        where = view.table[row, index][None]
        k, v, lie = _read(view, where, dim)
        scores = jnp.einsum(f"hnd,h{lie}->hns", q, k[0], preferred_element_type=jnp.float32)
        if view.k_scales is not None:
            scores = scores * _scales(view.k_scales, where)[0]
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        keys = index * size + jnp.arange(size, dtype=jnp.int32)
        seen = ((keys >= sees_from[:, None]) & (keys <= sees_to[:, None]))[None]
        scores = jnp.where(seen, scores, NEG_INF)
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
        total = total * shrink + weights.sum(-1)
        if view.v_scales is not None:
            weights = weights * _scales(view.v_scales, where)[0]
        part = jnp.einsum("hns,hsd->hnd", weights, v[0], preferred_element_type=jnp.float32)
        return out * shrink[..., None] + part, new_top, total

    zeros = jnp.zeros((kv_heads, rows), jnp.float32)
    start = (jnp.zeros((kv_heads, rows, dim), jnp.float32), zeros + NEG_INF, zeros)
    return _finish(*lax.fori_loop(first, last, page, start))


def _finish(out: jax.Array, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of an online softmax from its weighted sum, its maximum and its sum of weights."""
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)
    return out / jnp.maximum(total, 1e-30)[..., None], lse


def _worklist(
    lengths: jax.Array, first: jax.Array, size: int
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]]:
    """The live pages of all rows, one row after the other: their number, and a function that finds items.

    find(item i32[W]) -> (row, page's place in the row's table, live), each [W]; items past the end are not live.
    """
    counts = (lengths + size - 1) // size - first
    ends = jnp.cumsum(counts)

    def find(item: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        live = item < ends[-1]
        row = (item[:, None] >= ends[None, :]).sum(-1, dtype=jnp.int32)
        row = jnp.minimum(row, lengths.shape[0] - 1)
        return row, jnp.where(live, first[row] + item - (ends[row] - counts[row]), 0), live

    return ends[-1], find


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
        arithmetic of one page, so pages share it. Each page gives a partial softmax, merged into its row's.
        """
        B, n, heads, dim = q.shape
        kv_heads, size = view.kv_heads, view.page_size
        group, width = heads // kv_heads, min(self.tiles(Case.of("rows", q, view)).pages, B)
        packed = (q.astype(jnp.float32) * spec.scale).reshape(B, n, kv_heads, group, dim)
        packed = packed.transpose(0, 2, 1, 3, 4).reshape(B, kv_heads, n * group, dim)
        lengths = view.lengths[:, None]
        depths = jnp.arange(n, dtype=jnp.int32)[None] if tree is None else tree.depths
        sees_from, sees_to = spec.visible(lengths - n + depths, lengths)
        if tree is not None:
            sees_to = lengths - 1
        sees_from, sees_to = (
            jnp.repeat(jnp.broadcast_to(x, (B, n)), group, axis=1) for x in (sees_from, sees_to)
        )
        total, find = _worklist(view.lengths, jnp.maximum(sees_from.min(1), 0) // size, size)

        def step(index, carry):
            out, top, summed = carry
            row, page, live = find(index * width + jnp.arange(width, dtype=jnp.int32))
            where = jnp.where(live, view.table[row, page], 0)
            k, v, lie = _read(view, where, dim)
            scores = jnp.einsum(f"whnd,wh{lie}->whns", packed[row], k, preferred_element_type=jnp.float32)
            if view.k_scales is not None:
                scores = scores * _scales(view.k_scales, where)
            if spec.softcap is not None:
                scores = spec.softcap * jnp.tanh(scores / spec.softcap)
            keys = (page[:, None] * size + jnp.arange(size, dtype=jnp.int32))[:, None, :]
            seen = (keys >= sees_from[row][..., None]) & (keys <= sees_to[row][..., None])
            if tree is not None:
                words = jnp.repeat(tree.bits, group, axis=1)[row]
                slots = keys - (lengths - n)[row][..., None]
                seen &= Tree.sees([words[..., w, None] for w in range(words.shape[-1])], slots)
            seen = (seen & live[:, None, None])[:, None]
            scores = jnp.where(seen, scores, NEG_INF)
            owns = (row[None, :] == jnp.arange(B, dtype=jnp.int32)[:, None]) & live[None, :]
            tops = jnp.where(owns[:, :, None, None], scores.max(-1)[None], NEG_INF)
            new_top = jnp.maximum(top, tops.max(1))
            shrink = jnp.exp(top - new_top)
            weights = jnp.where(seen, jnp.exp(scores - new_top[row][..., None]), 0.0)
            share = owns.astype(jnp.float32)
            summed = summed * shrink + jnp.einsum("bw,whn->bhn", share, weights.sum(-1))
            if view.v_scales is not None:
                weights = weights * _scales(view.v_scales, where)
            part = jnp.einsum("whns,whsd->whnd", weights, v, preferred_element_type=jnp.float32)
            out = out * shrink[..., None] + jnp.einsum("bw,whnd->bhnd", share, part)
            return out, new_top, summed

        zeros = jnp.zeros((B, kv_heads, n * group), jnp.float32)
        start = (jnp.zeros((*zeros.shape, dim), jnp.float32), zeros + NEG_INF, zeros)
        out, lse = _finish(*lax.fori_loop(0, (total + width - 1) // width, step, start))
        out = out.reshape(B, kv_heads, n, group, dim).transpose(0, 2, 1, 3, 4).reshape(B, n, heads, dim)
        lse = lse.reshape(B, kv_heads, n, group).transpose(0, 2, 1, 3).reshape(B, n, heads)
        return out.astype(q.dtype), lse

    def prompt(
        self, q: jax.Array, view: PagedView, query_starts: jax.Array, spec: AttentionSpec
    ) -> tuple[jax.Array, jax.Array]:
        """The prompt part: q [C,Hq,D], rows by query_starts i32[R+1]."""
        C, heads, dim = q.shape
        kv_heads, size = view.kv_heads, view.page_size
        group, step = heads // kv_heads, min(self.tiles(Case.of("prompt", q, view)).queries, C)
        R = query_starts.shape[0] - 1
        # One block of slack, so that a row's last block may run over the end of the chunk.
        padded = jnp.pad(q.astype(jnp.float32) * spec.scale, ((0, step), (0, 0), (0, 0)))
        offsets = jnp.arange(step, dtype=jnp.int32)

        def row(r, carry):
            start, stop = query_starts[r], query_starts[r + 1]
            before = view.lengths[r] - (stop - start)

            def block(b, carry):
                out, lse = carry
                at = start + b * step
                chunk = lax.dynamic_slice_in_dim(padded, at, step).reshape(step, kv_heads, group, dim)
                chunk = chunk.transpose(1, 0, 2, 3).reshape(kv_heads, step * group, dim)
                positions = jnp.where(at + offsets < stop, before + b * step + offsets, -1)
                first, _ = spec.visible(before + b * step, view.lengths[r])
                _, last = spec.visible(before + (b + 1) * step - 1, view.lengths[r])
                got, got_lse = _block(
                    chunk, jnp.repeat(positions, group), r, first // size, last // size + 1, view, spec
                )
                got = got.reshape(kv_heads, step, group, dim).transpose(1, 0, 2, 3).reshape(step, heads, dim)
                got_lse = got_lse.reshape(kv_heads, step, group).transpose(1, 0, 2).reshape(step, heads)
                # What runs over belongs to the next row, which is written later, or to the slack.
                return lax.dynamic_update_slice_in_dim(out, got, at, 0), lax.dynamic_update_slice_in_dim(
                    lse, got_lse, at, 0
                )

            return lax.fori_loop(0, (stop - start + step - 1) // step, block, carry)

        start = (
            jnp.zeros((C + step, heads, dim), jnp.float32),
            jnp.full((C + step, heads), -jnp.inf, jnp.float32),
        )
        out, lse = lax.fori_loop(0, R, row, start)
        return out[:C].astype(q.dtype), lse[:C]
