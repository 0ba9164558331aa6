"""Attention over live pages only, in plain JAX: the CPU's fast path and the twin of the kernels.

Loops over live pages (for prompts: of each row, for each block of queries) with an online softmax (Milakov and
Gimelshein 2018, arXiv 1805.02867) in float32. Nothing is padded to the longest row: the work follows the tokens
that exist. The query heads of a KV head are packed into the rows of one product.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .ops import NEG_INF, AttentionSpec, PagedView

QUERY_BLOCK = 128
PAGES_A_STEP = 8


def _block(
    q: jax.Array, positions: jax.Array, table: jax.Array, first: jax.Array, last: jax.Array,
    view: PagedView, spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """q f32[Hkv,N,D] at positions i32[N] (-1: sees nothing) against pages first..last of one row's table.

    Returns out f32[Hkv,N,D] and lse f32[Hkv,N].
    """
    kv_heads, rows, dim = q.shape
    size = view.page_size
    q = q * spec.scale

    def page(index, carry):
        out, top, total = carry
        k = lax.dynamic_index_in_dim(view.k_pages, table[index], keepdims=False).astype(jnp.float32)
        v = lax.dynamic_index_in_dim(view.v_pages, table[index], keepdims=False).astype(jnp.float32)
        form = "hnd,hds->hns" if view.keys_transposed else "hnd,hsd->hns"
        scores = jnp.einsum(form, q, k, preferred_element_type=jnp.float32)
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        seen = _seen(index * size + jnp.arange(size, dtype=jnp.int32), positions, spec)
        scores = jnp.where(seen[None], scores, NEG_INF)
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.where(seen[None], jnp.exp(scores - new_top[..., None]), 0.0)
        out = out * shrink[..., None] + jnp.einsum(
            "hns,hsd->hnd", weights, v, preferred_element_type=jnp.float32
        )
        return out, new_top, total * shrink + weights.sum(-1)

    zeros = jnp.zeros((kv_heads, rows), jnp.float32)
    start = (jnp.zeros((kv_heads, rows, dim), jnp.float32), zeros + NEG_INF, zeros)
    out, top, total = lax.fori_loop(first, last, page, start)
    return _finish(out, top, total)


def _seen(keys: jax.Array, queries: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Which of the keys at positions i32[...,S] each query at positions i32[...,N] sees: bool[...,N,S]."""
    keys, queries = keys[..., None, :], queries[..., :, None]
    seen = keys <= queries
    return seen if spec.window is None else seen & (keys > queries - spec.window)


def _finish(out: jax.Array, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of an online softmax from its weighted sum, its maximum and its sum of weights."""
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)
    return out / jnp.maximum(total, 1e-30)[..., None], lse


def _first_page(position: jax.Array, size: int, spec: AttentionSpec) -> jax.Array:
    """The first page that a query at `position` or later can see."""
    if spec.window is None:
        return jnp.zeros_like(position)
    return jnp.maximum(position - spec.window + 1, 0) // size


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


def rows(q: jax.Array, view: PagedView, *, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """The rectangular part: q [B,q,Hq,D]; see `attention.ops`.

    The loop runs over the live pages of all rows, `PAGES_A_STEP` at a time: a step costs about as much as the
    arithmetic of one page, so pages share it. Each page gives a partial softmax, merged into its row's.
    """
    B, n, heads, dim = q.shape
    kv_heads, size = view.kv_heads, view.page_size
    group, width = heads // kv_heads, min(PAGES_A_STEP, B)
    packed = (q.astype(jnp.float32) * spec.scale).reshape(B, n, kv_heads, group, dim)
    packed = packed.transpose(0, 2, 1, 3, 4).reshape(B, kv_heads, n * group, dim)
    offsets = jnp.repeat(jnp.arange(n, dtype=jnp.int32), group)
    lengths = view.lengths[:, None]
    positions = jnp.where(lengths > 0, lengths - n + offsets[None, :], -1)
    first = _first_page(jnp.maximum(view.lengths - n, 0), size, spec)
    total, find = _worklist(view.lengths, first, size)
    form = "whnd,whds->whns" if view.keys_transposed else "whnd,whsd->whns"

    def step(index, carry):
        out, top, summed = carry
        row, page, live = find(index * width + jnp.arange(width, dtype=jnp.int32))
        where = jnp.where(live, view.table[row, page], 0)
        k = view.k_pages.at[where].get(mode="promise_in_bounds").astype(jnp.float32)
        v = view.v_pages.at[where].get(mode="promise_in_bounds").astype(jnp.float32)
        scores = jnp.einsum(form, packed[row], k, preferred_element_type=jnp.float32)
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        seen = _seen(page[:, None] * size + jnp.arange(size, dtype=jnp.int32), positions[row], spec)
        seen = (seen & live[:, None, None])[:, None]
        scores = jnp.where(seen, scores, NEG_INF)
        owns = (row[None, :] == jnp.arange(B, dtype=jnp.int32)[:, None]) & live[None, :]
        tops = jnp.where(owns[:, :, None, None], scores.max(-1)[None], NEG_INF)
        new_top = jnp.maximum(top, tops.max(1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.where(seen, jnp.exp(scores - new_top[row][..., None]), 0.0)
        part = jnp.einsum("whns,whsd->whnd", weights, v, preferred_element_type=jnp.float32)
        share = owns.astype(jnp.float32)
        out = out * shrink[..., None] + jnp.einsum("bw,whnd->bhnd", share, part)
        return out, new_top, summed * shrink + jnp.einsum("bw,whn->bhn", share, weights.sum(-1))

    zeros = jnp.zeros((B, kv_heads, n * group), jnp.float32)
    start = (jnp.zeros((*zeros.shape, dim), jnp.float32), zeros + NEG_INF, zeros)
    out, top, summed = lax.fori_loop(0, (total + width - 1) // width, step, start)
    out, lse = _finish(out, top, summed)
    out = out.reshape(B, kv_heads, n, group, dim).transpose(0, 2, 1, 3, 4).reshape(B, n, heads, dim)
    lse = lse.reshape(B, kv_heads, n, group).transpose(0, 2, 1, 3).reshape(B, n, heads)
    return out.astype(q.dtype), lse


def prompt(
    q: jax.Array, view: PagedView, query_starts: jax.Array, *, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    """The prompt part: q [C,Hq,D], rows by query_starts i32[R+1]; see `attention.ops`."""
    C, heads, dim = q.shape
    kv_heads, size = view.kv_heads, view.page_size
    group, step = heads // kv_heads, min(QUERY_BLOCK, C)
    R = query_starts.shape[0] - 1
    # One block of slack, so that a row's last block may run over the end of the chunk.
    padded = jnp.pad(q.astype(jnp.float32), ((0, step), (0, 0), (0, 0)))
    offsets = jnp.arange(step, dtype=jnp.int32)

    def row(r, carry):
        start, stop = query_starts[r], query_starts[r + 1]
        before = view.lengths[r] - (stop - start)

        def block(b, carry):
            out, lse = carry
            at = start + b * step
            chunk = lax.dynamic_slice_in_dim(padded, at, step).reshape(step, kv_heads, group, dim)
            chunk = chunk.transpose(1, 0, 2, 3).reshape(kv_heads, step * group, dim)
            live = at + offsets < stop
            positions = jnp.where(live, before + b * step + offsets, -1)
            end = jnp.minimum(before + (b + 1) * step, view.lengths[r])
            first = _first_page(before + b * step, size, spec)
            got, got_lse = _block(
                chunk,
                jnp.repeat(positions, group),
                view.table[r],
                first,
                (end + size - 1) // size,
                view,
                spec,
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
