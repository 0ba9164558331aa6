"""Logits processors: the door, and penalties, token masks, biases and temperature.

A processor is a frozen dataclass (settings only, hashable) with pure methods. Its state is a dict of arrays with
leading axis seats + 1; a request's numbers stand at its seat, and the last seat is padding. `row` makes those
numbers on the host, in arrays of fixed shape; `admit` writes all of them, so nothing of a seat's former occupant
is left. The sampler runs processors in the order of `stage`, and skips one that no live row asks for.

Laws: a row with neutral parameters is unchanged, to the bit; a row does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .params import GREEDY_BELOW, MAX_BAD_WORDS, MAX_BIASES, MAX_STOP_TOKENS, SamplingParams

State = dict[str, jax.Array]
Row = dict[str, np.ndarray]

SEEN_IN_PROMPT = -(2**31)  # the sign bit of a history entry; the other bits count the output's tokens
NO_TOKEN = -1


class Stage(IntEnum):
    """Where in the chain a processor stands."""

    PENALTY = 0
    MASK = 1
    SHIFT = 2
    CONTRAST = 3
    TEMPERATURE = 4
    TRUNCATE = 5


@dataclass(frozen=True)
class Known:
    """What the host knows of a request when it gets a seat.

    prompt_ids, output_ids  its tokens; output_ids is not empty when a preempted request resumes
    eos_ids                 the model's end-of-text tokens
    bad_word_ids            token sequences that may not be generated
    """

    prompt_ids: np.ndarray
    output_ids: np.ndarray
    eos_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()


@partial(jax.tree_util.register_dataclass, data_fields=["positions", "generated", "live"], meta_fields=[])
@dataclass(frozen=True)
class Context:
    """Of each row: the absolute position i32[N] of the token being sampled, the number of tokens generated
    before it i32[N], and whether the row is live bool[N]."""

    positions: jax.Array
    generated: jax.Array
    live: jax.Array


class Processor(Protocol):
    """The door. `wanted` says which rows `apply` may change: where none is live, `apply` is skipped. `update` sees
    the sampled tokens i32[N] and the logits [N,V] as they left the last processor.

    carried: names of state entries f32[S+1] that a request's tokens do not determine. The host reads them with its
    tokens and gives them back, in place of what `row` said, when the request resumes.
    """

    @property
    def stage(self) -> Stage: ...

    @property
    def carried(self) -> tuple[str, ...]: ...

    def init(self, seats: int, vocab: int) -> State: ...

    def row(self, params: SamplingParams, known: Known, vocab: int) -> Row: ...

    def admit(self, state: State, seat: jax.Array, row: Row) -> State: ...

    def wanted(self, state: State, seats: jax.Array, ctx: Context) -> jax.Array: ...

    def apply(self, state: State, seats: jax.Array, logits: jax.Array, ctx: Context) -> jax.Array: ...

    def update(
        self, state: State, seats: jax.Array, tokens: jax.Array, keep: jax.Array, logits: jax.Array
    ) -> State: ...


def place(state: State, seat: jax.Array, row: Row) -> State:
    """Write a request's row at its seat; both dicts have the same names."""
    return {name: array.at[seat].set(row[name]) for name, array in state.items()}


@dataclass(frozen=True)
class Penalties:
    """Repetition penalty over prompt and output (Keskar et al. 2019, arXiv 1909.05858, as in transformers:
    positive logits are divided by it, negative ones multiplied), then frequency and presence penalties over
    the output (OpenAI: z - frequency * count - presence * [count > 0]).

    history i32[S+1,V] counts the output's tokens; its sign bit marks the prompt's.
    """

    stage: Stage = Stage.PENALTY
    carried: tuple[str, ...] = ()

    def init(self, seats: int, vocab: int) -> State:
        return {
            "history": jnp.zeros((seats + 1, vocab), jnp.int32),
            "strength": jnp.zeros((seats + 1, 3), jnp.float32).at[:, 0].set(1.0),
        }

    def row(self, params: SamplingParams, known: Known, vocab: int) -> Row:
        strength = np.array(
            [params.repetition_penalty, params.presence_penalty, params.frequency_penalty], np.float32
        )
        history = np.zeros(vocab, np.int32)
        if (strength != (1, 0, 0)).any():
            history += np.bincount(known.output_ids, minlength=vocab).astype(np.int32)
            history[known.prompt_ids] |= np.int32(SEEN_IN_PROMPT)
        return {"history": history, "strength": strength}

    def admit(self, state: State, seat: jax.Array, row: Row) -> State:
        return place(state, seat, row)

    def wanted(self, state: State, seats: jax.Array, ctx: Context) -> jax.Array:
        return (state["strength"][seats] != jnp.array([1.0, 0.0, 0.0], jnp.float32)).any(-1)

    def apply(self, state: State, seats: jax.Array, logits: jax.Array, ctx: Context) -> jax.Array:
        history = state["history"][seats]
        repetition, presence, frequency = (state["strength"][seats, i][:, None] for i in range(3))
        counts = history & ~SEEN_IN_PROMPT
        scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
        penalised = jnp.where((history != 0) & (repetition != 1.0), scaled, logits)
        shift = frequency * counts.astype(jnp.float32) + presence * (counts > 0)
        return jnp.where(shift != 0, penalised - shift, penalised)

    def update(
        self, state: State, seats: jax.Array, tokens: jax.Array, keep: jax.Array, logits: jax.Array
    ) -> State:
        history = state["history"].at[seats, tokens].add(keep.astype(jnp.int32))
        return {**state, "history": history}


@dataclass(frozen=True)
class TokenMask:
    """Bans tokens: outside `allowed_token_ids`, ends of `bad_words`, and stops before `min_tokens`.

    A bad word of one token is never sampled; of a longer one the last token is banned where the output ends in
    the tokens before it. Bans that would leave nothing yield: the allowed list always wins over bad words
    that arise on the way. At most `words` bad words of 2 to `length` tokens, and `stops` stop tokens.
    """

    words: int = 2 * MAX_BAD_WORDS
    length: int = 16
    stops: int = MAX_STOP_TOKENS + 16
    stage: Stage = Stage.MASK
    carried: tuple[str, ...] = ()

    def init(self, seats: int, vocab: int) -> State:
        S, W, L = seats + 1, self.words, self.length
        return {
            "allowed": jnp.full((S, -(-vocab // 32)), 0xFFFFFFFF, jnp.uint32),
            "restricted": jnp.zeros((S,), bool),
            "words": jnp.full((S, W, L), NO_TOKEN, jnp.int32),
            "word_lengths": jnp.zeros((S, W), jnp.int32),
            "recent": jnp.full((S, L - 1), NO_TOKEN, jnp.int32),
            "stops": jnp.full((S, self.stops), NO_TOKEN, jnp.int32),
            "min_tokens": jnp.zeros((S,), jnp.int32),
        }

    def row(self, params: SamplingParams, known: Known, vocab: int) -> Row:
        single = [word[0] for word in known.bad_word_ids if len(word) == 1]
        allowed = allowed_bits(params.allowed_token_ids, single, vocab)
        words, lengths = self._pack_words(known.bad_word_ids)
        stop_ids = sorted({*known.eos_ids, *(params.stop_token_ids or ())}) if params.min_tokens else []
        if len(stop_ids) > self.stops:
            raise ValueError(
                f"min_tokens={params.min_tokens} bans {len(stop_ids)} stop and end-of-text tokens and the limit "
                f"is {self.stops}; give fewer stop_token_ids, or TokenMask(stops={len(stop_ids)})"
            )
        if stop_ids and not np.delete(allowed, stop_ids).any():
            raise ValueError(
                f"min_tokens={params.min_tokens} bans every token that allowed_token_ids and bad_words leave; "
                "allow a token that does not end the text, or use min_tokens=0"
            )
        stops = np.full(self.stops, NO_TOKEN, np.int32)
        stops[: len(stop_ids)] = stop_ids
        recent = np.full(self.length - 1, NO_TOKEN, np.int32)
        tail = known.output_ids[-(self.length - 1) :]
        if len(tail):
            recent[-len(tail) :] = tail
        return {
            "allowed": pack_bits(allowed),
            "restricted": np.array(not allowed.all()),
            "words": words,
            "word_lengths": lengths,
            "recent": recent,
            "stops": stops,
            "min_tokens": np.array(params.min_tokens if stop_ids else 0, np.int32),
        }

    def _pack_words(self, bad_words: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Bad words of two and more tokens, right-aligned: [W,L] ids and [W] lengths, 0 for unused."""
        words = np.full((self.words, self.length), NO_TOKEN, np.int32)
        lengths = np.zeros(self.words, np.int32)
        several = [word for word in bad_words if len(word) > 1]
        if len(several) > self.words:
            raise ValueError(
                f"bad_words has {len(several)} sequences of several tokens and the limit is {self.words}; "
                f"give fewer, or TokenMask(words={len(several)})"
            )
        for i, word in enumerate(several):
            if len(word) > self.length:
                raise ValueError(
                    f"a bad word has {len(word)} tokens and the limit is {self.length}; shorten it, "
                    f"or TokenMask(length={len(word)})"
                )
            words[i, -len(word) :] = word
            lengths[i] = len(word)
        return words, lengths

    def admit(self, state: State, seat: jax.Array, row: Row) -> State:
        return place(state, seat, row)

    def wanted(self, state: State, seats: jax.Array, ctx: Context) -> jax.Array:
        early = ctx.generated < state["min_tokens"][seats]
        return state["restricted"][seats] | early | (state["word_lengths"][seats, 0] > 0)

    def apply(self, state: State, seats: jax.Array, logits: jax.Array, ctx: Context) -> jax.Array:
        allowed = jnp.where(unpack_bits(state["allowed"][seats], logits.shape[1]), logits, -jnp.inf)
        early = ctx.generated < state["min_tokens"][seats]
        stops = jnp.where(early[:, None], state["stops"][seats], NO_TOKEN)
        lengths, words = state["word_lengths"][seats], state["words"][seats]
        column = jnp.arange(self.length - 1)
        ignored = column < (self.length - lengths)[:, :, None]
        same = words[:, :, :-1] == state["recent"][seats][:, None, :]
        match = (same | ignored).all(-1) & (lengths > 0)
        ends = jnp.where(match, words[:, :, -1], NO_TOKEN)
        stopped = ban(allowed, stops)
        banned = ban(stopped, ends)
        nothing = (banned == -jnp.inf).all(-1, keepdims=True)
        return jnp.where(nothing, stopped, banned)

    def update(
        self, state: State, seats: jax.Array, tokens: jax.Array, keep: jax.Array, logits: jax.Array
    ) -> State:
        recent = state["recent"][seats]
        shifted = jnp.concatenate([recent[:, 1:], tokens[:, None]], axis=1)
        recent = jnp.where(keep[:, None], shifted, recent)
        return {**state, "recent": state["recent"].at[seats].set(recent)}


@dataclass(frozen=True)
class LogitBias:
    """Adds a number to the logits of chosen tokens: at most `entries` of them a row."""

    entries: int = MAX_BIASES
    stage: Stage = Stage.SHIFT
    carried: tuple[str, ...] = ()

    def init(self, seats: int, vocab: int) -> State:
        return {
            "ids": jnp.full((seats + 1, self.entries), NO_TOKEN, jnp.int32),
            "values": jnp.zeros((seats + 1, self.entries), jnp.float32),
        }

    def row(self, params: SamplingParams, known: Known, vocab: int) -> Row:
        biases = {token: value for token, value in (params.logit_bias or {}).items() if value}
        if len(biases) > self.entries:
            raise ValueError(
                f"logit_bias has {len(biases)} entries and the limit is {self.entries}; give fewer, "
                f"or LogitBias(entries={len(biases)})"
            )
        ids = np.full(self.entries, NO_TOKEN, np.int32)
        values = np.zeros(self.entries, np.float32)
        ids[: len(biases)] = list(biases.keys())
        values[: len(biases)] = list(biases.values())
        return {"ids": ids, "values": values}

    def admit(self, state: State, seat: jax.Array, row: Row) -> State:
        return place(state, seat, row)

    def wanted(self, state: State, seats: jax.Array, ctx: Context) -> jax.Array:
        return state["ids"][seats, 0] != NO_TOKEN

    def apply(self, state: State, seats: jax.Array, logits: jax.Array, ctx: Context) -> jax.Array:
        rows = jnp.arange(logits.shape[0])[:, None]
        ids = out_of_range(state["ids"][seats], logits.shape[1])
        return logits.at[rows, ids].add(state["values"][seats], mode="drop")

    def update(
        self, state: State, seats: jax.Array, tokens: jax.Array, keep: jax.Array, logits: jax.Array
    ) -> State:
        return state


@dataclass(frozen=True)
class Temperature:
    """Divides by the temperature; greedy rows are left as they are."""

    stage: Stage = Stage.TEMPERATURE
    carried: tuple[str, ...] = ()

    def init(self, seats: int, vocab: int) -> State:
        return {"temperature": jnp.ones((seats + 1,), jnp.float32)}

    def row(self, params: SamplingParams, known: Known, vocab: int) -> Row:
        greedy = params.temperature < GREEDY_BELOW
        return {"temperature": np.array(1.0 if greedy else params.temperature, np.float32)}

    def admit(self, state: State, seat: jax.Array, row: Row) -> State:
        return place(state, seat, row)

    def wanted(self, state: State, seats: jax.Array, ctx: Context) -> jax.Array:
        return state["temperature"][seats] != 1.0

    def apply(self, state: State, seats: jax.Array, logits: jax.Array, ctx: Context) -> jax.Array:
        temperature = state["temperature"][seats][:, None]
        return jnp.where(temperature != 1.0, logits / temperature, logits)

    def update(
        self, state: State, seats: jax.Array, tokens: jax.Array, keep: jax.Array, logits: jax.Array
    ) -> State:
        return state


def allowed_bits(allowed_ids: Sequence[int] | None, banned_ids: Sequence[int], vocab: int) -> np.ndarray:
    """bool[V]: True for tokens that may be sampled."""
    allowed = np.full(vocab, allowed_ids is None)
    allowed[list(allowed_ids or ())] = True
    allowed[list(banned_ids)] = False
    if not allowed.any():
        raise ValueError(
            f"bad_words bans all {vocab if allowed_ids is None else len(allowed_ids)} allowed tokens; "
            "allow others, or drop a bad word"
        )
    return allowed


def pack_bits(bits: np.ndarray) -> np.ndarray:
    """u32[ceil(V/32)] from bool[V]: bit v % 32 of word v // 32; the bits after the last token are 0."""
    padded = np.zeros(-(-len(bits) // 32) * 32, bool)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def unpack_bits(words: jax.Array, vocab: int) -> jax.Array:
    """bool[N,V] from u32[N, ceil(V/32)]."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :vocab] != 0


def out_of_range(ids: jax.Array, vocab: int) -> jax.Array:
    """Unused entries moved past the vocabulary, where scatters drop them (negative indices would wrap)."""
    return jnp.where(ids == NO_TOKEN, vocab, ids)


def ban(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """logits [N,V] with -inf at ids i32[N,K]; NO_TOKEN entries ban nothing."""
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, out_of_range(ids, logits.shape[1])].set(-jnp.inf, mode="drop")
