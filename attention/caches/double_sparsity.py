"""Double Sparsity (Yang et al. 2024, arXiv 2408.07092): a decode step reads the keys and values of few tokens.

A few channels of every key, its label, lie beside the pages. A decode step scores all tokens by their labels, reads
the best ones whole, and attends to these; prompts are dense, and the first layers always. The channels are those
where |q_c k_c| is largest on average (`model.observe.channel_products`), found once for a checkpoint.

Choices where the paper leaves them open: a KV head has one label for its G query heads, and a token's score is the
largest of theirs; a token always sees itself. Without calibration the channels are those that rotary positions turn
neither fast nor slowly, where calibration finds them too in the embedded model: the fast ones come round again within
a few tokens, the slow ones hardly tell near from far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from ..batch import Batch
from ..chosen import attend, best, gather
from ..ops import AttentionSpec, PagedView
from ..probes import logits
from ..rotary import Rotate, unrotated
from .paged import PagedKV
from .policy import Abilities, CachePolicy, Capacity, Heads
from .seats import rectangular

Channels = tuple[tuple[int, ...], ...]


def middle(head_dim: int, channels: int) -> tuple[int, ...]:
    """The channels that rotary positions turn neither fast nor slowly: pairs (i, i + D/2) from the middle outwards."""
    half = head_dim // 2
    pairs = sorted(range(half), key=lambda pair: (abs(2 * pair + 1 - half), pair))
    order = [c for pair in pairs for c in (pair, pair + half)]
    return tuple(sorted((order + [head_dim - 1] * (head_dim % 2))[:channels]))


@dataclass(frozen=True)
class DoubleSparsity(CachePolicy):
    """`tokens` read a step and KV head, by `channels` of each key; the first `dense_layers` read everything.

    `labels`, one a layer: the channels of each KV head (`calibrated`); None: the `middle` ones.
    """

    tokens: int = 256
    channels: int = 8
    dense_layers: int = 2
    labels: tuple[Channels, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.channels < 1 or self.dense_layers < 0:
            raise ValueError(
                f"DoubleSparsity(tokens={self.tokens}, channels={self.channels}, dense_layers={self.dense_layers}) "
                f"needs at least 1 token, 1 channel and 0 layers"
            )

    def __repr__(self) -> str:
        known = "middle channels" if self.labels is None else "calibrated"
        return f"DoubleSparsity(tokens={self.tokens}, channels={self.channels}, {known})"

    def calibrated(self, products: Sequence) -> DoubleSparsity:
        """The same with the channels of largest `products`: [Hkv,D] a layer, or None where a layer has no attention."""

        def order(head) -> tuple[int, ...]:
            return tuple(sorted(sorted(range(len(head)), key=lambda c: (-head[c], c))[: self.channels]))

        found = tuple(
            () if one is None else tuple(order([float(x) for x in h]) for h in one) for one in products
        )
        return replace(self, labels=found)

    @property
    def abilities(self) -> Abilities:
        return Abilities(may_share_prefix=True, rebuildable=False, quantises=True, layers_alike=False)

    def create(
        self, heads: Heads, layer: int, capacity: Capacity, layers: int | None = None
    ) -> PagedKV | SparseKV:
        if self.channels > heads.head_dim:
            raise ValueError(
                f"{self!r} wants {self.channels} channels of heads of {heads.head_dim}; lower channels"
            )
        pages = PagedKV.of(heads, capacity, layers)
        if layer < self.dense_layers:
            return pages
        table = (middle(heads.head_dim, self.channels),) * heads.kv_heads
        if self.labels is not None:
            table = self.labels[layer] if layer < len(self.labels) else ()
        if len(table) != heads.kv_heads or any(max(head) >= heads.head_dim for head in table):
            raise ValueError(
                f"the labels of {self!r} for layer {layer} do not fit {heads.kv_heads} KV heads of {heads.head_dim}; "
                f"calibrate with this checkpoint"
            )
        shape = (pages.k.shape[0], heads.kv_heads, capacity.page_size, self.channels)
        return SparseKV(pages, jnp.zeros(shape, capacity.dtype), self.tokens, table)


@partial(
    jax.tree_util.register_dataclass, data_fields=["pages", "labels"], meta_fields=["tokens", "channels"]
)
@dataclass(frozen=True)
class SparseKV:
    """One layer: its pages, and labels [M,Hkv,ps,r] of the same tokens; `channels`: r of them for each KV head."""

    pages: PagedKV
    labels: jax.Array
    tokens: int
    channels: Channels

    def layer(self, index: jax.Array) -> SparseKV:
        return replace(self, pages=self.pages.layer(index))

    def put(self, index: jax.Array, new: SparseKV) -> SparseKV:
        return replace(new, pages=self.pages.put(index, new.pages))

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec,
        rotate: Rotate = unrotated,
    ) -> tuple[jax.Array, SparseKV]:  # fmt: skip
        """q [T,Hq,D], k and v [T,Hkv,D], raw. One token a rectangular row."""
        q, k = rotate(q, batch.positions), rotate(k, batch.positions)
        B, new, parts = rectangular(batch, self, spec), self._write(k, v, batch), []
        if B:
            parts.append(new._rows(q[:B], batch, spec))
        if batch.shape.R:
            parts.append(new.pages.prompt(q[B:], batch, spec)[0])
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], new

    def _label(self, x: jax.Array) -> jax.Array:
        """The channels of x [...,H,D], whose H heads share the KV heads' evenly: [...,H,r]."""
        index = jnp.repeat(jnp.asarray(self.channels, jnp.int32), x.shape[-2] // len(self.channels), 0)
        return jnp.take_along_axis(x, index.reshape((1,) * (x.ndim - 2) + index.shape), -1)

    def _write(self, k: jax.Array, v: jax.Array, batch: Batch) -> SparseKV:
        pages = self.pages.write(k, v, batch)
        base = jnp.int32(0) if pages.base is None else pages.base
        heads = jnp.arange(k.shape[1], dtype=jnp.int32)
        at = ((batch.pages + base)[:, None], heads[None, :], batch.slots[:, None])
        labels = self._label(k).astype(self.labels.dtype)
        return replace(self, pages=pages, labels=self.labels.at[at].set(labels, mode="promise_in_bounds"))

    def _rows(self, q: jax.Array, batch: Batch, spec: AttentionSpec) -> jax.Array:
        """q [B,Hq,D] over the tokens that their labels choose."""
        B, heads, dim = q.shape
        view = self.pages.view(batch).rows(0, B)
        labels = PagedView(self.labels, None, view.table, view.lengths, layout="paired")
        scores = logits(self._label(q)[:, None], labels, spec)
        scores = scores.reshape(B, len(self.channels), heads // len(self.channels), -1)
        tokens, seen = best(scores, self.tokens, view.lengths - 1)
        return attend(q, *gather(view, tokens, dim), seen, spec)[0]
