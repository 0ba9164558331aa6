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

TOKEN_BLOCK = 64

Carry = tuple[jax.Array, jax.Array]
Advance = Callable[[Carry, jax.Array, jax.Array | None], tuple[Carry, jax.Array]]


@partial(jax.tree_util.register_dataclass, data_fields=["conv", "ssm"], meta_fields=[])
@dataclass(frozen=True)
class RecurrentState:
    """One layer's state: conv [N,width-1,conv_dim], the last inputs of the convolution, oldest first, and
    ssm f32[N,heads,head_dim,state]. Of the N places the first are seats, which rows find by `batch.seats`; then
    come snapshot slots, which only `copy` reads and writes; the last one is for padding."""

    conv: jax.Array
    ssm: jax.Array

    def layer(self, index: jax.Array) -> RecurrentState:
        """One layer of several that share arrays with a leading layer axis."""
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), self)

    def put(self, index: jax.Array, new: RecurrentState) -> RecurrentState:
        """These arrays with `layer(index)` replaced."""
        return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, index, 0), self, new)

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
            out, state = state._prompt(advance, inputs[B * q :], zero, batch)
            parts.append(out)
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], state

    def _rows(
        self, advance: Advance, inputs: jax.Array, zero: Carry, batch: Batch
    ) -> tuple[jax.Array, RecurrentState]:
        """The rectangular part: inputs [B,q,...]. Idle rows move the padding seat."""
        B = batch.shape.B
        seats = jnp.where(batch.lengths[:B] > 0, batch.seats[:B], self.ssm.shape[0] - 1)
        fresh = batch.starts[:B] == 0

        def begin(held, nothing):
            return jnp.where(fresh.reshape(B, *(1,) * nothing.ndim), nothing, held[seats])

        carry = begin(self.conv, zero[0]), begin(self.ssm, zero[1])
        carry, out = jax.vmap(lambda c, x: advance(c, x, None))(carry, inputs)
        conv, ssm = self.conv.at[seats].set(carry[0]), self.ssm.at[seats].set(carry[1])
        return out, RecurrentState(conv, ssm)

    def _prompt(
        self, advance: Advance, inputs: jax.Array, zero: Carry, batch: Batch
    ) -> tuple[jax.Array, RecurrentState]:
        """The prompt part, flat: inputs [C,...]. A loop over rows, and over the blocks that each row has."""
        B, R, C = batch.shape.B, batch.shape.R, batch.shape.C
        step = min(TOKEN_BLOCK, C)
        # One block of slack, so that a row's last block may run over the end of the chunk.
        padded = jnp.pad(inputs, ((0, step),) + ((0, 0),) * (inputs.ndim - 1))
        shape = jax.eval_shape(lambda: advance(zero, padded[:step], None)[1])
        offsets = jnp.arange(step, dtype=jnp.int32)

        def row(r, done):
            out, state = done
            start, stop = batch.query_starts[r], batch.query_starts[r + 1]
            seat = jnp.where(stop > start, batch.seats[B + r], self.ssm.shape[0] - 1)
            fresh = batch.starts[B + r] == 0
            carry = tuple(jnp.where(fresh, n, h[seat]) for n, h in zip(zero, (state.conv, state.ssm)))

            def block(b, done):
                out, carry = done
                at = start + b * step
                chunk = lax.dynamic_slice_in_dim(padded, at, step)
                carry, got = advance(carry, chunk, at + offsets < stop)
                # What runs over belongs to the next row, which is written later, or to the slack.
                return lax.dynamic_update_slice_in_dim(out, got, at, 0), carry

            out, carry = lax.fori_loop(0, (stop - start + step - 1) // step, block, (out, carry))
            return out, RecurrentState(state.conv.at[seat].set(carry[0]), state.ssm.at[seat].set(carry[1]))

        empty = jnp.zeros((C + step, *shape.shape[1:]), shape.dtype)
        out, state = lax.fori_loop(0, R, row, (empty, self))
        return out[:C], state

    def commit(self, accepted: jax.Array) -> RecurrentState:
        """One token a row is final at once; there is no way back, so drafts are not for this state."""
        del accepted
        return self


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

    def commit(self, accepted: jax.Array) -> Stateless:
        del accepted
        return self
