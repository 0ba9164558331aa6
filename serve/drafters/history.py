"""The tokens of each seat on the device, for drafters that look back. A logits processor that changes no logits."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ..sampling.params import SamplingParams
from ..sampling.processors import NO_TOKEN, Context, Known, Row, Stage, State, place
from ..sampling.sampler import Sampler, SamplerState


@dataclass(frozen=True)
class History:
    """State: tokens i32[S+1,size], each seat's text from its first token on, and count i32[S+1]."""

    size: int
    stage: Stage = Stage.TRUNCATE
    carried: tuple[str, ...] = ()

    def init(self, seats: int, vocab: int) -> State:
        del vocab
        tokens = jnp.full((seats + 1, self.size), NO_TOKEN, jnp.int32)
        return {"tokens": tokens, "count": jnp.zeros((seats + 1,), jnp.int32)}

    def row(self, params: SamplingParams, known: Known, vocab: int) -> Row:
        del params, vocab
        text = np.concatenate([known.prompt_ids, known.output_ids])[: self.size]
        tokens = np.full(self.size, NO_TOKEN, np.int32)
        tokens[: len(text)] = text
        return {"tokens": tokens, "count": np.array(len(text), np.int32)}

    def admit(self, state: State, seat: jax.Array, row: Row) -> State:
        return place(state, seat, row)

    def wanted(self, state: State, seats: jax.Array, ctx: Context) -> jax.Array:
        return jnp.zeros(seats.shape, bool)

    def apply(self, state: State, seats: jax.Array, logits: jax.Array, ctx: Context) -> jax.Array:
        return logits

    def update(
        self, state: State, seats: jax.Array, tokens: jax.Array, keep: jax.Array, logits: jax.Array
    ) -> State:
        del logits
        count = state["count"][seats]
        at = jnp.where(keep, count, self.size)
        return {
            "tokens": state["tokens"].at[seats, at].set(tokens, mode="drop"),
            "count": state["count"].at[seats].add(keep.astype(jnp.int32)),
        }

    @staticmethod
    def of(sampler: Sampler, seated: SamplerState) -> State:
        """The history in a sampler's state."""
        return next(
            held for one, held in zip(sampler.processors, seated.processors) if isinstance(one, History)
        )
