"""H2O (Zhang et al. 2023, arXiv 2306.14048): a fixed number of tokens a KV head, the recent and the heavy ones.

A prompt is computed with full attention over ordinary pages, chunk by chunk, while the attention that each token got
is summed. When the prompt is complete, each head keeps its `recent` last tokens and the `heavy` ones with the largest
sums, and the pages are free again. Each generated token then takes the one empty place; sums go on; of the tokens
that are not recent the one with the smallest sum loses its place. Keys keep the rotation of their text position
("real drop" in the released code). The G query heads of a KV head count together, and sums are per sequence, where
that code adds those of a batch up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..batch import Batch
from ..chosen import attend, gather
from ..ops import AttentionSpec
from ..probes import column_sums
from ..rotary import Rotate, unrotated
from .paged import PagedKV
from .policy import Abilities, CachePolicy, Capacity, Heads
from .seats import BySeat, live_seats, rectangular, zeros


@dataclass(frozen=True)
class H2O(CachePolicy):
    """Places for heavy hitters and for recent tokens; the paper takes halves of a fifth of the text."""

    heavy: int = 256
    recent: int = 256

    def __post_init__(self) -> None:
        if self.heavy < 0 or self.recent < 1:
            raise ValueError(f"{self!r} needs at least 0 heavy places and 1 recent: a token sees itself")

    @property
    def abilities(self) -> Abilities:
        return Abilities(pages="prompt", rebuildable=False)

    def create(self, heads: Heads, layer: int, capacity: Capacity, layers: int | None = None) -> HeavyKV:
        del layer
        places = (capacity.seats + 1, heads.kv_heads, self.heavy + self.recent + 1)
        k, v = (zeros((*places, heads.head_dim), capacity.stored, layers) for _ in range(2))
        sums = zeros((*places[:2], capacity.width * capacity.page_size), jnp.dtype("float32"), layers)
        scores, positions = zeros(places, sums.dtype, layers), zeros(places, jnp.dtype("int32"), layers) - 1
        return HeavyKV(PagedKV.of(heads, capacity, layers), Kept(k, v, scores, positions, sums), self.recent)


@partial(
    jax.tree_util.register_dataclass, data_fields=["k", "v", "scores", "positions", "sums"], meta_fields=[]
)
@dataclass(frozen=True)
class Kept(BySeat):
    """What heads keep by seat, K = heavy + recent + 1 places: k and v [seats+1,Hkv,K,D]; the attention that they got,
    f32[seats+1,Hkv,K]; their text positions i32[seats+1,Hkv,K], -1 for an empty place (there is one between steps).
    `sums` f32[seats+1,Hkv,S]: what the tokens of a prompt got so far."""

    k: jax.Array
    v: jax.Array
    scores: jax.Array
    positions: jax.Array
    sums: jax.Array

    def generate(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec, recent: int
    ) -> tuple[jax.Array, Kept]:
        """The rectangular part: q [B,Hq,D], k and v [B,Hkv,D], rotated. Insert, attend, count, evict."""
        B, kv_heads, _ = k.shape
        seats, text = live_seats(batch, self.k.shape[0])[:, None], batch.positions[:B, None, None]
        heads = jnp.arange(kv_heads, dtype=jnp.int32)[None, :]
        at = (seats, heads, jnp.argmax(self.positions[seats[:, 0]] < 0, -1))
        all_k, all_v = self.k.at[at].set(k.astype(self.k.dtype)), self.v.at[at].set(v.astype(self.v.dtype))
        positions = self.positions.at[at].set(text[:, 0])[seats[:, 0]]
        scores = self.scores.at[at].set(0.0)[seats[:, 0]]
        held = positions >= 0
        seen = held if spec.window is None else held & (positions > text - spec.window)
        out, p = attend(q, all_k[seats[:, 0]], all_v[seats[:, 0]], seen, spec)
        scores = scores + p.sum(2)
        victim = jnp.argmin(jnp.where(held & (positions <= text - recent), scores, jnp.inf), -1)
        lost = held.all(-1, keepdims=True) & (jnp.arange(held.shape[-1]) == victim[..., None])
        positions = jnp.where(lost, -1, positions)
        seat = seats[:, 0]
        return out, Kept(
            all_k, all_v, self.scores.at[seat].set(scores), self.positions.at[seat].set(positions), self.sums
        )

    def count(self, sums: jax.Array, batch: Batch) -> Kept:
        """Add the column sums f32[R,Hkv,S] of a chunk of each prompt row; rows that begin here begin from 0."""
        seats, B = _prompt_seats(batch, self.k.shape[0]), batch.shape.B
        old = jnp.where((batch.starts[B:] == 0)[:, None, None], 0.0, self.sums[seats])
        return replace(self, sums=self.sums.at[seats].set(old + sums))

    def compact(self, pages: PagedKV, batch: Batch, recent: int) -> Kept:
        """Prompts that are complete with this step move from pages to places."""
        B, places, dim = batch.shape.B, self.k.shape[0], self.k.shape[3]
        view = pages.view(batch).rows(B, batch.shape.rows)
        seats = jnp.where(batch.ends[B:], _prompt_seats(batch, places), places - 1)
        sums, length = self.sums[seats], view.lengths[:, None, None]
        index = jnp.arange(sums.shape[-1], dtype=jnp.int32)
        heavy = self.k.shape[2] - 1 - recent
        top, chosen = lax.top_k(jnp.where(index < length - recent, sums, -1.0), min(heavy, index.size))
        chosen = jnp.sort(jnp.where(top >= 0, chosen, index.size), -1)
        last = jnp.broadcast_to(length - recent + jnp.arange(recent), (*chosen.shape[:2], recent))
        tokens = jnp.concatenate([jnp.where(chosen < index.size, chosen, -1), last], -1)
        tokens = jnp.where((tokens >= 0) & (tokens < length), tokens, -1)
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, self.k.shape[2] - tokens.shape[2])), constant_values=-1)
        place = jnp.maximum(tokens, 0)
        k, v = gather(view, place, dim)
        return replace(
            self,
            k=self.k.at[seats].set(k.astype(self.k.dtype)),
            v=self.v.at[seats].set(v.astype(self.v.dtype)),
            scores=self.scores.at[seats].set(jnp.take_along_axis(sums, place, -1)),
            positions=self.positions.at[seats].set(tokens),
        )


def _prompt_seats(batch: Batch, places: int) -> jax.Array:
    """i32[R]: the places of the prompt rows; those without a token in this step have the padding seat."""
    count = batch.query_starts[1:] - batch.query_starts[:-1]
    return jnp.where(count > 0, batch.seats[batch.shape.B :], places - 1)


@partial(jax.tree_util.register_dataclass, data_fields=["pages", "kept"], meta_fields=["recent"])
@dataclass(frozen=True)
class HeavyKV:
    """One layer: pages for prompts, places for generations."""

    pages: PagedKV
    kept: Kept
    recent: int

    def layer(self, index: jax.Array) -> HeavyKV:
        return HeavyKV(self.pages.layer(index), self.kept.layer(index), self.recent)

    def put(self, index: jax.Array, new: HeavyKV) -> HeavyKV:
        return HeavyKV(self.pages.put(index, new.pages), self.kept.put(index, new.kept), self.recent)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec,
        rotate: Rotate = unrotated,
    ) -> tuple[jax.Array, HeavyKV]:  # fmt: skip
        """q [T,Hq,D], k and v [T,Hkv,D], raw. One token a rectangular row."""
        q, k = rotate(q, batch.positions), rotate(k, batch.positions)
        B, pages, kept, parts = rectangular(batch, self, spec), self.pages, self.kept, []
        if B:
            out, kept = kept.generate(q[:B], k[:B], v[:B], batch, spec, self.recent)
            parts.append(out)
        if batch.shape.R:
            pages = pages.write(k, v, batch)
            out, lse = pages.prompt(q[B:], batch, spec)
            parts.append(out)
            view = pages.view(batch).rows(B, batch.shape.rows)
            kept = kept.count(column_sums(q[B:], view, spec, lse, query_starts=batch.query_starts), batch)
            kept = lax.cond(
                batch.ends[B:].any(),
                lambda one: one.compact(pages, batch, self.recent),
                lambda one: one,
                kept,
            )
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], HeavyKV(pages, kept, self.recent)
