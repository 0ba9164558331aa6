"""Attention of one query token a row over chosen tokens: those that a cache selects in pages, or kept at all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas_kernels.attention.spec import NEG_INF, AttentionSpec, PagedView, multiplied


def gather(view: PagedView, tokens: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B,H,k,D] at places i32[B,H,k] of the rows' texts: H heads that share the KV heads evenly.

    As stored, or in float32 where they have scales.
    """
    size, shared = view.page_size, tokens.shape[1] // view.kv_heads
    page = jnp.take_along_axis(view.table[:, None, :], tokens // size, 2)
    at = (page, (jnp.arange(tokens.shape[1], dtype=jnp.int32) // shared)[None, :, None])
    slot = tokens % size

    def read(pages: jax.Array, transposed: bool) -> jax.Array:
        index = (*at, slice(None), slot) if transposed else (*at, slot)
        return pages.at[index].get(mode="promise_in_bounds")

    k = read(view.k_pages, view.layout == "transposed")
    if view.v_pages is None:
        k, v = k[..., :dim], k[..., dim:]
    else:
        k, v = k[..., :dim], read(view.v_pages, False)[..., :dim]
    if view.k_scales is not None and view.v_scales is not None:
        k = k.astype(jnp.float32) * read(view.k_scales, False)[..., None]
        v = v.astype(jnp.float32) * read(view.v_scales, False)[..., None]
    return k, v


def best(scores: jax.Array, count: int, always: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The `count` highest of scores f32[B,Hkv,G,S], -inf where a token is unseen.

    A token's score is the largest of its G query heads', or infinite where it is `always` i32[B].
    Returns (tokens, seen) [B,Hkv,count]; ties go to the first.
    """
    joint = scores.max(2)
    if always is not None:
        own = jnp.arange(joint.shape[-1], dtype=jnp.int32) == always[:, None]
        joint = jnp.where(own[:, None], jnp.inf, joint)
    top, tokens = lax.top_k(joint, min(count, joint.shape[-1]))
    return tokens, top > -jnp.inf


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    """q [B,Hq,D] over k and v [B,Hkv,K,D] where seen bool[B,Hkv,K]: (out [B,Hq,D], probabilities f32[B,Hkv,G,K]).

    Rows that see nothing give 0. Products are in the dtype of `multiplied`, with sums in float32.
    """
    B, heads, dim = q.shape
    kv_heads = k.shape[1]
    dtype = multiplied(q.dtype, k.dtype)
    grouped = q.astype(dtype).reshape(B, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bhgd,bhkd->bhgk", grouped, k.astype(dtype), preferred_element_type=jnp.float32)
    scores = spec.capped(scores * spec.scale)
    mask = seen[:, :, None]
    scores = jnp.where(mask, scores, NEG_INF)
    weights = jnp.where(mask, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    p = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    values = jnp.where(seen[..., None], v.astype(dtype), 0)  # an empty place may hold anything
    out = jnp.einsum("bhgk,bhkd->bhgd", p.astype(dtype), values, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype), p
