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

from .spec import NEG_INF, AttentionSpec, PagedView, multiplied

LOG2E = math.log2(math.e)

Pieces = tuple[jax.Array, ...]


def pieces(dim: int) -> tuple[tuple[int, int], ...]:
    """(offset, size) of the powers of two that make up `dim`, a multiple of 16, the largest first."""
    sizes = [1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1]
    return tuple((sum(sizes[:index]), size) for index, size in enumerate(sizes))


@dataclass(frozen=True)
class Product:
    """What is multiplied (`multiplied`), and how.

    float32 goes through tensor cores in three TF32 products of high and low halves, whose error is a float32 product's
    (one TF32 product's is 2**-11, and products without tensor cores spill thousands of registers). The interpreter
    multiplies in float32.
    """

    dtype: Any
    precision: lax.Precision | lax.DotAlgorithmPreset

    @staticmethod
    def of(q: Any, pages: Any, interpret: bool) -> Product:
        dtype = multiplied(q, pages)
        thrice = dtype == jnp.float32 and not interpret
        return Product(dtype, lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if thrice else lax.Precision.HIGHEST)

    def __call__(self, a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
        """a [M,K] times b, summed over b's `axis`, in float32."""
        dims = (((1,), (axis,)), ((), ()))
        a, b = a.astype(self.dtype), b.astype(self.dtype)
        return lax.dot_general(a, b, dims, precision=self.precision, preferred_element_type=jnp.float32)


def over(a: jax.Array, b: int) -> jax.Array:
    """a // b for a >= 0, without the corrections of signs that `//` compiles to."""
    return lax.div(a, jnp.full_like(a, b))


def rest(a: jax.Array, b: int) -> jax.Array:
    """a % b for a >= 0."""
    return lax.rem(a, jnp.full_like(a, b))


def ceiling(a: jax.Array, b: int) -> jax.Array:
    """The smallest multiple count c with c * b >= a, for a >= 0."""
    return over(a + (b - 1), b)


def total(numbers: jax.Array) -> jax.Array:
    """The sum of i32[...], or how many of bool[...] hold; i32."""
    return jnp.sum(numbers.astype(jnp.int32), dtype=jnp.int32)


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
    product: Product
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

    def scores(self, q: Pieces, at: tuple[Any, jax.Array], live: jax.Array | None) -> tuple[jax.Array, float]:
        """(scores [N,size], factor): scores times `factor` are scaled, capped, and to the base 2; `at` (page, slot)."""
        k = load_pieces(self.view.k_pages, self._rows(at), None if live is None else live[:, None])
        scores = reduce(jnp.add, [self.product(a, b, 1) for a, b in zip(q, k)])
        if self.view.k_scales is not None:
            scores = scores * load(self.view.k_scales, (at[0], self.head, at[1]), live)[None, :]
        if self.spec.softcap is None:
            return scores, self.spec.scale * LOG2E
        return jnp.tanh(scores * (self.spec.scale / self.spec.softcap)), self.spec.softcap * LOG2E

    def weighted(self, weights: jax.Array, at: tuple[Any, jax.Array], live: jax.Array | None) -> Pieces:
        """The values of a tile, summed with weights [N,size]; keys that are not `live` may hold anything."""
        if self.view.v_scales is not None:
            scales = load(self.view.v_scales, (at[0], self.head, at[1]), live)
            weights = weights * (scales if live is None else jnp.where(live, scales, 0.0))[None, :]
        column = None if live is None else live[:, None]
        v = load_pieces(self.view.v_pages, self._rows(at), column)
        if column is not None:
            nothing = jnp.zeros((), self.product.dtype)
            v = tuple(jnp.where(column, piece.astype(self.product.dtype), nothing) for piece in v)
        return tuple(self.product(weights, piece, 0) for piece in v)

    def _rows(self, at: tuple[Any, jax.Array]) -> tuple[Any, ...]:
        page, slot = at
        return (page if page.ndim == 0 else page[:, None], self.head, slot[:, None])

    def step(
        self,
        q: Pieces,
        span: Span,
        seen: Callable[[jax.Array], jax.Array] | None,
        tile: jax.Array,
        carry: tuple[Pieces, jax.Array, jax.Array],
    ) -> tuple[Pieces, jax.Array, jax.Array]:
        """One tile of the online softmax (Milakov and Gimelshein 2018) to the base 2; `seen` None: all see all.

        The mask comes before the factor: the factor and the subtraction of the maximum are then one operation, and the
        same one, masked or not.
        """
        outs, top, weight = carry
        keys = tile * self.size + jnp.arange(self.size, dtype=jnp.int32)
        live = None if seen is None else (keys >= span.low) & (keys < span.high)
        at = self.where(tile, live)
        scores, factor = self.scores(q, at, live)
        if seen is not None:
            scores = jnp.where(seen(keys[None, :]), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(1) * factor)
        shrink, weights = jnp.exp2(top - new_top), jnp.exp2(scores * factor - new_top[:, None])
        added = self.weighted(weights, at, live)
        outs = tuple(out * shrink[:, None] + new for out, new in zip(outs, added))
        return outs, new_top, weight * shrink + weights.sum(1)

    def attend(
        self, q: Pieces, span: Span, seen: Callable[[jax.Array], jax.Array]
    ) -> tuple[Pieces, jax.Array]:
        """Queries [N,D] in pieces over the tiles of `span`: out f32 in pieces, and lse f32[N] (natural).

        `seen` gives bool[N,K] for key positions i32[1,K]; only tiles that not all see are masked. Tiles are taken in
        ascending order and lie at multiples of their size, and one of which a query sees nothing changes nothing for
        it: what is computed for a query does not depend on what shares its block.
        """
        q = tuple(piece.astype(self.product.dtype) for piece in q)
        zeros = jnp.zeros(q[0].shape[:1], jnp.float32)
        carry = (
            tuple(jnp.zeros(piece.shape, jnp.float32) for piece in q),
            zeros + NEG_INF,
            zeros,
        )
        edge, inside = partial(self.step, q, span, seen), partial(self.step, q, span, None)
        if self.spec.window is not None:
            carry = lax.fori_loop(span.first, span.clear, edge, carry)
        carry = lax.fori_loop(span.clear, span.unclear, inside, carry)
        outs, top, weight = lax.fori_loop(span.unclear, span.stop, edge, carry)
        lse = jnp.where(weight > 0, top * (1 / LOG2E) + jnp.log(weight), -jnp.inf)
        whole = jnp.where(weight > 0, weight, 1.0)[:, None]
        return tuple(out / whole for out in outs), lse
