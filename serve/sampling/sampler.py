"""The sampler: logits -> processors -> one token a row, with its log-probabilities, all on the device.

Nothing is sorted, and one uniform number a row is drawn instead of noise as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .cyclic_reflex import CyclicReflex
from .grammar_mask import GrammarMask
from .inverse import draw
from .keys import Purpose, row_keys, seed_words, uniform
from .mirostat import Mirostat
from .params import MAX_LOGPROBS, SamplingParams
from .processors import (
    Context,
    Known,
    LogitBias,
    Penalties,
    Processor,
    State,
    Temperature,
    TokenMask,
)
from .truncation import Truncation

DEFAULT: tuple[Processor, ...] = (
    Penalties(), TokenMask(), LogitBias(), CyclicReflex(), Temperature(), Truncation(), Mirostat(),
)  # fmt: skip


# With a tokenizer there may be grammars too.
CONSTRAINED: tuple[Processor, ...] = tuple(sorted((*DEFAULT, GrammarMask()), key=lambda one: one.stage))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "last_token", "length", "seeds", "sample_index", "prompt_length", "greedy", "asks", "processed", "processors",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclass(frozen=True)
class SamplerState:
    """What outlives a step, by seat; the last of the S + 1 seats is padding.

    last_token     i32[S+1]    the token that each request's next step starts from
    length         i32[S+1]    tokens that each request has, that one included; the next is sampled at this position
    seeds          u32[S+1,2]  64-bit seed, (high, low)
    sample_index   i32[S+1]    which of the request's n samples this is
    prompt_length  i32[S+1]    tokens of the prompt; a position minus it is the number of generated tokens
    greedy         bool[S+1]   take the most likely token
    asks           bool[S+1]   wants log-probabilities
    processed      bool[S+1]   ... of the processed logits
    processors     a state for each processor
    """

    last_token: jax.Array
    length: jax.Array
    seeds: jax.Array
    sample_index: jax.Array
    prompt_length: jax.Array
    greedy: jax.Array
    asks: jax.Array
    processed: jax.Array
    processors: tuple[State, ...]


class Scores(NamedTuple):
    """Log-probabilities of N tokens on the host: logprob f32[N], rank i32[N] (1 = most likely; ties by id),
    top_ids i32[N,K] and top_logprobs f32[N,K], most likely first."""

    logprob: np.ndarray
    rank: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@partial(jax.tree_util.register_dataclass, data_fields=["token", "detail", "carry", "count"], meta_fields=[])
@dataclass(frozen=True)
class Sampled:
    """token i32[N], read every step; detail i32[N,2+2K], read when a request asked for log-probabilities; carry
    f32[N,C], read for requests that cannot resume from their tokens alone (`Processor.carried`).

    Where drafts were verified each of the three has a second axis of T tokens, of which the first count i32[N] are
    emitted; count is None where a row gives one token.

    Where no live row of the step asked, only the token's own log-probability in `detail` is meaningful.
    """

    token: jax.Array
    detail: jax.Array
    carry: jax.Array
    count: jax.Array | None = None

    @property
    def logprob(self) -> jax.Array:
        return jax.lax.bitcast_convert_type(self.detail[:, 0], jnp.float32)

    @property
    def rank(self) -> jax.Array:
        return self.detail[:, 1]

    @property
    def top_ids(self) -> jax.Array:
        return self.detail[:, 2 : 2 + (self.detail.shape[1] - 2) // 2]

    @property
    def top_logprobs(self) -> jax.Array:
        tops = self.detail[:, 2 + (self.detail.shape[1] - 2) // 2 :]
        return jax.lax.bitcast_convert_type(tops, jnp.float32)


def read(detail: np.ndarray) -> Scores:
    """Take apart, on the host, what `score` packed: i32[N,2+2K]."""
    K = (detail.shape[1] - 2) // 2
    floats = np.ascontiguousarray(detail).view(np.float32)
    return Scores(floats[:, 0], detail[:, 1], detail[:, 2 : 2 + K], floats[:, 2 + K :])


class Starter(Protocol):
    """Makes the first arrays of an engine (`serve.compiled.Compiler`)."""

    def start(self, key: Any, function: Callable[[], Any], shardings: Any = None) -> Any:
        """What `function` makes, on its devices, by a program with this name."""
        ...


@dataclass(frozen=True)
class Sampler:
    """Settings of the sampler; all methods are pure. `seats` is S = max_num_seqs; V = `vocab_size`."""

    vocab_size: int
    seats: int
    processors: tuple[Processor, ...] = DEFAULT
    max_logprobs: int = MAX_LOGPROBS

    def __post_init__(self) -> None:
        stages = [processor.stage for processor in self.processors]
        if stages != sorted(stages):
            raise ValueError(
                f"processors stand in the order {[s.name for s in stages]}; put them in the order of their "
                "stages: sorted(processors, key=lambda p: p.stage)"
            )

    def with_processor(self, processor: Processor) -> Sampler:
        """The same sampler with one processor more, at its stage."""
        return replace(
            self, processors=tuple(sorted((*self.processors, processor), key=lambda one: one.stage))
        )

    def init(self) -> SamplerState:
        """A state in which every seat is empty (greedy, nothing asked)."""
        S = self.seats + 1
        return SamplerState(
            last_token=jnp.zeros((S,), jnp.int32),
            length=jnp.zeros((S,), jnp.int32),
            seeds=jnp.zeros((S, 2), jnp.uint32),
            sample_index=jnp.zeros((S,), jnp.int32),
            prompt_length=jnp.zeros((S,), jnp.int32),
            greedy=jnp.ones((S,), bool),
            asks=jnp.zeros((S,), bool),
            processed=jnp.zeros((S,), bool),
            processors=tuple(p.init(self.seats, self.vocab_size) for p in self.processors),
        )

    def start(self, compiler: Starter, sharding: jax.sharding.Sharding | None) -> SamplerState:
        """`init` on its devices."""
        return compiler.start("sampler", self.init, sharding)

    def row(
        self,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int] | np.ndarray,
        output_ids: Sequence[int] | np.ndarray = (),
        eos_ids: Sequence[int] = (),
        seed: int = 0,
        sample_index: int = 0,
        bad_word_ids: Sequence[Sequence[int]] = (),
        carry: Sequence[float] | None = None,
    ) -> dict[str, np.ndarray]:
        """A request's numbers, on the host, for `admit`; names and shapes are the same for all requests.

        seed is 64 bits, sample_index counts the request's n samples, bad_word_ids are `params.bad_words` as
        token sequences, carry is what `Sampled.carry` said after the last of `output_ids` (None: there was none).
        Token ids were checked by `params.validate_for`.
        """
        prompt, output = np.asarray(prompt_ids, np.int32), np.asarray(output_ids, np.int32)
        known = Known(prompt, output, tuple(eos_ids), tuple(map(tuple, bad_word_ids)))
        self._check_known(known)
        last = output[-1] if len(output) else prompt[-1] if len(prompt) else 0
        row = {
            "last_token": np.array(last, np.int32),
            "length": np.array(len(prompt) + len(output), np.int32),
            "seeds": seed_words(seed),
            "sample_index": np.array(sample_index, np.int32),
            "prompt_length": np.array(len(prompt), np.int32),
            "greedy": np.array(params.greedy),
            "asks": np.array(params.logprobs is not None),
            "processed": np.array(params.logprobs is not None and params.logprobs_mode == "processed"),
        }
        for i, processor in enumerate(self.processors):
            for name, value in processor.row(params, known, self.vocab_size).items():
                row[f"{i}.{name}"] = value
        if carry is not None:
            names = [f"{i}.{name}" for i, p in enumerate(self.processors) for name in p.carried]
            row |= {name: np.array(value, np.float32) for name, value in zip(names, carry, strict=True)}
        return row

    def _check_known(self, known: Known) -> None:
        groups = {"prompt": known.prompt_ids, "output": known.output_ids, "eos": known.eos_ids}
        groups |= {f"bad word {i}": word for i, word in enumerate(known.bad_word_ids)}
        for name, ids in groups.items():
            ids = np.asarray(ids, np.int64)
            if name.startswith("bad") and not len(ids):
                raise ValueError(f"{name} has no tokens; drop it")
            if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
                raise ValueError(
                    f"{name} has token ids from {ids.min()} to {ids.max()}, but the sampler's vocabulary has "
                    f"{self.vocab_size} tokens; use the model's own tokenizer"
                )

    def admit(self, state: SamplerState, seat: jax.Array | int, row: dict[str, np.ndarray]) -> SamplerState:
        """Write a row at its seat: everything a former occupant left there is overwritten."""
        own = {name: value for name, value in row.items() if "." not in name}
        placed = {name: getattr(state, name).at[seat].set(value) for name, value in own.items()}
        processors = []
        for i, (processor, held) in enumerate(zip(self.processors, state.processors, strict=True)):
            processors.append(processor.admit(held, jnp.asarray(seat), {k: row[f"{i}.{k}"] for k in held}))
        return replace(state, **placed, processors=tuple(processors))

    @property
    def constrains(self) -> bool:
        """Whether requests may have grammars here."""
        return any(isinstance(processor, GrammarMask) for processor in self.processors)

    def constrain(self, state: SamplerState, seats: jax.Array, masks: jax.Array) -> SamplerState:
        """Write what grammars allow next, masks u32[M, ceil(V/32)], at seats i32[M]."""
        processors = [
            processor.write(held, seats, masks) if isinstance(processor, GrammarMask) else held
            for processor, held in zip(self.processors, state.processors, strict=True)
        ]
        return replace(state, processors=tuple(processors))

    def sample(
        self, state: SamplerState, logits: jax.Array, seats: jax.Array, positions: jax.Array, live: jax.Array
    ) -> tuple[Sampled, SamplerState]:
        """One token a row from logits [N,V], seats i32[N], absolute positions i32[N] of the tokens being
        sampled, and live bool[N]; rows that are not live leave no trace and their results mean nothing."""
        z = self.process(state, logits, seats, positions, live)
        with jax.named_scope("draw"):
            token = self.choose(state, z, seats, positions, live)
        return self.settle(state, logits, z, token, seats, positions, live)

    def process(
        self, state: SamplerState, logits: jax.Array, seats: jax.Array, positions: jax.Array, live: jax.Array
    ) -> jax.Array:
        """The logits f32[N,V] behind all processors; each runs only when a live row wants it."""
        z, ctx, seats = self._given(state, logits, seats, positions, live)
        if not self.processors:
            return z
        wanted = [
            (live & processor.wanted(held, seats, ctx)).any()
            for processor, held in zip(self.processors, state.processors, strict=True)
        ]
        return jax.lax.cond(
            jnp.stack(wanted).any(),
            lambda z: self._process(state, z, seats, ctx, wanted),
            lambda z: z,
            z,
        )

    def choose(
        self, state: SamplerState, z: jax.Array, seats: jax.Array, positions: jax.Array, live: jax.Array,
        purpose: Purpose = Purpose.SAMPLE,
    ) -> jax.Array:  # fmt: skip
        """i32[N]: the most likely token of processed logits z, or one drawn from them, as each row asks."""
        seats = jnp.where(live, seats, self.seats)
        draws = live & ~state.greedy[seats]

        def drawn(best):
            return jnp.where(draws, draw(z, self.uniforms(state, seats, positions, purpose), best), best)

        return jax.lax.cond(draws.any(), drawn, lambda best: best, first_argmax(z))

    def probabilities(self, state: SamplerState, z: jax.Array, seats: jax.Array) -> jax.Array:
        """f32[N,V]: the distribution that `choose` draws from; all on one token where a row is greedy."""
        certain = jax.nn.one_hot(first_argmax(z), z.shape[1], dtype=jnp.float32)
        return jnp.where(state.greedy[seats][:, None], certain, jax.nn.softmax(z, -1))

    def settle(
        self, state: SamplerState, logits: jax.Array, z: jax.Array, token: jax.Array, seats: jax.Array,
        positions: jax.Array, live: jax.Array,
    ) -> tuple[Sampled, SamplerState]:  # fmt: skip
        """What follows from having chosen token i32[N]: its scores, and the state behind it."""
        raw, ctx, seats = self._given(state, logits, seats, positions, live)
        with jax.named_scope("score"):
            detail = self._detail(state, raw, z, token, seats, ctx)
        with jax.named_scope("update"):
            state = self.learn(state, z, token, seats, positions, live)
        return Sampled(token, detail, self.carry(state, seats)), state

    def learn(
        self, state: SamplerState, z: jax.Array, token: jax.Array, seats: jax.Array, positions: jax.Array,
        live: jax.Array,
    ) -> SamplerState:  # fmt: skip
        """The state behind token i32[N], chosen at these positions; seats of rows that are not live are padding."""
        processors = tuple(
            processor.update(held, seats, token, live, z)
            for processor, held in zip(self.processors, state.processors, strict=True)
        )
        last = state.last_token.at[seats].set(jnp.where(live, token, 0))
        length = state.length.at[seats].set(jnp.where(live, positions + 1, 0))
        return replace(state, last_token=last, length=length, processors=processors)

    def _given(self, state, logits, seats, positions, live) -> tuple[jax.Array, Context, jax.Array]:
        """float32 logits, the context of each row, and the padding seat for rows that are not live."""
        seats = jnp.where(live, seats, self.seats)
        context = Context(positions, positions - state.prompt_length[seats], live)
        return logits.astype(jnp.float32), context, seats

    def carry(self, state: SamplerState, seats: jax.Array) -> jax.Array:
        """f32[N,C]: what the requests at these seats must bring along, besides their tokens, to resume."""
        held = [state.processors[i][name][seats] for i, p in enumerate(self.processors) for name in p.carried]
        return jnp.stack(held, 1) if held else jnp.zeros((len(seats), 0), jnp.float32)

    def _process(self, state, logits, seats, ctx, wanted) -> jax.Array:
        """The processors in order, each only when a live row wants it."""
        z = logits
        for processor, held, any_row in zip(self.processors, state.processors, wanted, strict=True):
            with jax.named_scope(type(processor).__name__):
                z = jax.lax.cond(
                    any_row, lambda z, p=processor, h=held: p.apply(h, seats, z, ctx), lambda z: z, z
                )
        return z

    def uniforms(
        self, state: SamplerState, seats: jax.Array, positions: jax.Array, purpose: Purpose
    ) -> jax.Array:
        """f32[N]: the uniform number of each row for the token at its position."""
        return uniform(self.keys(state, seats, positions, purpose))

    def keys(
        self, state: SamplerState, seats: jax.Array, positions: jax.Array, purpose: Purpose
    ) -> jax.Array:
        """keys[N]: the random key of each row for the token at its position."""
        return row_keys(state.seeds[seats], state.sample_index[seats], positions, purpose)

    def _detail(self, state, raw, z, token, seats, ctx) -> jax.Array:
        """The packed log-probabilities of the tokens, from raw or processed logits."""
        K = min(self.max_logprobs, self.vocab_size)
        processed = ctx.live & state.processed[seats]

        def full():
            return score(jnp.where(processed[:, None], z, raw), token, K)

        def own():
            bits = jax.lax.bitcast_convert_type(logprob_of(raw, token), jnp.int32)
            return jnp.zeros((len(token), 2 + 2 * K), jnp.int32).at[:, 0].set(bits)

        return jax.lax.cond((ctx.live & state.asks[seats]).any(), full, own)


def first_argmax(z: jax.Array) -> jax.Array:
    """i32[N]: the lowest id of the largest logit of each row (a maximum and a minimum; XLA's argmax is slower)."""
    V = z.shape[1]
    ids = jnp.arange(V, dtype=jnp.int32)
    best = jnp.where(z == z.max(-1, keepdims=True), ids, V).min(-1)
    return jnp.minimum(best, V - 1)


def logprob_of(z: jax.Array, tokens: jax.Array) -> jax.Array:
    """f32[N]: log softmax(z)[token]."""
    return jnp.take_along_axis(z, tokens[:, None], 1)[:, 0] - jax.nn.logsumexp(z, axis=-1)


def score(z: jax.Array, tokens: jax.Array, K: int) -> jax.Array:
    """i32[N,2+2K] from logits [N,V] and tokens i32[N]: the token's log-probability (bits), its rank, the ids of
    the K most likely tokens and their log-probabilities (bits). `read` takes it apart on the host."""
    total = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    own = jnp.take_along_axis(z, tokens[:, None], 1)
    ids = jnp.arange(z.shape[1], dtype=jnp.int32)
    ahead = (z > own) | ((z == own) & (ids < tokens[:, None]))
    rank = 1 + ahead.sum(-1, keepdims=True, dtype=jnp.int32)
    top, top_ids = jax.lax.top_k(z, K)
    floats = jax.lax.bitcast_convert_type(jnp.concatenate([own, top], 1) - total, jnp.int32)
    return jnp.concatenate([floats[:, :1], rank, top_ids.astype(jnp.int32), floats[:, 1:]], 1)


def prompt_logprobs(logits: jax.Array, targets: jax.Array, K: int) -> jax.Array:
    """Packed log-probabilities of prompt tokens: `score` on logits [N,V] that predict targets i32[N]."""
    return score(logits.astype(jnp.float32), targets, K)
