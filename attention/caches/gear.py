"""Compressed pages: int4 (grouped, packed) and GEAR (Kang et al. 2024, arXiv 2403.05527).

A page is a block. The page that a text is writing lies in full precision by seat; when it is full it is compressed
into the pool (`attention.coded`), and merged partial results join both. A token sees its own page exactly and all
earlier ones compressed, in prompts as in generations: so nothing depends on chunks, pages are shared between texts,
and a preempted sequence is recomputed. Deviation from the released code, which runs a prompt densely and compresses
it as one block of higher rank: here the prompt sees compressed pages too, and all blocks have one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..batch import NULL_PAGE, Batch
from ..blockwise import softmax_row, softmax_rows
from ..coded import Codec, CodedView, Codes
from ..ops import AttentionSpec, dense, merge
from ..pages import Queries, each_block, unpack
from ..rotary import Rotate, unrotated
from .policy import Abilities, CachePolicy, Capacity, Heads
from .seats import live_seats, rectangular, zeros

PAGES_A_STEP = 4


@dataclass(frozen=True)
class Int4KV(CachePolicy):
    """4 bits a number (or 2, or 8): keys in groups of tokens a channel, values in groups of channels a token, with an
    f16 scale and zero a group, as KIVI has them (Liu et al. 2024, arXiv 2402.02750). `block`: tokens a page."""

    bits: int = 4
    group: int = 32
    block: int = 64

    @property
    def codec(self) -> Codec:
        return Codec(self.bits, self.group)

    @property
    def abilities(self) -> Abilities:
        return Abilities(may_share_prefix=True)

    @property
    def page_size(self) -> int | None:
        return self.block

    def create(self, heads: Heads, layer: int, capacity: Capacity, layers: int | None = None) -> CodedKV:
        del layer
        return CodedKV.empty(self.codec, heads, capacity, layers)


@dataclass(frozen=True)
class GEAR(Int4KV):
    """`Int4KV` with the share of `outliers` kept and the error's part of `rank` added (0.02, and 2 for blocks of
    generations, in the paper); without outliers it is GEAR-L."""

    group: int = 64
    outliers: float = 0.02
    rank: int = 2

    @property
    def codec(self) -> Codec:
        return Codec(self.bits, self.group, self.outliers, self.rank)


@partial(
    jax.tree_util.register_dataclass, data_fields=["k", "v", "tail_k", "tail_v", "base"],
    meta_fields=["codec", "layers"],
)  # fmt: skip
@dataclass(frozen=True)
class CodedKV:
    """One layer: codes of pages, keys [M,Hkv,V=D,L=ps] and values [M,Hkv,V=ps,L=D], and by seat the page that is not
    full yet, tail_k and tail_v [seats+1,Hkv,ps,D]. Layers of a scan share the pool as `PagedKV` does."""

    k: Codes
    v: Codes
    tail_k: jax.Array
    tail_v: jax.Array
    codec: Codec
    base: jax.Array | None = None
    layers: int | None = None

    @staticmethod
    def empty(codec: Codec, heads: Heads, capacity: Capacity, layers: int | None) -> CodedKV:
        H, D, size = heads.kv_heads, heads.head_dim, capacity.page_size
        pages = ((layers or 1) * capacity.num_pages, H)
        k, v = codec.empty(pages, D, size), codec.empty(pages, size, D)
        tails = (zeros((capacity.seats + 1, H, size, D), capacity.stored, layers) for _ in range(2))
        return CodedKV(k, v, *tails, codec=codec, layers=layers)

    @property
    def page_size(self) -> int:
        return self.tail_k.shape[-2]

    def layer(self, index: jax.Array) -> CodedKV:
        assert self.layers is not None
        pages = self.k.codes.shape[0] // self.layers
        tails = (lax.dynamic_index_in_dim(x, index, keepdims=False) for x in (self.tail_k, self.tail_v))
        return CodedKV(self.k, self.v, *tails, codec=self.codec, base=index * pages)

    def put(self, index: jax.Array, new: CodedKV) -> CodedKV:
        pairs = ((self.tail_k, new.tail_k), (self.tail_v, new.tail_v))
        tails = (lax.dynamic_update_index_in_dim(a, b, index, 0) for a, b in pairs)
        return CodedKV(new.k, new.v, *tails, codec=self.codec, layers=self.layers)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec,
        rotate: Rotate = unrotated,
    ) -> tuple[jax.Array, CodedKV]:  # fmt: skip
        """q [T,Hq,D], k and v [T,Hkv,D], raw. One token a rectangular row."""
        q, k = rotate(q, batch.positions), rotate(k, batch.positions)
        B, new, parts = rectangular(batch, self, spec), self, []
        if B:
            out, new = new._rows(q[:B], k[:B], v[:B], batch, spec)
            parts.append(out)
        if batch.shape.R:
            out, new = new._prompt(q[B:], k[B:], v[B:], batch, spec)
            parts.append(out)
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], new

    def _view(self, table: jax.Array, lengths: jax.Array) -> CodedView:
        """The first `lengths` tokens of rows with these tables, all of them in full pages."""
        dim = self.tail_k.shape[-1]
        return CodedView(self.k, self.v, table + self._base, lengths, self.codec, dim, self.page_size)

    @property
    def _base(self) -> jax.Array:
        return jnp.int32(0) if self.base is None else self.base

    def _compress(self, seats: jax.Array, pages: jax.Array) -> CodedKV:
        """The full pages that lie at `seats` i32[W] go to `pages` i32[W] of the pool."""
        k, v = self.tail_k[seats].swapaxes(-1, -2), self.tail_v[seats]
        at = pages + self._base
        return replace(self, k=self.k.put(at, self.codec.encode(k)), v=self.v.put(at, self.codec.encode(v)))

    def _set(self, at: tuple, k: jax.Array, v: jax.Array) -> CodedKV:
        tails = (
            x.at[at].set(y.astype(x.dtype), mode="drop") for x, y in ((self.tail_k, k), (self.tail_v, v))
        )
        return replace(self, **dict(zip(("tail_k", "tail_v"), tails)))

    def _tail(
        self, seat: jax.Array, q: jax.Array, positions: jax.Array, last: jax.Array, spec: AttentionSpec
    ) -> tuple[jax.Array, jax.Array]:
        """q [n,Hq,D] at text positions i32[n] over the page at `seat`, whose text ends with position `last`: (out
        [n,Hq,D], lse f32[n,Hq])."""
        k, v = (x[seat].swapaxes(0, 1).astype(q.dtype) for x in (self.tail_k, self.tail_v))
        places = last - last % self.page_size + jnp.arange(self.page_size, dtype=jnp.int32)
        return dense(q, k, v, positions, jnp.where(places <= last, places, -1), spec)

    def _rows(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec
    ) -> tuple[jax.Array, CodedKV]:
        """The rectangular part, one token a row."""
        B, size = batch.shape.B, self.page_size
        seats, text = live_seats(batch, self.tail_k.shape[0]), batch.positions[:B]
        new = self._set((seats, slice(None), text % size), k, v)
        view = new._view(batch.page_table[:B], text // size * size)
        queries = Queries.of(q[:, None], view, spec, text[:, None])
        far, far_lse = (unpack(x, 1)[:, 0] for x in softmax_rows(queries, min(PAGES_A_STEP, B)))
        tail = jax.vmap(partial(new._tail, spec=spec))
        near, near_lse = (x[:, 0] for x in tail(seats, q[:, None], text[:, None], text))
        out, _ = merge((far, far_lse), (near.astype(jnp.float32), near_lse))
        full = (text % size == size - 1) & (batch.lengths[:B] > 0)
        pages = jnp.where(full, batch.pages[:B], NULL_PAGE)
        new = lax.cond(full.any(), lambda one: one._compress(seats, pages), lambda one: one, new)
        return out.astype(q.dtype), new

    def _prompt(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec
    ) -> tuple[jax.Array, CodedKV]:
        """The prompt part, page by page of each row."""
        B, size, C = batch.shape.B, self.page_size, q.shape[0]
        padded = [jnp.pad(x, ((0, size), (0, 0), (0, 0))) for x in (q, k, v)]

        def block(row, at, positions, carry):
            out, new = carry
            q, k, v = (lax.dynamic_slice_in_dim(x, at, size) for x in padded)
            seat, last, page = batch.seats[B + row], positions.max(), positions[0] // size
            slots = jnp.where(positions < 0, size, positions % size)
            new = new._set((seat, slice(None), slots), k, v)
            view = new._view(batch.page_table[B + row][None], (page * size)[None])
            far, far_lse = (
                unpack(x, size)[0] for x in softmax_row(Queries.of(q[None], view, spec, positions[None]))
            )
            near, near_lse = new._tail(seat, q, positions, last, spec)
            got, _ = merge((far, far_lse), (near.astype(jnp.float32), near_lse))
            own = batch.page_table[B + row, page][None]
            new = lax.cond(
                last % size == size - 1, lambda one: one._compress(seat[None], own), lambda one: one, new
            )
            # What runs over belongs to the next page or row, which is written later, or to the slack.
            return lax.dynamic_update_slice_in_dim(out, got.astype(out.dtype), at, 0), new

        start = jnp.zeros((C + size, *q.shape[1:]), q.dtype), self
        lengths = batch.lengths[B:]
        out, new = each_block(batch.query_starts, lengths, size, block, start, aligned=True)
        return out[:C], new
