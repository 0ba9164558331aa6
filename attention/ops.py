"""The attention op over paged keys and values: its signature, its reference, and the order of back ends.

Every back end offers the same two functions, one for each part of a batch:

- `rows(q[B,q,Hq,D], view, spec)`    the rectangular part: row b's q tokens are its last q positions
- `prompt(q[C,Hq,D], view, query_starts[R+1], spec)` the prompt part, flat: tokens of row r lie in
  query_starts[r]..query_starts[r+1] and are the last positions of that row

Both return (out, lse) with out in q's dtype and lse in float32, [..., Hq]; lse is the log of the summed
exponentials of the scaled, capped, masked scores, so partial results merge exactly. Rows and tokens that see
nothing give out = 0 and lse = -inf. The order inside is: scale, soft cap, mask.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

NEG_INF = -1e30


@dataclass(frozen=True)
class AttentionSpec:
    """What the scores are: `window` w lets position i see i-w+1..i; `softcap` c gives c*tanh(s/c)."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    causal: bool = True


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_pages", "v_pages", "table", "lengths"],
    meta_fields=["keys_transposed"],
)
@dataclass(frozen=True)
class PagedView:
    """What storage shows of one layer: k_pages [M,Hkv,D,ps], v_pages [M,Hkv,ps,D], table i32[rows,P],
    lengths i32[rows] in tokens (0: nothing to see).

    `keys_transposed` says how a page lies: on CPU keys are transposed inside a page, because the product with a
    query then streams contiguous memory; on TPU and GPU they are [M,Hkv,ps,D] like values, because a write of
    one token is then contiguous."""

    k_pages: jax.Array
    v_pages: jax.Array
    table: jax.Array
    lengths: jax.Array
    keys_transposed: bool = True

    @property
    def page_size(self) -> int:
        return self.v_pages.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.v_pages.shape[1]

    def rows(self, start: int, stop: int) -> PagedView:
        return replace(self, table=self.table[start:stop], lengths=self.lengths[start:stop])


def merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Merge two partial results (out, lse) over disjoint keys; the identity is out = 0, lse = -inf."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    weight = jnp.where(jnp.isneginf(lse_b), 0.0, jnp.exp(lse_b - jnp.where(jnp.isneginf(lse), 0.0, lse)))
    out = out_a + weight[..., None].astype(out_a.dtype) * (out_b - out_a)
    return out, lse


def attention(
    part: str,
    q: jax.Array,
    view: PagedView,
    spec: AttentionSpec,
    backends: tuple[str, ...],
    **kwargs: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Run `part` ("rows" or "prompt") on the first back end that accepts the case.

    A back end refuses with NotImplementedError; when all do, one NotImplementedError gives every reason.
    """
    reasons = []
    for name in backends:
        try:
            return getattr(importlib.import_module(name), part)(q, view, spec=spec, **kwargs)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError("no attention back end accepts this case: " + "; ".join(reasons))


def dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """The specification: q [N,Hq,D], k and v [S,Hkv,D], positions i32; returns out [N,Hq,D], lse [N,Hq].

    Keys with a negative position are unseen. Grouped heads: query head h uses KV head h // (Hq/Hkv).
    """
    N, heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(N, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("nhgd,shd->hgns", grouped, k, preferred_element_type=jnp.float32) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    seen = jnp.broadcast_to(k_positions[None, :] >= 0, (N, k.shape[0]))
    if spec.causal:
        seen &= k_positions[None, :] <= q_positions[:, None]
    if spec.window is not None:
        seen &= k_positions[None, :] > q_positions[:, None] - spec.window
    top = jnp.max(jnp.where(seen, scores, NEG_INF), -1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("hgns,shd->nhgd", weights / jnp.maximum(total, 1e-30), v.astype(jnp.float32))
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)[..., 0]
    return out.reshape(N, heads, dim).astype(q.dtype), jnp.moveaxis(lse, -1, 0).reshape(N, heads)
