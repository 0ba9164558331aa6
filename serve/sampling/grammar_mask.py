"""The masks of grammars, on the device: tokens that cannot follow are dropped.

The host knows a row's mask only when it has read the row's last token; `structured` computes it while the device
runs the backbone, and `write` puts it at the row's seat before the head runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from .params import SamplingParams
from .processors import Context, Known, Row, Stage, State, place, unpack_bits

ALL = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True)
class GrammarMask:
    """State: mask u32[S+1, ceil(V/32)], bit v % 32 of word v // 32, and constrained bool[S+1].

    It stands behind `TokenMask`. Where that leaves nothing of what the grammar allows, the grammar wins, and what
    it allows is equally likely; so an output is valid whatever else its request bans.
    """

    stage: Stage = Stage.MASK
    carried: tuple[str, ...] = ()

    def init(self, seats: int, vocab: int) -> State:
        return {
            "mask": jnp.full((seats + 1, -(-vocab // 32)), ALL, jnp.uint32),
            "constrained": jnp.zeros((seats + 1,), bool),
        }

    def row(self, params: SamplingParams, known: Known, vocab: int) -> Row:
        return {
            "mask": np.full(-(-vocab // 32), ALL, np.uint32),
            "constrained": np.array(params.structured_outputs is not None),
        }

    def admit(self, state: State, seat: jax.Array, row: Row) -> State:
        return place(state, seat, row)

    def write(self, state: State, seats: jax.Array, masks: jax.Array) -> State:
        """Put masks u32[M, ceil(V/32)] at seats i32[M]."""
        return {**state, "mask": state["mask"].at[seats].set(masks)}

    def wanted(self, state: State, seats: jax.Array, ctx: Context) -> jax.Array:
        return state["constrained"][seats]

    def apply(self, state: State, seats: jax.Array, logits: jax.Array, ctx: Context) -> jax.Array:
        allowed = unpack_bits(state["mask"][seats], logits.shape[1])
        z = jnp.where(allowed, logits, -jnp.inf)
        nothing = (z == -jnp.inf).all(-1, keepdims=True)
        z = jnp.where(nothing & allowed, 0.0, z)
        return jnp.where(state["constrained"][seats][:, None], z, logits)

    def update(
        self, state: State, seats: jax.Array, tokens: jax.Array, keep: jax.Array, logits: jax.Array
    ) -> State:
        return state
