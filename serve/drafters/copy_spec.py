"""CopySpec (Dumitru et al. 2025, arXiv 2502.08923): copy what followed the last time that the text said this.

Where the last `match` tokens of a text stand in it before, the `copy` tokens behind that place are the draft. The
paper's hash table from windows to positions is, on a device, one comparison of the whole text with its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ...attention.batch import Batch
from ..sampling.sampler import Sampler, SamplerState
from .draft import Accepted, Draft, Drafter, DraftShape, Model, Opened, Pass, Rows, Target, Verifier
from .history import History
from .matching import SampleMatching


def find(tokens: jax.Array, count: jax.Array, match: int, latest: bool = False) -> jax.Array:
    """i32[B]: where the text behind the first (or `latest`) earlier occurrence of the last `match` tokens begins, in
    tokens i32[B,S] of count i32[B]; 0 where there is none."""
    B, S = tokens.shape
    starts = jnp.arange(S, dtype=jnp.int32)
    same = jnp.broadcast_to(starts + match < count[:, None], (B, S)) & (count[:, None] > match)
    for offset in range(match):
        end = jnp.take_along_axis(tokens, jnp.maximum(count - match + offset, 0)[:, None], 1)
        same &= jnp.roll(tokens, -offset, 1) == end
    first = jnp.where(same, starts, -1).max(1) if latest else jnp.where(same, starts, S).min(1)
    return jnp.where(same.any(1), first + match, 0)


@dataclass(frozen=True)
class CopySpec:
    """Drafts for texts that repeat themselves: edits, corrections, summaries.

    match: tokens that must agree (the paper's gamma); copy: tokens drafted; latest: take the last occurrence, not the
    first; fallback: who drafts for rows without a match (the paper's combination with a draft model).
    """

    match: int = 3
    copy: int = 10
    latest: bool = False
    fallback: Drafter | None = None

    def __post_init__(self) -> None:
        if self.match < 1 or self.copy < 1:
            raise ValueError(f"match={self.match} and copy={self.copy} must both be at least 1")
        if self.fallback is not None and not all(shape.chain for shape in self.fallback.shapes):
            raise ValueError(
                f"fallback={self.fallback!r} drafts trees, CopySpec chains; give a drafter of chains"
            )

    @property
    def shapes(self) -> tuple[DraftShape, ...]:
        longest = max((shape.depth for shape in self.fallback.shapes), default=0) if self.fallback else 0
        return (DraftShape.line(max(self.copy, longest)),)

    def open(self, target: Target) -> OpenedCopySpec:
        return OpenedCopySpec(self, self.fallback.open(target) if self.fallback else None)


class OpenedCopySpec:
    """CopySpec with its fallback, whose params and state are its own."""

    history = True

    def __init__(self, settings: CopySpec, fallback: Opened | None):
        self.settings, self.fallback = settings, fallback
        self.params, self.state = (fallback.params, fallback.state) if fallback else ({}, {})
        self.taps = fallback.taps if fallback else ()
        self.verifier: Verifier = fallback.verifier if fallback else SampleMatching()

    @property
    def follows(self) -> bool:
        return self.fallback is not None and self.fallback.follows

    def follow(self, params: Any, state: Any, batch: Batch) -> Any:
        return state if self.fallback is None else self.fallback.follow(params, state, batch)

    def propose(
        self, params: Any, state: Any, rows: Rows, shape: DraftShape, sampler: Sampler, seated: SamplerState,
        model: Model,
    ) -> tuple[Draft, Any, tuple]:  # fmt: skip
        settings, held = self.settings, model.state
        texts = History.of(sampler, seated)
        tokens, count = texts["tokens"][rows.seats], texts["count"][rows.seats]
        begin = find(tokens, count, settings.match, settings.latest)
        offsets = jnp.arange(shape.depth, dtype=jnp.int32)
        at = jnp.minimum(begin[:, None] + offsets, tokens.shape[1] - 1)
        copied = jnp.take_along_axis(tokens, at, 1)
        length = jnp.where(begin > 0, jnp.minimum(count - begin, settings.copy), 0)
        draft = Draft.chain(rows.root, copied, length)
        if self.fallback is None or self.settings.fallback is None:
            return draft, state, held
        inner = max(self.settings.fallback.shapes)
        other, state, held = self.fallback.propose(params, state, rows, inner, sampler, seated, model)
        return _either(length > 0, draft, _widen(other, shape.slots)), state, held

    def commit(
        self, params: Any, state: Any, rows: Rows, draft: Draft, made: Pass, accepted: Accepted
    ) -> Any:
        if self.fallback is None:
            return state
        return self.fallback.commit(params, state, rows, draft, made, accepted)


def _widen(draft: Draft, slots: int) -> Draft:
    """The same chain with slots that are not valid behind it."""
    more = slots - draft.token.shape[1]
    tokens = jnp.pad(draft.token[:, 1:], ((0, 0), (0, more)))
    probs = None if draft.probs is None else jnp.pad(draft.probs, ((0, 0), (0, more), (0, 0)))
    return Draft.chain(draft.token[:, 0], tokens, draft.valid.sum(1) - 1, probs)


def _either(first: jax.Array, a: Draft, b: Draft) -> Draft:
    """Rows of a where `first` bool[B], else of b; a copied token was drawn from nothing: its distribution is itself."""
    probs = b.probs
    if probs is not None:
        certain = jax.nn.one_hot(jnp.roll(a.token, -1, 1), probs.shape[2], dtype=probs.dtype)
        probs = jnp.where(first[:, None, None], certain, probs)
    token, valid = (jnp.where(first[:, None], x, y) for x, y in ((a.token, b.token), (a.valid, b.valid)))
    return Draft(token, a.parent, a.depth, valid, probs)
