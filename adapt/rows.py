"""Attention for training on a CPU: one KV head of one row at a time, recomputed in the backward pass.

Equal to `attention.caches.Uncached`, which is its specification. There the scores of all heads are held for the
backward pass (at 2,048 tokens, 128 MiB a layer and row for 8 heads); here only those of one KV head exist at a
time (rematerialisation, Chen et al. 2016, arXiv 1604.06174), its query heads share one plain product, and keys
that a block of queries cannot see are never multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from ..attention.batch import Batch
from ..attention.ops import NEG_INF, AttentionSpec
from ..attention.rotary import Rotate, unrotated

QUERY_BLOCK = 256


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclass(frozen=True)
class TrainingRows:
    """Attention inside each of B fresh rows of q tokens (`attention.batch.rectangle`); remembers nothing."""

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec,
        rotate: Rotate = unrotated,
    ) -> tuple[jax.Array, TrainingRows]:  # fmt: skip
        """q [T,Hq,D], k and v [T,Hkv,D] -> (out [T,Hq,D], self). Causal attention only."""
        B, n = batch.shape.B, batch.shape.q
        if batch.shape.R or not spec.causal:
            raise ValueError(
                f"TrainingRows attends causally inside fresh rows; got {batch.shape.R} prompt rows and "
                f"causal={spec.causal}; use attention.caches.Uncached for rows that see both ways"
            )
        q, k = rotate(q, batch.positions), rotate(k, batch.positions)
        (heads, dim), kv_heads = q.shape[1:], k.shape[1]
        group = heads // kv_heads
        q = (q * spec.scale).reshape(B, n, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
        k, v = (x.reshape(B, n, kv_heads, dim).transpose(0, 2, 1, 3).reshape(-1, n, dim) for x in (k, v))
        head = jax.checkpoint(partial(_head, spec=spec))
        out = jax.lax.map(head, (q.reshape(-1, group, n, dim), k, v))
        out = out.reshape(B, kv_heads, group, n, dim).transpose(0, 3, 1, 2, 4)
        return out.reshape(B * n, heads, dim), self

    def commit(self, accepted: jax.Array) -> TrainingRows:
        del accepted
        return self


def _head(args: tuple[jax.Array, jax.Array, jax.Array], spec: AttentionSpec) -> jax.Array:
    """Scaled q [G,n,D], k and v [n,D] of one KV head -> [G,n,D], in blocks of queries."""
    q, k, v = args
    group, n, dim = q.shape
    blocks = []
    for start in range(0, n, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n)
        first = 0 if spec.window is None else max(start - spec.window + 1, 0)
        scores = q[:, start:stop].reshape(-1, dim) @ k[first:stop].T
        scores = scores.astype(jnp.float32).reshape(group, stop - start, stop - first)
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        query, key = jnp.arange(start, stop)[:, None], jnp.arange(first, stop)[None, :]
        seen = key <= query
        if spec.window is not None:
            seen &= key > query - spec.window
        weights = jax.nn.softmax(jnp.where(seen, scores, NEG_INF), axis=-1).astype(v.dtype)
        out = weights.reshape(-1, stop - first) @ v[first:stop]
        blocks.append(out.reshape(group, stop - start, dim))
    return jnp.concatenate(blocks, axis=1)
