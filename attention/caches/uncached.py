"""No memory (kind NONE): every row is fresh and whole. Training, scoring, and the reference of the laws."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from ..batch import Batch
from ..ops import AttentionSpec
from ..rotary import Rotate, unrotated


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclass(frozen=True)
class Uncached:
    """Attention inside each of B fresh rows of q tokens (`attention.batch.rectangle`)."""

    def layer(self, index: jax.Array) -> Uncached:
        del index
        return self

    def put(self, index: jax.Array, new: Uncached) -> Uncached:
        del index
        return new

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec,
        rotate: Rotate = unrotated,
    ) -> tuple[jax.Array, Uncached]:  # fmt: skip
        q, k = rotate(q, batch.positions), rotate(k, batch.positions)
        B, n = batch.shape.B, batch.shape.q
        if batch.shape.R:
            raise ValueError(f"Uncached attends fresh rows only; this batch has {batch.shape.R} prompt rows")
        kv_heads, group, dim = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
        grouped = q.reshape(B, n, kv_heads, group, dim)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k.reshape(B, n, kv_heads, dim)) * spec.scale
        scores = scores.astype(jnp.float32)
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        index = jnp.arange(n)
        seen = jnp.ones((n, n), bool)
        if spec.causal:
            seen &= index[None, :] <= index[:, None]
        if spec.window is not None:
            seen &= index[None, :] > index[:, None] - spec.window
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(v.dtype)
        out = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v.reshape(B, n, kv_heads, dim))
        return out.reshape(q.shape), self
