"""What a model's queries and keys are like on given texts: for caches that are calibrated offline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..attention.batch import Batch, rectangle
from ..attention.caches.recurrent import Stateless
from ..attention.caches.uncached import Uncached
from ..attention.ops import AttentionSpec
from ..attention.rotary import Rotate, unrotated
from .config import AttentionConfig, ModelConfig


@partial(jax.tree_util.register_dataclass, data_fields=["products"], meta_fields=[])
@dataclass(frozen=True)
class Observed:
    """Attention inside fresh rows that also sums |q_c k_c| of each token with itself: products f32[Hkv,D]."""

    products: jax.Array

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec,
        rotate: Rotate = unrotated,
    ) -> tuple[jax.Array, Observed]:  # fmt: skip
        """As `Uncached`; products of rotated q [T,Hq,D] and k [T,Hkv,D], summed over tokens and the G query heads."""
        out, _ = Uncached().attend(q, k, v, batch, spec, rotate)
        q, k = (rotate(x, batch.positions).astype(jnp.float32) for x in (q, k))
        grouped = q.reshape(*k.shape[:2], -1, k.shape[2])
        return out, Observed(self.products + jnp.abs(grouped * k[:, :, None]).sum((0, 2)))


def channel_products(
    graph: nnx.GraphDef, params: Any, config: ModelConfig, blocks: Iterable[np.ndarray]
) -> list[np.ndarray | None]:
    """Mean |q_c k_c| after rotation, f64[Hkv,D] a layer (None without attention), over blocks of tokens i32[B,n].

    Double Sparsity's "qk" statistic (arXiv 2408.07092, section 3.1): its paper takes 256 texts of 512 tokens.
    """

    @jax.jit
    def run(params, tokens):
        model, batch = nnx.merge(graph, params), rectangle(tokens)
        mixers = [block.mixer for block in config.blocks]
        state = tuple(
            Observed(jnp.zeros((m.kv_heads, m.head_dim))) if isinstance(m, AttentionConfig) else Stateless()
            for m in mixers
        )
        _, state = model.run(model.embed(batch.tokens, batch), state, batch, range(model.num_layers))
        return [one.products if isinstance(one, Observed) else None for one in state]

    total, count = None, 0
    for tokens in blocks:
        found = [
            None if one is None else np.asarray(one, np.float64) for one in run(params, jnp.asarray(tokens))
        ]
        total = found if total is None else list(map(_sum, total, found))
        count += tokens.size
    if total is None:
        raise ValueError("there is no text to calibrate with; give at least one block of tokens [B,n]")
    return [None if one is None else one / count for one in total]


def _sum(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    return None if a is None or b is None else a + b
