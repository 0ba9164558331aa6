"""DEL (Zarch et al. 2025, arXiv 2504.05598): the target's own first layers draft, how many of them decided on the fly.

A draft is made as LayerSkip makes it (Elhoushi et al. 2024, arXiv 2404.16710): the first E of the target's L layers,
its final norm and its head, on the target's own pages. Each verification shows what every exit would have said at every
position, so all exits have an acceptance rate at any time, and each step takes the exit and the length with the most
tokens per loaded layer. A line ends early where its exit is unsure. The pass that verifies runs all layers on all
slots: the layers that drafted are computed again, in a pass that loads them anyway, and a round loads d E + L layers as
in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...attention.batch import Batch
from ..sampling.keys import Purpose
from ..sampling.sampler import Sampler, SamplerState
from .draft import Accepted, Draft, DraftShape, Model, Pass, Rows, Target, Verifier
from .draft_model import line
from .matching import SampleMatching
from .rejection import RejectionSampling

EXITS = 4  # of every model, where none are named: each costs a head at every verification


@dataclass(frozen=True)
class DEL:
    """exits: after how many layers a draft may be made; None: four places spread over the model. tokens: the longest
    draft (the paper's 18; verifying a slot costs time on a CPU). decay: how fast old rounds are forgotten.

    verify: "matching" drafts the most likely tokens and keeps the very tokens of plain decoding; "rejection" draws them
    and accepts more where requests draw, but their tokens then depend on the rounds before (their law does not). Models
    trained for early exits are what this is for; with others it drafts little, or nothing.
    """

    exits: tuple[int, ...] | None = None
    tokens: int = 6
    decay: float = 0.95
    verify: Literal["matching", "rejection"] = "matching"

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0.0 < self.decay <= 1.0:
            raise ValueError(f"tokens={self.tokens} must be at least 1, and decay={self.decay} in (0, 1]")
        if self.exits is not None and (not self.exits or list(self.exits) != sorted(set(self.exits))):
            raise ValueError(f"exits={self.exits} must be different numbers of layers, in ascending order")
        if self.verify not in ("matching", "rejection"):
            raise ValueError(f"verify={self.verify!r} is not known; choose 'matching' or 'rejection'")

    @property
    def shapes(self) -> tuple[DraftShape, ...]:
        return (DraftShape.line(self.tokens),)

    def open(self, target: Target) -> OpenedDEL:
        layers = target.config.num_layers
        spread = {round(layers * part / (EXITS + 1)) for part in range(1, EXITS + 1)}
        exits = tuple(sorted(spread - {0, layers})) if self.exits is None else self.exits
        if not exits or exits[0] < 1 or exits[-1] >= layers:
            raise ValueError(
                f"exits={exits} must lie in 1 to {layers - 1}, since the model has {layers} layers; take others, or "
                "another drafter for a model of one layer"
            )
        verifier = SampleMatching() if self.verify == "matching" else RejectionSampling()
        return OpenedDEL(self, exits, layers, target.capacity.seats, verifier)


class Statistics(NamedTuple):
    """Decayed sums f32[X] over the exits: positions where an exit agreed with the target and where it did not, and how
    sure it was there (the probability of its token)."""

    hits: jax.Array
    misses: jax.Array
    sure_hits: jax.Array
    sure_misses: jax.Array


def plan(seen: Statistics, exits: tuple[int, ...], layers: int, longest: int) -> tuple[jax.Array, ...]:
    """(index of an exit, draft length, threshold) with the most tokens per layer: with acceptance alpha a draft of d
    tokens brings 1 + alpha + .. + alpha^d tokens for d E + L layers (equation 4 of DEL), none brings 1 for L. Before
    anything was seen one token by the first exit."""
    known = seen.hits + seen.misses
    alpha = seen.hits / jnp.maximum(known, 1e-9)
    lengths = jnp.arange(longest + 1)
    tokens = jnp.cumsum(alpha[:, None] ** lengths, 1)
    per_layer = tokens / (layers + lengths * jnp.array(exits)[:, None])
    best = jnp.argmax(per_layer)
    nothing = known.sum() == 0
    at = jnp.where(nothing, 0, best // (longest + 1))
    length = jnp.where(nothing, 1, best % (longest + 1))
    both = (seen.hits > 0) & (seen.misses > 0)
    middle = seen.sure_hits / jnp.maximum(seen.hits, 1e-9) + seen.sure_misses / jnp.maximum(seen.misses, 1e-9)
    return at.astype(jnp.int32), length.astype(jnp.int32), jnp.where(both, middle / 2, 0.0)[at]


class Line(NamedTuple):
    """A draft on its way: the step, the last token i32[B], whether a row goes on bool[B], tokens i32[B,L] and probs
    f32[B,L+1,V] (L+1 of width 0 where nothing is drawn), how many tokens count i32[B], and the target's state."""

    step: jax.Array
    token: jax.Array
    going: jax.Array
    tokens: jax.Array
    probs: jax.Array
    count: jax.Array
    held: tuple


class OpenedDEL:
    """params: none. state: `Statistics` of all requests together."""

    history = follows = False

    def __init__(self, settings: DEL, exits: tuple[int, ...], layers: int, seats: int, verifier: Verifier):
        self.settings, self.taps, self.layers = settings, exits, layers
        self.seats, self.verifier, self.params = seats, verifier, {}
        self.state = Statistics(*(jax.device_put(np.zeros(len(exits), np.float32)) for _ in range(4)))

    def follow(self, params: Any, state: Statistics, batch: Batch) -> Statistics:
        return state

    def propose(
        self, params: Any, state: Statistics, rows: Rows, shape: DraftShape, sampler: Sampler,
        seated: SamplerState, model: Model,
    ) -> tuple[Draft, Statistics, tuple]:  # fmt: skip
        at, length, threshold = plan(state, self.taps, self.layers, shape.depth)
        B, V = len(rows.root), sampler.vocab_size
        draws = isinstance(self.verifier, RejectionSampling)
        start = Line(
            jnp.int32(0), rows.root, rows.live, jnp.zeros((B, shape.depth), jnp.int32),
            jnp.zeros((B, shape.slots if draws else 0, V), jnp.float32), jnp.zeros((B,), jnp.int32), model.state,
        )  # fmt: skip

        def draft(exit: int, start: Line) -> Line:
            def go_on(one: Line) -> jax.Array:
                return one.going.any() & (one.step < length)

            more = partial(self._more, exit, draws, threshold, rows, sampler, seated, model)
            return lax.while_loop(go_on, more, start)

        end = lax.switch(at, [partial(draft, exit) for exit in self.taps], start)
        probs = end.probs if draws else None
        return Draft.chain(rows.root, end.tokens, end.count, probs), state, end.held

    def _more(
        self, exit: int, draws: bool, threshold: jax.Array, rows: Rows, sampler: Sampler, seated: SamplerState,
        model: Model, one: Line,
    ) -> Line:  # fmt: skip
        """One token more by the first `exit` layers; a token below the threshold is still part of the draft."""
        decoder, positions = model.decoder, rows.lengths + one.step
        batch = line(rows, one.token[:, None], positions, model.page_size)
        x, held = decoder.run(decoder.embed(batch.tokens, batch), one.held, batch, range(exit))
        logits, probs = decoder.head(decoder.normalise(x)).astype(jnp.float32), one.probs
        token, sure = most_likely(logits)
        if draws:
            z = sampler.process(seated, logits, rows.seats, positions, rows.live)
            token = sampler.choose(seated, z, rows.seats, positions, rows.live, Purpose.DRAFT)
            probs = probs.at[:, one.step].set(sampler.probabilities(seated, z, rows.seats))
        return Line(
            one.step + 1, token, one.going & (sure >= threshold), one.tokens.at[:, one.step].set(token), probs,
            one.count + one.going, held,
        )  # fmt: skip

    def commit(
        self, params: Any, state: Statistics, rows: Rows, draft: Draft, made: Pass, accepted: Accepted
    ) -> Statistics:
        """What every exit says at the positions that were right: the root and what was accepted below it."""
        assert made.decoder is not None and accepted.sampled.count is not None
        decoder, (B, N) = made.decoder, draft.token.shape
        live = rows.live & (rows.seats < self.seats)
        right = (jnp.arange(N) < accepted.sampled.count[:, None]) & live[:, None]
        target = jnp.argmax(made.logits, -1)
        sums = []
        for x in made.hidden:
            logits = decoder.head(decoder.normalise(x.reshape(B * N, -1)))
            token, sure = (one.reshape(B, N) for one in most_likely(logits.astype(jnp.float32)))
            hit, miss = right & (token == target), right & (token != target)
            sums.append(jnp.stack([hit.sum(), miss.sum(), (hit * sure).sum(), (miss * sure).sum()]))
        return Statistics(*(self.settings.decay * jnp.stack(state) + jnp.stack(sums, 1)))


def most_likely(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the most likely token i32[N], its probability f32[N]) of logits f32[N,V]."""
    token = jnp.argmax(logits, -1).astype(jnp.int32)
    return token, jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, -1))
