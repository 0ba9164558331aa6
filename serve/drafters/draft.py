"""Speculation: what passes between drafter, target, verifier and commit.

A drafter guesses how each row goes on, as a tree of tokens under the row's last token (the root, which has no K and V
yet). The target computes all slots of the tree in one pass, the verifier walks down from the root and emits the tokens
that the target agrees with and one more, and what was stored for the others is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ...attention.batch import Batch
from ...attention.caches.policy import Capacity
from ...model.config import ModelConfig
from ...model.decoder import Decoder
from ...model.layers import Numerics
from ..sampling.sampler import Sampled, Sampler, SamplerState, Starter
from ..tokenizer import Tokenizer


@dataclass(frozen=True, order=True)
class DraftShape:
    """The static numbers of a draft: N `slots` a row, the root included, at most `depth` of them below each other; a
    `chain` has slot j below slot j - 1. One program is compiled for each shape and width."""

    slots: int
    depth: int
    chain: bool = True

    @staticmethod
    def line(tokens: int) -> DraftShape:
        return DraftShape(tokens + 1, tokens)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths", "seats", "live", "page_table", "root"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Rows:
    """The rows that speculate: lengths i32[B] (tokens, the root included), seats i32[B], live bool[B], page_table
    i32[B,P] with room for the tree, and root i32[B], the last token of each."""

    lengths: jax.Array
    seats: jax.Array
    live: jax.Array
    page_table: jax.Array
    root: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["token", "parent", "depth", "valid", "probs"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Draft:
    """token, parent, depth i32[B,N] and valid bool[B,N]: slot 0 is the root (parent -1, depth 0), a parent stands
    before its children. `probs` f32[B,N,V]: the distribution from which a slot's children were drawn, as it was
    sampled; None where tokens were not drawn at all, and are matched with the target's own samples."""

    token: jax.Array
    parent: jax.Array
    depth: jax.Array
    valid: jax.Array
    probs: jax.Array | None = None

    @staticmethod
    def chain(root: jax.Array, tokens: jax.Array, count: jax.Array, probs: jax.Array | None = None) -> Draft:
        """One line a row: tokens i32[B,L], of which the first count i32[B] are meant."""
        B, L = tokens.shape
        slots = jnp.broadcast_to(jnp.arange(L + 1, dtype=jnp.int32), (B, L + 1))
        token = jnp.concatenate([root[:, None], tokens], 1)
        return Draft(token, slots - 1, slots, slots <= count[:, None], probs)

    def ancestors(self) -> jax.Array:
        """bool[B,N,N]: whether slot s stands on the way from the root to slot j, itself included; what is not valid
        sees itself only."""
        B, N = self.token.shape
        seen = jnp.zeros((B, N, N), bool).at[:, 0, 0].set(True)
        for slot in range(1, N):
            above = jnp.take_along_axis(seen, jnp.maximum(self.parent[:, slot], 0)[:, None, None], 1)[:, 0]
            own = (above & self.valid[:, slot, None]).at[:, slot].set(True)
            seen = seen.at[:, slot].set(own)
        return seen


@partial(jax.tree_util.register_dataclass, data_fields=["sampled", "path"], meta_fields=[])
@dataclass(frozen=True)
class Accepted:
    """What a verifier emitted: `sampled`, with token i32[B,T] and count i32[B] (the tokens accepted, and one more),
    and path i32[B,T], the slots whose K and V stay, the root first: as many as `count`; what is behind is 0."""

    sampled: Sampled
    path: jax.Array


@dataclass(frozen=True)
class Target:
    """What a drafter must know of the model that it drafts for, before any program exists; texts have at most `length`
    tokens. `compiler` makes the drafter's first arrays."""

    config: ModelConfig
    numerics: Numerics
    tokenizer: Tokenizer | None
    capacity: Capacity
    length: int
    compiler: Starter


@dataclass(frozen=True)
class Model:
    """The target inside a program: its decoder and what it remembers, for drafters that use it."""

    decoder: Decoder
    state: tuple
    page_size: int


@dataclass(frozen=True)
class Pass:
    """The target's pass over all slots of a draft: logits f32[B,N,V], hidden, x [B,N,E] behind each of `Opened.taps`
    layers, and the decoder that made them."""

    logits: jax.Array
    hidden: tuple[jax.Array, ...] = ()
    decoder: Decoder | None = None


class Opened(Protocol):
    """A drafter with its weights, ready to be compiled into programs; its methods are pure.

    params, state: arrays on the device that programs take; the state is donated. A state can be rebuilt from the
    tokens of the texts alone. `history`: it reads the tokens of each seat (`history.History`).
    """

    params: Any
    state: Any

    @property
    def history(self) -> bool: ...

    @property
    def verifier(self) -> Verifier:
        """Who may judge its drafts: the law by which they were drawn decides."""
        ...

    @property
    def taps(self) -> tuple[int, ...]:
        """Behind how many of the target's layers it wants to see x; ascending, fewer than all."""
        ...

    @property
    def follows(self) -> bool:
        """Whether `follow` has anything to do."""
        ...

    def follow(self, params: Any, state: Any, batch: Batch) -> Any:
        """State after a step without drafts: the same batch that the target computes."""
        ...

    def propose(
        self, params: Any, state: Any, rows: Rows, shape: DraftShape, sampler: Sampler, seated: SamplerState,
        model: Model,
    ) -> tuple[Draft, Any, tuple]:  # fmt: skip
        """(draft of this shape, state, the target's state)."""
        ...

    def commit(
        self, params: Any, state: Any, rows: Rows, draft: Draft, made: Pass, accepted: Accepted
    ) -> Any:
        """State after the target's pass and what was accepted of the draft."""
        ...


class Drafter(Protocol):
    """The settings of a drafter, a frozen dataclass that people pass to `LLM(drafter=...)`."""

    @property
    def shapes(self) -> tuple[DraftShape, ...]:
        """What it can draft; a controller picks one of these for a step, or none."""
        ...

    def open(self, target: Target) -> Opened:
        """Load what it needs. ValueError, naming both sides, where it does not suit the target."""
        ...


class Verifier(Protocol):
    """Decides what of a draft is emitted. Pure; `sampler` gives each row's processed distribution."""

    def accept(
        self, sampler: Sampler, seated: SamplerState, draft: Draft, logits: jax.Array, rows: Rows, depth: int
    ) -> tuple[Accepted, SamplerState]: ...
