"""State of a fixed size by seat: what recurrent layers and compact caches share.

Arrays are [N, ...]: of the N places the first are seats, which rows find by `batch.seats`; the last one is for
padding. Layers that run under one scan share arrays [layers, N, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from ..batch import Batch
from ..ops import AttentionSpec

TOKEN_BLOCK = 64

T = TypeVar("T")


class BySeat:
    """Layers of one scan that share arrays with a leading layer axis. A token is final at once: drafts are not for
    such a state."""

    def layer(self, index: jax.Array) -> Self:
        """One layer of several."""
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), self)

    def put(self, index: jax.Array, new: Self) -> Self:
        """These arrays with `layer(index)` replaced."""
        return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, index, 0), self, new)


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, layers: int | None) -> jax.Array:
    """An empty array of one layer, or of `layers` that share it."""
    return jnp.zeros(shape if layers is None else (layers, *shape), dtype)


def live_seats(batch: Batch, places: int) -> jax.Array:
    """i32[B]: the places of the rectangular rows; idle rows have the padding seat."""
    B = batch.shape.B
    return jnp.where(batch.lengths[:B] > 0, batch.seats[:B], places - 1)


def rectangular(batch: Batch, state: object, spec: AttentionSpec) -> int:
    """B, the number of rectangular rows of one token each. ValueError where rows have drafts, or the mask is another
    than causal (with a window or without)."""
    if batch.shape.B and batch.shape.q != 1:
        raise ValueError(
            f"{type(state).__name__} cannot take a token back, but rows bring {batch.shape.q} tokens: use plain pages "
            f"with drafts"
        )
    if not spec.causal or spec.chunk is not None:
        raise ValueError(f"{type(state).__name__} attends causally, but this layer asks for {spec}")
    return batch.shape.B


def prompt_blocks(
    advance: Callable[[T, Any, jax.Array], tuple[T, jax.Array]], held: T, inputs: Any, batch: Batch,
    zero: T | None = None,
) -> tuple[jax.Array, T]:  # fmt: skip
    """The prompt part of a batch, flat: a loop over its rows, and over the blocks of tokens that each row has.

    advance(carry, inputs [n,...], live bool[n]) -> (carry, out [n,...]) moves one row on; held is a tree of [N,...],
    inputs one of [C,...]. Tokens that are not live come after those that are; they must leave the carry alone, and
    what they output is thrown away. A row that begins in this step begins from `zero` where that is given.
    """
    B, R, C = batch.shape.B, batch.shape.R, batch.shape.C
    step, places = min(TOKEN_BLOCK, C), jax.tree.leaves(held)[0].shape[0]
    # One block of slack, so that a row's last block may run over the end of the chunk.
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, step),) + ((0, 0),) * (x.ndim - 1)), inputs)
    offsets = jnp.arange(step, dtype=jnp.int32)

    def begin(r, held):
        seat = jnp.where(batch.query_starts[r + 1] > batch.query_starts[r], batch.seats[B + r], places - 1)
        carry = jax.tree.map(lambda h: h[seat], held)
        if zero is None:
            return seat, carry
        fresh = batch.starts[B + r] == 0
        return seat, jax.tree.map(lambda n, h: jnp.where(fresh, n, h), zero, carry)

    def row(r, done):
        out, held = done
        start, stop = batch.query_starts[r], batch.query_starts[r + 1]
        seat, carry = begin(r, held)

        def block(b, done):
            out, carry = done
            at = start + b * step
            chunk = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at, step), padded)
            carry, got = advance(carry, chunk, at + offsets < stop)
            # What runs over belongs to the next row, which is written later, or to the slack.
            return lax.dynamic_update_slice_in_dim(out, got, at, 0), carry

        out, carry = lax.fori_loop(0, (stop - start + step - 1) // step, block, (out, carry))
        return out, jax.tree.map(lambda h, c: h.at[seat].set(c), held, carry)

    block = jax.tree.map(lambda x: x[:step], padded)
    shape = jax.eval_shape(lambda: advance(begin(0, held)[1], block, offsets < step)[1])
    empty = jnp.zeros((C + step, *shape.shape[1:]), shape.dtype)
    out, held = lax.fori_loop(0, R, row, (empty, held))
    return out[:C], held
