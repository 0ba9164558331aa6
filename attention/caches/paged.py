"""Paged KV (PagedAttention: Kwon et al. 2023, arXiv 2309.06180): a pool of pages, tables on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from ..batch import Batch
from ..ops import AttentionSpec, PagedView, attention


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "base"],
    meta_fields=["backends", "layers", "keys_transposed"],
)
@dataclass(frozen=True)
class PagedKV:
    """One layer's pages: k [M,Hkv,D,ps] (or [M,Hkv,ps,D] where keys are not transposed), v [M,Hkv,ps,D].

    Layers that run under one scan share arrays [layers*M, ...]: layer l uses pages l*M.. of them, and `base` is
    its offset while it runs. None means no offset.
    """

    k: jax.Array
    v: jax.Array
    base: jax.Array | None = None
    backends: tuple[str, ...] = ("tokenloom.attention.blockwise",)
    layers: int = 1
    keys_transposed: bool = True

    def layer(self, index: jax.Array) -> PagedKV:
        """One layer of several that share these arrays."""
        return replace(self, base=index * (self.k.shape[0] // self.layers))

    def put(self, index: jax.Array, new: PagedKV) -> PagedKV:
        """What `layer(index)` became."""
        del index
        return replace(new, base=None)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec
    ) -> tuple[jax.Array, PagedKV]:
        """q [T,Hq,D], k and v [T,Hkv,D], already rotated: writes k and v to their pages, then attends."""
        B, n, R = batch.shape.B, batch.shape.q, batch.shape.R
        base = jnp.int32(0) if self.base is None else self.base
        pages, table = batch.pages + base, batch.page_table + base
        heads = jnp.arange(k.shape[1], dtype=jnp.int32)
        at = (pages[:, None], heads[None, :])
        slots = batch.slots[:, None]
        k_at = (*at, slice(None), slots) if self.keys_transposed else (*at, slots)
        k_pages = self.k.at[k_at].set(k.astype(self.k.dtype), mode="promise_in_bounds")
        v_pages = self.v.at[*at, slots].set(v.astype(self.v.dtype), mode="promise_in_bounds")
        view = PagedView(k_pages, v_pages, table, batch.lengths, self.keys_transposed)
        parts = []
        if B:
            rect = q[: B * n].reshape(B, n, *q.shape[1:])
            out, _ = attention("rows", rect, view.rows(0, B), spec, self.backends)
            parts.append(out.reshape(B * n, *q.shape[1:]))
        if R:
            out, _ = attention(
                "prompt",
                q[B * n :],
                view.rows(B, B + R),
                spec,
                self.backends,
                query_starts=batch.query_starts,
            )
            parts.append(out)
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], replace(self, k=k_pages, v=v_pages)

    def commit(self, accepted: jax.Array) -> PagedKV:
        """Plain pages need no commit: a rejected token's slot is overwritten by the next one."""
        del accepted
        return self
