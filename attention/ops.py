"""The attention op over paged keys and values: one signature, its specification, merging, and sinks.

Inside, the order is: scale, soft cap, mask, sink. Back ends are tried in the order given; see
`pallas_kernels.attention.spec.Backend` for what each offers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..pallas_kernels.attention.spec import (
    NEG_INF,
    AttentionSpec,
    Backend,
    Layout,
    PagedView,
    Tree,
    stored_numbers,
    token_axis,
)

__all__ = [
    "NEG_INF",
    "AttentionSpec",
    "Backend",
    "Layout",
    "PagedView",
    "Tree",
    "attention",
    "dense",
    "merge",
    "with_sinks",
]


def merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Merge two partial results (out, lse) over disjoint keys; the identity is out = 0, lse = -inf."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    weight = jnp.where(jnp.isneginf(lse_b), 0.0, jnp.exp(lse_b - jnp.where(jnp.isneginf(lse), 0.0, lse)))
    out = out_a + weight[..., None].astype(out_a.dtype) * (out_b - out_a)
    return out, lse


def with_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention sinks: a learned score a head, f32[Hq], that takes weight and has no value (gpt-oss)."""
    total = jnp.logaddexp(lse, sinks)
    return (out * jnp.exp(lse - total)[..., None]).astype(out.dtype), total


def attention(
    q: jax.Array,
    view: PagedView,
    spec: AttentionSpec,
    backends: tuple[Backend, ...],
    *,
    query_starts: jax.Array | None = None,
    ends: jax.Array | None = None,
    tree: Tree | None = None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one part of a batch over its pages, on the first back end that accepts the case.

    q [B,n,Hq,D] is the rectangular part: row b's n tokens are its last n positions, or the slots of a draft
    `tree`. With `query_starts` i32[R+1], q [C,Hq,D] is the flat prompt part, and `ends` i32[R] as in
    `Backend.prompt`. Returns (out, lse): out like q,
    lse f32 [..., Hq], so partial results `merge`. A back end refuses with NotImplementedError; when all do, one
    NotImplementedError gives every reason.
    """
    _check(q, view)
    reasons = []
    for backend in backends:
        try:
            if query_starts is None:
                out, lse = backend.rows(q, view, spec, tree)
            else:
                out, lse = backend.prompt(q, view, query_starts, spec, ends)
            return (out, lse) if sinks is None else with_sinks(out, lse, sinks)
        except NotImplementedError as reason:
            reasons.append(f"{type(backend).__name__}: {reason}")
    raise NotImplementedError("no attention back end accepts this case: " + "; ".join(reasons))


def _check(q: jax.Array, view: PagedView) -> None:
    """ValueError where queries and pages are not of one model."""
    heads, dim = q.shape[-2:]
    stored, wanted = view.k_pages.shape[5 - token_axis(view.layout)], stored_numbers(view.layout, dim)
    if heads % view.kv_heads:
        raise ValueError(
            f"{heads} query heads do not share {view.kv_heads} KV heads evenly; give a multiple of them"
        )
    if stored != wanted:
        raise ValueError(
            f"queries have heads of {dim}, for which {view.layout} pages hold {wanted} numbers a token, but these "
            f"hold {stored}; give queries and pages of one model"
        )


def dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
    spec: AttentionSpec,
    seen: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The specification: q [N,Hq,D], k and v [S,Hkv,D], positions i32; returns out [N,Hq,D], lse [N,Hq].

    Keys with a negative position are unseen; `seen` bool[N,S] hides more. Grouped heads: query head h uses KV head
    h // (Hq/Hkv). Computed in float32, or in float64 where the inputs are.
    """
    N, heads, dim = q.shape
    kv_heads = k.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.astype(wide).reshape(N, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("nhgd,shd->hgns", grouped, k.astype(wide)) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    first, last = spec.visible(q_positions[:, None], k_positions.max() + 1)
    sees = (k_positions >= first) & (k_positions <= last) & (k_positions >= 0)
    if seen is not None:
        sees &= seen
    top = jnp.max(jnp.where(sees, scores, NEG_INF), -1, keepdims=True)
    weights = jnp.where(sees, jnp.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("hgns,shd->nhgd", weights / jnp.maximum(total, 1e-30), v.astype(wide))
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)[..., 0]
    return out.reshape(N, heads, dim).astype(q.dtype), jnp.moveaxis(lse, -1, 0).reshape(N, heads)
