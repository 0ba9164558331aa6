"""Softmax attention with grouped heads, rotary positions, query-key norms, windows and soft caps."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx

from ...attention.batch import Batch
from ...attention.ops import AttentionSpec
from ...attention.rotary import unrotated
from ..config import AttentionConfig
from ..layers import Linear, Norm, Numerics
from ..rope import rotate


class Attention(nnx.Module):
    """x [T,E] -> [T,E]. What is remembered, and how it is attended, is the cache's business."""

    def __init__(self, config: AttentionConfig, hidden: int, *, numerics: Numerics, rngs: nnx.Rngs):
        self.config = config
        q_size, kv_size = config.heads * config.head_dim, config.kv_heads * config.head_dim
        bias = config.qkv_bias
        self.q = Linear(hidden, q_size, ("heads", "embed"), bias=bias, numerics=numerics, rngs=rngs)
        self.k = Linear(hidden, kv_size, ("kv_heads", "embed"), bias=bias, numerics=numerics, rngs=rngs)
        self.v = Linear(hidden, kv_size, ("kv_heads", "embed"), bias=bias, numerics=numerics, rngs=rngs)
        self.o = Linear(
            q_size, hidden, ("embed", "heads"), bias=config.out_bias, numerics=numerics, rngs=rngs
        )
        norm = config.qk_norm
        sizes = (config.head_dim,) * 2 if config.qk_norm_over == "head" else (q_size, kv_size)
        self.q_norm = None if norm is None else Norm(sizes[0], norm, numerics=numerics, rngs=rngs)
        self.k_norm = None if norm is None else Norm(sizes[1], norm, numerics=numerics, rngs=rngs)

    def __call__(self, x: jax.Array, batch: Batch, state):
        c = self.config
        T = x.shape[0]
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None and c.qk_norm_over == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(T, c.heads, c.head_dim)
        k, v = k.reshape(T, c.kv_heads, c.head_dim), v.reshape(T, c.kv_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None and c.qk_norm_over == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        turn = unrotated if c.rope is None else partial(rotate, config=c.rope)
        with jax.named_scope("attend"):
            out, state = state.attend(q, k, v, batch, AttentionSpec(c.scale, c.window, c.softcap), turn)
        return self.o(out.reshape(T, c.heads * c.head_dim)), state
