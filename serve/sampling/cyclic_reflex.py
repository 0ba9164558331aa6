"""CyclicReflex: the logits of reflection tokens ("wait", "but", ...) ride a triangular wave while a model thinks
(Fan et al. 2025, arXiv 2506.11077), so that reflection is promoted and suppressed in turns.

With t generated tokens, period C, amplitude A and shift s, at phase f = ((t + s C) mod C) / C a reflection token's
logit rises by A wave(f), where wave goes 0 -> 1 -> -1 -> 0 at f = 0, 1/4, 3/4, 1. From the end-of-thinking token
on nothing is added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from ..tokenizer import Tokenizer
from .params import MAX_REFLECTION_TOKENS, MAX_THINKING_ENDS, SamplingParams
from .processors import NO_TOKEN, Context, Known, Row, Stage, State, out_of_range, place

WORDS = ("wait", "but", "alternatively")
END_OF_THINKING = "</think>"


@dataclass(frozen=True)
class CyclicReflex:
    """State: amplitude f32[S+1], period i32[S+1], offset f32[S+1] (tokens: s C mod C), ids i32[S+1,R] of the
    reflection tokens, ends i32[S+1,E] of thinking, and done bool[S+1]."""

    stage: Stage = Stage.SHIFT
    carried: tuple[str, ...] = ()

    def init(self, seats: int, vocab: int) -> State:
        S = seats + 1
        return {
            "amplitude": jnp.zeros((S,), jnp.float32),
            "period": jnp.ones((S,), jnp.int32),
            "offset": jnp.zeros((S,), jnp.float32),
            "ids": jnp.full((S, MAX_REFLECTION_TOKENS), NO_TOKEN, jnp.int32),
            "ends": jnp.full((S, MAX_THINKING_ENDS), NO_TOKEN, jnp.int32),
            "done": jnp.zeros((S,), bool),
        }

    def row(self, params: SamplingParams, known: Known, vocab: int) -> Row:
        amplitude, period, ends = params.reflection_amplitude, params.reflection_period, ()
        if amplitude and (params.reflection_token_ids is None or params.thinking_end_token_ids is None):
            raise ValueError(
                f"reflection_amplitude={amplitude} needs reflection_token_ids and thinking_end_token_ids; give "
                "both, or give the engine a tokenizer that has them"
            )
        if amplitude:
            ends = params.thinking_end_token_ids or ()
        return {
            "amplitude": np.array(amplitude, np.float32),
            "period": np.array(period, np.int32),
            "offset": np.array((params.reflection_shift * period) % period, np.float32),
            "ids": _padded((params.reflection_token_ids or ()) if amplitude else (), MAX_REFLECTION_TOKENS),
            "ends": _padded(ends, MAX_THINKING_ENDS),
            "done": np.array(np.isin(known.output_ids, np.array(ends, np.int32)).any()),
        }

    def admit(self, state: State, seat: jax.Array, row: Row) -> State:
        return place(state, seat, row)

    def wanted(self, state: State, seats: jax.Array, ctx: Context) -> jax.Array:
        return (state["ids"][seats, 0] != NO_TOKEN) & ~state["done"][seats]

    def apply(self, state: State, seats: jax.Array, logits: jax.Array, ctx: Context) -> jax.Array:
        phase = cycle(ctx.generated, state["period"][seats], state["offset"][seats])
        shift = state["amplitude"][seats] * wave(phase)
        ids = jnp.where(self.wanted(state, seats, ctx)[:, None], state["ids"][seats], NO_TOKEN)
        rows = jnp.arange(logits.shape[0])[:, None]
        return logits.at[rows, out_of_range(ids, logits.shape[1])].add(shift[:, None], mode="drop")

    def update(
        self, state: State, seats: jax.Array, tokens: jax.Array, keep: jax.Array, logits: jax.Array
    ) -> State:
        ended = keep & (state["ends"][seats] == tokens[:, None]).any(-1)
        return {**state, "done": state["done"].at[seats].max(ended)}


def cycle(t: jax.Array, period: jax.Array, offset: jax.Array) -> jax.Array:
    """f32[N] in [0, 1): the phase of token t i32[N] in its period i32[N], moved by offset f32[N] tokens."""
    place_in_period = (t % period).astype(jnp.float32) + offset
    return (place_in_period % period) / period


def wave(phase: jax.Array) -> jax.Array:
    """The triangle through 0, 1, 0, -1, 0 at phases 0, 1/4, 1/2, 3/4, 1."""
    return jnp.where(phase <= 0.25, 4 * phase, jnp.where(phase <= 0.75, 2 - 4 * phase, 4 * phase - 4))


def reflection_tokens(tokenizer: Tokenizer, words: Iterable[str] = WORDS) -> dict[str, int]:
    """Text -> token id of every single token that writes one of `words`: lower case and capitalised, at a beginning
    and after a space. Forms that take several tokens are left out."""
    found = {}
    for word in words:
        for text in (word.lower(), word.capitalize(), " " + word.lower(), " " + word.capitalize()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == 1:
                found[text] = ids[0]
    return found


def with_reflection_tokens(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """`params` with the token ids that it leaves to the tokenizer; they stand in the output's `sampling_params`.
    ValueError where the tokenizer has none."""
    if not params.reflection_amplitude or tokenizer is None:
        return params
    tokens, ends = params.reflection_token_ids, params.thinking_end_token_ids
    if tokens is None:
        tokens = sorted(set(reflection_tokens(tokenizer).values()))[:MAX_REFLECTION_TOKENS]
    end = tokenizer.token_id(END_OF_THINKING) if ends is None else None
    if not tokens or (ends is None and end is None):
        missing = f"none of {', '.join(WORDS)}" if not tokens else f"no {END_OF_THINKING}"
        raise ValueError(
            f"reflection_amplitude={params.reflection_amplitude} needs tokens to act on, but this tokenizer has "
            f"{missing} as a single token; give reflection_token_ids and thinking_end_token_ids (an empty list: "
            "thinking never ends)"
        )
    return replace(
        params, reflection_token_ids=tokens, thinking_end_token_ids=(end,) if ends is None else ends
    )


def _padded(ids: Iterable[int], size: int) -> np.ndarray:
    out = np.full(size, NO_TOKEN, np.int32)
    given = list(ids)
    out[: len(given)] = given
    return out
