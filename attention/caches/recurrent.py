"""Recurrent state (kind FIXED): a few arrays a sequence, whatever its length, kept by seat.

A recurrent mixer says how one row moves on; `run` applies that to all rows of a batch:

    advance(carry, inputs[n, ...], live bool[n] | None) -> (carry, outputs[n, ...])

`carry` is one row's (conv, ssm). Tokens that are not live come after those that are; they must leave the carry
alone ("decay one, input zero"), and what they output is thrown away. None: all are live. A row that begins in
this step (`batch.starts` 0) begins from `zero`, whatever its seat held before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..batch import Batch
from .seats import BySeat, live_seats, prompt_blocks

Carry = tuple[jax.Array, jax.Array]
Advance = Callable[[Carry, jax.Array, jax.Array | None], tuple[Carry, jax.Array]]


@partial(jax.tree_util.register_dataclass, data_fields=["conv", "ssm"], meta_fields=[])
@dataclass(frozen=True)
class RecurrentState(BySeat):
    """One layer's state: conv [N,width-1,conv_dim], the last inputs of the convolution, oldest first, and
    ssm f32[N,heads,head_dim,state]. Of the N places the first are seats, which rows find by `batch.seats`; then
    come snapshot slots, which only `copy` reads and writes; the last one is for padding."""

    conv: jax.Array
    ssm: jax.Array

    @classmethod
    def create(cls, seats: int, zero: Carry) -> RecurrentState:
        """State for `seats` sequences; `zero` is one row's carry (`Mamba2.zero`)."""
        conv, ssm = (jnp.zeros((seats + 1, *part.shape), part.dtype) for part in zero)
        return cls(conv, ssm)

    def copy(self, source: jax.Array, target: jax.Array) -> RecurrentState:
        """Place `target` becomes what place `source` is, in every layer that these arrays hold."""

        def move(held: jax.Array, dims: int) -> jax.Array:
            axis = held.ndim - 1 - dims
            row = lax.dynamic_index_in_dim(held, source, axis, keepdims=False)
            return lax.dynamic_update_index_in_dim(held, row, target, axis)

        return RecurrentState(move(self.conv, 2), move(self.ssm, 3))

    def run(
        self, advance: Advance, inputs: jax.Array, zero: Carry, batch: Batch
    ) -> tuple[jax.Array, RecurrentState]:
        """inputs [T, ...] of a batch -> outputs [T, ...], and the state after it."""
        B, q, R = batch.shape.B, batch.shape.q, batch.shape.R
        zero = zero[0].astype(self.conv.dtype), zero[1].astype(self.ssm.dtype)
        state, parts = self, []
        if B:
            out, state = state._rows(advance, inputs[: B * q].reshape(B, q, *inputs.shape[1:]), zero, batch)
            parts.append(out.reshape(B * q, *out.shape[2:]))
        if R:
            out, held = prompt_blocks(advance, (state.conv, state.ssm), inputs[B * q :], batch, zero)
            state = RecurrentState(*held)
            parts.append(out)
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], state

    def _rows(
        self, advance: Advance, inputs: jax.Array, zero: Carry, batch: Batch
    ) -> tuple[jax.Array, RecurrentState]:
        """The rectangular part: inputs [B,q,...]. Idle rows move the padding seat."""
        B = batch.shape.B
        seats = live_seats(batch, self.ssm.shape[0])
        fresh = batch.starts[:B] == 0

        def begin(held, nothing):
            return jnp.where(fresh.reshape(B, *(1,) * nothing.ndim), nothing, held[seats])

        carry = begin(self.conv, zero[0]), begin(self.ssm, zero[1])
        carry, out = jax.vmap(lambda c, x: advance(c, x, None))(carry, inputs)
        conv, ssm = self.conv.at[seats].set(carry[0]), self.ssm.at[seats].set(carry[1])
        return out, RecurrentState(conv, ssm)


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclass(frozen=True)
class Stateless:
    """No memory (kind NONE): B fresh rows of q tokens (`attention.batch.rectangle`), for training and scoring."""

    def layer(self, index: jax.Array) -> Stateless:
        del index
        return self

    def put(self, index: jax.Array, new: Stateless) -> Stateless:
        del index
        return new

    def run(
        self, advance: Advance, inputs: jax.Array, zero: Carry, batch: Batch
    ) -> tuple[jax.Array, Stateless]:
        B, q = batch.shape.B, batch.shape.q
        if batch.shape.R:
            raise ValueError(
                f"Stateless reads fresh rows only; this batch has {batch.shape.R} prompt rows: use RecurrentState"
            )
        rows = inputs.reshape(B, q, *inputs.shape[1:])
        out = jax.vmap(lambda x: advance(zero, x, None)[1])(rows)
        return out.reshape(B * q, *out.shape[2:]), self
