"""Attention over live pages only, in plain JAX: the CPU's fast path and the twin of the kernels.

A loop over rows, a loop over blocks of queries (prompts), a loop over that row's live pages, and an online
softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) in float32. Nothing is gathered and nothing is padded:
the work follows the tokens that exist. The query heads of a KV head are packed into the rows of one product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .ops import NEG_INF, AttentionSpec, PagedView

QUERY_BLOCK = 128


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
        key_positions = index * size + jnp.arange(size, dtype=jnp.int32)
        seen = key_positions[None, :] <= positions[:, None]
        if spec.window is not None:
            seen &= key_positions[None, :] > positions[:, None] - spec.window
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
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)
    return out / jnp.maximum(total, 1e-30)[..., None], lse


def _first_page(position: jax.Array, size: int, spec: AttentionSpec) -> jax.Array:
    """The first page that a query at `position` or later can see."""
    if spec.window is None:
        return jnp.zeros_like(position)
    return jnp.maximum(position - spec.window + 1, 0) // size


def rows(q: jax.Array, view: PagedView, *, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """The rectangular part: q [B,q,Hq,D]; see `attention.ops`."""
    B, n, heads, dim = q.shape
    kv_heads = view.kv_heads
    group = heads // kv_heads
    packed = q.reshape(B, n, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(B, kv_heads, n * group, dim).astype(jnp.float32)
    offsets = jnp.repeat(jnp.arange(n, dtype=jnp.int32), group)

    def row(args):
        q_row, table, length = args
        positions = jnp.where(length > 0, length - n + offsets, -1)
        first = _first_page(jnp.maximum(length - n, 0), view.page_size, spec)
        last = (length + view.page_size - 1) // view.page_size
        return _block(q_row, positions, table, first, last, view, spec)

    out, lse = lax.map(row, (packed, view.table, view.lengths))
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
