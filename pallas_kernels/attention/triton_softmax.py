"""What the Triton kernels share: tiles of keys and values through the page table, and the online softmax over them.

Triton's blocks have powers of two as sizes. Head dims that are none (80, 96) are taken in pieces (64+16, 64+32), so
nothing is padded. All indices are arrays or scalars, no slices: the interpreter on CPU takes only these with masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from .spec import NEG_INF, AttentionSpec, PagedView

LOG2E = math.log2(math.e)
# The running maximum before any key: far above NEG_INF, so that 2**(NEG_INF - EMPTY) is 0 without a further mask.
EMPTY = NEG_INF / 2

Pieces = tuple[jax.Array, ...]


def pieces(dim: int) -> tuple[tuple[int, int], ...]:
    """(offset, size) of the powers of two that make up `dim`, a multiple of 16, the largest first."""
    sizes = [1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1]
    return tuple((sum(sizes[:index]), size) for index, size in enumerate(sizes))


def product_dtype(q: Any, pages: Any) -> Any:
    """What is multiplied: codes of one byte become q's dtype, and of others none loses bits."""
    return q if jnp.dtype(pages).itemsize == 1 else jnp.promote_types(q, pages)


def over(a: jax.Array, b: int) -> jax.Array:
    """a // b for a >= 0, without the corrections of signs that `//` compiles to."""
    return lax.div(a, jnp.full_like(a, b))


def rest(a: jax.Array, b: int) -> jax.Array:
    """a % b for a >= 0."""
    return lax.rem(a, jnp.full_like(a, b))


def ceiling(a: jax.Array, b: int) -> jax.Array:
    """The smallest multiple count c with c * b >= a, for a >= 0."""
    return over(a + (b - 1), b)


def count(which: jax.Array) -> jax.Array:
    """How many of bool[...] hold, i32."""
    return jnp.sum(which.astype(jnp.int32), dtype=jnp.int32)


def load(ref: Any, at: tuple[Any, ...], live: jax.Array | None) -> jax.Array:
    """ref[at]; undefined where not `live`."""
    return plgpu.load(ref.at[at], mask=live)


def load_pieces(ref: Any, at: tuple[Any, ...], live: jax.Array | None) -> Pieces:
    """ref[*at, :] in pieces of its last dimension, `at` being scalars and [N,1]; where not `live` [N,1]: undefined."""
    return tuple(load(ref, (*at, column), live) for column in _columns(ref))


def store_pieces(ref: Any, at: tuple[Any, ...], live: jax.Array | None, values: Pieces) -> None:
    """ref[*at, :] = values where `live` [N,1], in pieces as `load_pieces`."""
    for column, value in zip(_columns(ref), values):
        plgpu.store(ref.at[(*at, column)], value.astype(ref.dtype), mask=live)


def _columns(ref: Any) -> list[jax.Array]:
    return [offset + jnp.arange(size, dtype=jnp.int32)[None, :] for offset, size in pieces(ref.shape[-1])]


@dataclass(frozen=True)
class Span:
    """Tiles first..stop of a row's keys, those in clear..unclear being seen by every query; keys outside low..high
    are seen by none and never read. Scalars i32; stops are not included."""

    first: jax.Array
    clear: jax.Array
    unclear: jax.Array
    stop: jax.Array
    low: jax.Array
    high: jax.Array

    @staticmethod
    def of(
        low: jax.Array, high: jax.Array, clear: jax.Array, unclear: jax.Array, keys: int,
        begin: jax.Array | int = 0, end: jax.Array | int = 2**30,
    ) -> Span:  # fmt: skip
        """From key positions low..high that some query sees and clear..unclear that all see, in begin..end (which is
        aligned to tiles of `keys`)."""
        low, high = jnp.maximum(low, begin), jnp.minimum(high, end)
        first = over(low, keys)
        stop = jnp.maximum(ceiling(jnp.maximum(high, 0), keys), first)
        clear_tile = jnp.clip(ceiling(clear, keys), first, stop)
        unclear_tile = jnp.clip(over(jnp.maximum(unclear, 0), keys), clear_tile, stop)
        return Span(first, clear_tile, unclear_tile, stop, low, high)


@dataclass(frozen=True)
class Keys:
    """Keys and values of one row and KV head, in tiles of `size`; lives inside a kernel, `view` holding its refs."""

    view: PagedView
    spec: AttentionSpec
    size: int
    dtype: Any
    row: jax.Array
    head: jax.Array

    def where(self, tile: jax.Array, live: jax.Array | None) -> tuple[Any, jax.Array]:
        """(page, slot) of a tile's keys: slot i32[size]; page a scalar if pages are whole tiles, else i32[size]."""
        offsets = jnp.arange(self.size, dtype=jnp.int32)
        page_size = self.view.page_size
        if page_size % self.size == 0:
            per_page = page_size // self.size
            page = self.view.table[self.row, over(tile, per_page)]
            return page, rest(tile, per_page) * self.size + offsets
        at = tile * self.size + offsets
        page = load(self.view.table, (self.row, over(at, page_size)), live)
        return page, rest(at, page_size)

    def step(
        self,
        q: Pieces,
        span: Span,
        seen: Callable[[jax.Array], jax.Array] | None,
        tile: jax.Array,
        carry: Any,
    ) -> Any:
        """One tile of the online softmax (Milakov and Gimelshein 2018) to the base 2; `seen` None: all see all."""
        outs, top, total = carry
        at = tile * self.size + jnp.arange(self.size, dtype=jnp.int32)
        live = None if seen is None else (at >= span.low) & (at < span.high)
        page, slot = self.where(tile, live)
        column = None if live is None else live[:, None]
        rows = (page if page.ndim == 0 else page[:, None], self.head, slot[:, None])
        k = load_pieces(self.view.k_pages, rows, column)
        parts = [_product(a, b.astype(self.dtype), 1) for a, b in zip(q, k)]
        scores = reduce(jnp.add, parts)
        factor = self.spec.scale * LOG2E if self.spec.softcap is None else self.spec.scale / self.spec.softcap
        if self.view.k_scales is not None:
            scales = load(self.view.k_scales, (page, self.head, slot), live)
            scores = scores * (scales * factor)[None, :]
        else:
            scores = scores * factor
        if self.spec.softcap is not None:
            scores = jnp.tanh(scores) * (self.spec.softcap * LOG2E)
        if seen is not None:
            scores = jnp.where(seen(at[None, :]), scores, NEG_INF)
        new_top = jnp.maximum(top, scores.max(1))
        shrink, weights = jnp.exp2(top - new_top), jnp.exp2(scores - new_top[:, None])
        total = total * shrink + weights.sum(1)
        if self.view.v_scales is not None:
            scales = load(self.view.v_scales, (page, self.head, slot), live)
            weights = weights * (scales if live is None else jnp.where(live, scales, 0.0))[None, :]
        v = [piece.astype(self.dtype) for piece in load_pieces(self.view.v_pages, rows, column)]
        if column is not None:
            v = [jnp.where(column, piece, jnp.zeros((), self.dtype)) for piece in v]
        weights = weights.astype(self.dtype)
        outs = tuple(out * shrink[:, None] + _product(weights, piece, 0) for out, piece in zip(outs, v))
        return outs, new_top, total

    def attend(
        self, q: Pieces, span: Span, seen: Callable[[jax.Array], jax.Array]
    ) -> tuple[Pieces, jax.Array]:
        """Queries [N,D] in pieces over the tiles of `span`: out f32 in pieces, and lse f32[N] (natural).

        `seen` gives bool[N,K] for key positions i32[1,K]; only tiles that not all see are masked. Tiles are taken in
        ascending order and lie at multiples of their size, so a query's bits do not depend on what shares its block.
        """
        q, queries = tuple(piece.astype(self.dtype) for piece in q), q[0].shape[0]
        zeros = jnp.zeros((queries,), jnp.float32)
        carry = (
            tuple(jnp.zeros(piece.shape, jnp.float32) for piece in q),
            zeros + EMPTY,
            zeros,
        )
        edge, inside = partial(self.step, q, span, seen), partial(self.step, q, span, None)
        if self.spec.window is not None:
            carry = lax.fori_loop(span.first, span.clear, edge, carry)
        carry = lax.fori_loop(span.clear, span.unclear, inside, carry)
        outs, top, total = lax.fori_loop(span.unclear, span.stop, edge, carry)
        lse = jnp.where(total > 0, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)
        whole = jnp.where(total > 0, total, 1.0)[:, None]
        return tuple(out / whole for out in outs), lse


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a [M,K] times b, summed over b's `axis`, in float32; float32 inputs keep all their bits (no TF32)."""
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
