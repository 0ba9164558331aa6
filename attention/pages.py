"""Queries meet pages, in plain JAX: what the plain attention and the probes share.

The query heads of a KV head are packed into the rows of one product: N = n*G rows a KV head, token-major.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas_kernels.attention.spec import AttentionSpec, PagedView, Tree, multiplied
from .coded import CodedView

T = TypeVar("T")


def pack(x: jax.Array, kv_heads: int) -> jax.Array:
    """x [B,n,Hq,...] -> [B,Hkv,n*G,...]."""
    B, n, heads, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, n, kv_heads, heads // kv_heads, *rest), 2, 1).reshape(
        B, kv_heads, -1, *rest
    )


def unpack(x: jax.Array, n: int) -> jax.Array:
    """x [B,Hkv,n*G,...] -> [B,n,Hq,...]."""
    B, kv_heads, _, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, kv_heads, n, -1, *rest), 1, 2).reshape(B, n, -1, *rest)


def _take(pages: jax.Array, where: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Pages `where` i32[W] in `dtype`.

    XLA for CPUs widens what it gathers of bfloat16 and float8, and moves that out of the loop, where it takes the whole
    pool; behind a barrier it stays beside the gather (13 times faster on a pool of 16 MiB).
    """
    pages, where = lax.optimization_barrier((pages, where))
    return pages.at[where].get(mode="promise_in_bounds").astype(dtype)


def read(
    view: PagedView | CodedView, where: jax.Array, dim: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, str]:
    """Pages `where` i32[W] of heads of size `dim` in `dtype`.

    Returns keys, values [W,Hkv,ps,D], and how keys lie in an einsum ("ds" or "sd"). Scales are left for `scales`: on
    scores and weights they cost a factor D less.
    """
    if isinstance(view, CodedView):
        k, v = view.read(where)
        return k.astype(dtype), v.astype(dtype), "ds"
    k = _take(view.k_pages, where, dtype)
    if view.v_pages is None:
        return k[..., :dim], k[..., dim:], "sd"
    v = _take(view.v_pages, where, dtype)
    if view.layout == "transposed":
        return k, v, "ds"
    return k[..., :dim], v[..., :dim], "sd"


def factored(q: jax.Array, spec: AttentionSpec, dtype: jnp.dtype) -> tuple[jax.Array, float]:
    """(queries as products in `dtype` take them, the factor that is left for their scores): float32 queries carry the
    scale, which is the fewer products; others would be rounded by it."""
    if dtype == jnp.float32:
        return q.astype(jnp.float32) * spec.scale, 1.0
    return q.astype(dtype), spec.scale


def scales(values: jax.Array, where: jax.Array) -> jax.Array:
    """Scales of pages `where` i32[W] as f32[W,Hkv,1,ps], beside scores or weights [W,Hkv,N,ps]."""
    return values.at[where].get(mode="promise_in_bounds")[:, :, None, :]


def live_pages(
    lengths: jax.Array, first: jax.Array, size: int
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]]:
    """The live pages of all rows from page `first` i32[B] on, one row after the other: their number, and how to find
    one: find(item i32[W]) -> (row, page's place in the row's table, live), each [W]; items past the end do not live.
    """
    counts = (lengths + size - 1) // size - first
    ends = jnp.cumsum(counts)

    def find(item: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        live = item < ends[-1]
        row = (item[:, None] >= ends[None, :]).sum(-1, dtype=jnp.int32)
        row = jnp.minimum(row, lengths.shape[0] - 1)
        return row, jnp.where(live, first[row] + item - (ends[row] - counts[row]), 0), live

    return ends[-1], find


def each_block(
    query_starts: jax.Array,
    lengths: jax.Array,
    step: int,
    body: Callable[[jax.Array, jax.Array, jax.Array, T], T],
    carry: T,
    aligned: bool = False,
) -> T:
    """Blocks of `step` tokens of a flat prompt part with rows by query_starts i32[R+1], row by row.

    carry = body(row, at, positions, carry): the block's tokens lie from `at` on, at text positions i32[step]; -1 past
    the end of the row, where the next row begins. `aligned`: blocks end where multiples of `step` of the text do, so
    the first one of a row may be shorter.
    """
    offsets = jnp.arange(step, dtype=jnp.int32)

    def row(r, carry):
        start, stop = query_starts[r], query_starts[r + 1]
        skew = (lengths[r] - stop + start) % step if aligned else 0

        def block(b, carry):
            at = start + jnp.maximum(b * step - skew, 0)
            end = jnp.minimum(start + (b + 1) * step - skew, stop)
            positions = jnp.where(at + offsets < end, lengths[r] - stop + at + offsets, -1)
            return body(r, at, positions, carry)

        return lax.fori_loop(
            0, jnp.where(stop > start, (stop - start + skew + step - 1) // step, 0), block, carry
        )

    return lax.fori_loop(0, query_starts.shape[0] - 1, row, carry)


def block_view(view: PagedView, row: jax.Array, spec: AttentionSpec, positions: jax.Array) -> PagedView:
    """The view of one row, cut behind the last token that queries at these positions (from `each_block`) see."""
    length = view.lengths[row]
    _, last = spec.visible(positions[0] + positions.shape[0] - 1, length)
    return replace(view, table=view.table[row][None], lengths=(last + 1)[None])


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "temperatures"], meta_fields=[])
@dataclass(frozen=True)
class Noise:
    """Gumbel noise z on scores x, which become (x + z) / temperature (Keyformer, arXiv 2403.09054, its score function).

    keys: typed random keys [rows]; temperatures f32[rows]. z of a query head is drawn from fold_in(fold_in(key,
    query position), key position), so it depends neither on the batch, nor on chunks, nor on where pages lie.
    """

    keys: jax.Array
    temperatures: jax.Array

    def row(self, index: jax.Array) -> Noise:
        return Noise(self.keys[index][None], self.temperatures[index][None])

    def on(self, scores: jax.Array, row: jax.Array, positions: jax.Array, keys: jax.Array) -> jax.Array:
        """scores f32[W,Hkv,n*G,ps] of rows i32[W]; text positions i32[W,n] of queries and i32[W,ps] of keys."""
        W, kv_heads, packed, size = scores.shape
        n = positions.shape[1]

        def draw(key, query, at):
            return jax.random.gumbel(
                jax.random.fold_in(jax.random.fold_in(key, query), at), (kv_heads, packed // n)
            )

        by_key = jax.vmap(draw, (None, None, 0))
        by_query = jax.vmap(by_key, (None, 0, None))
        z = jax.vmap(by_query)(self.keys[row], positions, keys)  # [W,n,ps,Hkv,G]
        z = z.transpose(0, 3, 1, 4, 2).reshape(W, kv_heads, packed, size)
        return (scores + z) / self.temperatures[row][:, None, None, None]


@dataclass(frozen=True)
class Queries:
    """n query tokens of each of B rows, and the pages that they see.

    packed [B,Hkv,n*G,D] as multiplied, scores times `factor` being scaled; sees_from, sees_to i32[B,n*G]: the first and
    last visible position of each; words: a tree's bits, i32[B,n*G] each; before i32[B]: the tokens in front of a tree;
    positions i32[B,n].
    """

    view: PagedView | CodedView
    spec: AttentionSpec
    packed: jax.Array
    factor: float
    sees_from: jax.Array
    sees_to: jax.Array
    words: tuple[jax.Array, ...]
    before: jax.Array
    positions: jax.Array
    noise: Noise | None

    @staticmethod
    def of(
        q: jax.Array, view: PagedView | CodedView, spec: AttentionSpec, positions: jax.Array,
        tree: Tree | None = None, before: jax.Array | None = None, noise: Noise | None = None,
    ) -> Queries:  # fmt: skip
        """q [B,n,Hq,D] at text positions i32[B,n]; a negative one sees nothing. `before` as above; None: all but n."""
        (_, n, heads, _), kv_heads = q.shape, view.kv_heads
        group, lengths, words = heads // kv_heads, view.lengths[:, None], ()
        sees_from, sees_to = spec.visible(positions, lengths)
        if tree is not None:
            sees_to = lengths - 1
            words = tuple(jnp.repeat(tree.bits[..., w], group, 1) for w in range(tree.bits.shape[-1]))
        sees_from = jnp.repeat(jnp.where(positions < 0, lengths, sees_from), group, axis=1)
        sees_to = jnp.repeat(jnp.where(positions < 0, -1, sees_to), group, axis=1)
        q, factor = factored(q, spec, multiplied(q.dtype, view.dtype))
        packed = pack(q, kv_heads)
        before = view.lengths - n if before is None else before
        return Queries(view, spec, packed, factor, sees_from, sees_to, words, before, positions, noise)

    @staticmethod
    def last(
        q: jax.Array,
        view: PagedView,
        spec: AttentionSpec,
        tree: Tree | None = None,
        noise: Noise | None = None,
    ) -> Queries:
        """The rectangular part: q [B,n,Hq,D], the last n tokens of each row or the slots of its tree."""
        n = q.shape[1]
        depths = jnp.arange(n, dtype=jnp.int32)[None] if tree is None else tree.depths
        return Queries.of(q, view, spec, view.lengths[:, None] - n + depths, tree, noise=noise)

    @property
    def pages(self) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]]:
        """`live_pages` from the first that any query of a row sees."""
        size = self.view.span
        return live_pages(self.view.lengths, self.sees_from.min(1) // size, size)

    def meet(
        self, row: jax.Array, page: jax.Array, live: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Pages `page` of rows `row`, i32[W] each, where `live` bool[W].

        Returns scores f32[W,Hkv,N,ps], scaled and capped (and noisy), not masked; who is seen bool[W,1,N,ps]; where
        the pages lie i32[W]; and their values (codes, where they have scales) [W,Hkv,ps,D],
        both products being in the dtype of `packed`, with sums in float32.
        """
        view, softcap = self.view, self.spec.softcap
        where = jnp.where(live, view.table[row, page], 0)
        k, v, lie = read(view, where, self.packed.shape[-1], self.packed.dtype)
        scores = jnp.einsum(f"whnd,wh{lie}->whns", self.packed[row], k, preferred_element_type=jnp.float32)
        if self.factor != 1:
            scores = scores * self.factor
        if view.k_scales is not None:
            scores = scores * scales(view.k_scales, where)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        keys = view.places(page)[:, None, :]
        if self.noise is not None:
            scores = self.noise.on(scores, row, self.positions[row], keys[:, 0])
        seen = (keys >= self.sees_from[row][..., None]) & (keys <= self.sees_to[row][..., None])
        if self.words:
            slots = keys - self.before[row][:, None, None]
            seen &= Tree.sees([word[row][..., None] for word in self.words], slots)
        return scores, (seen & live[:, None, None])[:, None], where, v
