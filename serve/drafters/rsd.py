"""Recursive Speculative Decoding (Jeon et al. 2024, arXiv 2402.14160): draft trees drawn without replacement.

RSD-C draws a fixed number of children below every node by the Gumbel-top-k trick; RSD-S draws whole lines without
replacement by stochastic beam search (Kool et al. 2019, arXiv 1903.06059), the same number of nodes at each depth.
Siblings are tried in the order drawn, the target's distribution and the draft's both shrinking by what was rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...model.config import ModelConfig
from ..sampling.inverse import pick
from ..sampling.keys import Purpose, gumbels, uniforms
from ..sampling.sampler import Sampler, SamplerState
from .draft import Accepted, Draft, DraftShape, Rows, Target, Verifier
from .drawn_tree import Choices, Level, OpenedTree
from .matching import first_slot, of_slot
from .rejection import reject


@dataclass(frozen=True)
class RSDC:
    """model, seed: the draft model, as `DraftModel` takes it; branching: children of every node, by depth.

    Rows that do not draw get the most likely tokens for children.
    """

    model: str | Path | ModelConfig = "demo-draft"
    branching: tuple[int, ...] = (2, 2, 1)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.branching or min(self.branching) < 1:
            raise ValueError(f"branching={self.branching} must name at least one depth, with 1 or more each")

    @property
    def shapes(self) -> tuple[DraftShape, ...]:
        depth = len(self.branching)
        nodes = sum(prod(self.branching[: level + 1]) for level in range(depth))
        return (DraftShape(nodes + 1, depth, chain=max(self.branching) == 1),)

    def open(self, target: Target) -> OpenedTree:
        return OpenedTree(self.model, self.seed, max(self.branching), Branches(self.branching), target)


@dataclass(frozen=True)
class RSDS:
    """model, seed: the draft model, as `DraftModel` takes it; width: lines that a depth keeps (W); depth: how long.

    Rows that do not draw get plain beam search.
    """

    model: str | Path | ModelConfig = "demo-draft"
    width: int = 4
    depth: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"width={self.width} and depth={self.depth} must both be at least 1")

    @property
    def shapes(self) -> tuple[DraftShape, ...]:
        return (DraftShape(self.width * self.depth + 1, self.depth, chain=self.width == 1),)

    def open(self, target: Target) -> OpenedTree:
        return OpenedTree(self.model, self.seed, self.width, Beam(self.width), target)


def perturbed(choices: Choices) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities, the same with Gumbel noise) f32[B,w,V]. Greedy rows have no noise, and what their logits say
    in place of a distribution that is all on one token; what may not be drawn is -inf."""
    B, w, V = choices.q.shape
    greedy = choices.greedy[:, None, None]
    scores = jnp.where(greedy, jax.nn.log_softmax(choices.z, -1), jnp.log(choices.q))
    scores = jnp.where(choices.valid[:, :, None], scores, -jnp.inf)
    noise = gumbels(choices.keys, w * V).reshape(B, w, V)
    return scores, scores + jnp.where(greedy, 0.0, noise)


@dataclass(frozen=True)
class Branches:
    """The same number of children below every node of a depth, each drawn without replacement (RSD-C)."""

    branching: tuple[int, ...]

    @property
    def verifier(self) -> Verifier:
        return WithoutReplacement(max(self.branching))

    def grow(self, choices: Choices, level: int, memory: None) -> Level:
        (B, w, _), b = choices.q.shape, self.branching[level - 1]
        value, token = lax.top_k(perturbed(choices)[1], b)
        above = jnp.repeat(jnp.arange(w, dtype=jnp.int32), b)
        valid = value > -jnp.inf
        return Level(token.reshape(B, -1), jnp.broadcast_to(above, (B, w * b)), valid.reshape(B, -1))


class Lines(NamedTuple):
    """Of each line of a beam f32[B,w]: its log-probability, and the same perturbed (phi and psi of Kool et al.)."""

    phi: jax.Array
    psi: jax.Array


@dataclass(frozen=True)
class Beam:
    """Stochastic beam search: the `width` lines of a depth are drawn without replacement from all lines (RSD-S)."""

    width: int

    @property
    def verifier(self) -> Verifier:
        return WithoutReplacement(self.width)

    def grow(self, choices: Choices, level: int, memory: Lines | None) -> Level:
        B, W = choices.greedy.shape[0], self.width
        above = Lines(*(jnp.zeros((B, 1)),) * 2) if memory is None else memory
        scores, noisy = perturbed(choices)
        # phi is the same for all children of a line, so each line's best W are enough.
        value, token = lax.top_k(noisy, W)
        phi = above.phi[:, :, None] + jnp.take_along_axis(scores, token, 2)
        perturbation = above.phi[:, :, None] + value
        psi = jnp.where(choices.greedy[:, None, None], phi, conditioned(perturbation, above.psi))
        psi, at = lax.top_k(psi.reshape(B, -1), W)
        token, phi = (jnp.take_along_axis(x.reshape(B, -1), at, 1) for x in (token, phi))
        return Level(token, (at // W).astype(jnp.int32), psi > -jnp.inf, Lines(phi, psi))


def conditioned(g: jax.Array, top: jax.Array) -> jax.Array:
    """f32[B,w,n]: perturbed values g f32[B,w,n], largest first, of the children of lines with the value top f32[B,w],
    given that the largest child has its parent's value (Kool et al., appendix B.3: stable)."""
    top = top[:, :, None]
    v = top - g + jnp.log1p(-jnp.exp(g - g[:, :, :1]))
    psi = top - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    return jnp.where((g > -jnp.inf) & (top > -jnp.inf), psi, -jnp.inf)


class Trial(NamedTuple):
    """What is left before a sibling is tried: slots left bool[B,N], p and q f32[B,V], and taken bool[B,N], the slot
    that was accepted."""

    left: jax.Array
    p: jax.Array
    q: jax.Array
    taken: jax.Array


@dataclass(frozen=True)
class WithoutReplacement:
    """The verifier for trees whose siblings were drawn without replacement from `Draft.probs`, in the order of their
    slots: recursive rejection sampling (section 3 of the paper). siblings: as many as a node has at most."""

    siblings: int

    def accept(
        self, sampler: Sampler, seated: SamplerState, draft: Draft, logits: jax.Array, rows: Rows, depth: int
    ) -> tuple[Accepted, SamplerState]:
        greedy = seated.greedy[rows.seats]

        def judge(seated: SamplerState, positions: jax.Array, p: jax.Array, q: jax.Array, below: jax.Array):
            u = uniforms(sampler.keys(seated, rows.seats, positions, Purpose.ACCEPT), self.siblings)

            def attempt(i: int, trial: Trial) -> Trial:
                return one_sibling(trial, draft.token, greedy, lax.dynamic_index_in_dim(u, i, 1, False))

            end = lax.fori_loop(0, self.siblings, attempt, Trial(below, p, q, jnp.zeros_like(below)))
            return end.taken, end.p

        return reject(judge, sampler, seated, draft, logits, rows, depth)


def one_sibling(trial: Trial, tokens: jax.Array, greedy: jax.Array, u: jax.Array) -> Trial:
    """Try the first slot that is left, tokens i32[B,N] and u f32[B]. A child of a greedy row was not drawn: its
    distribution is itself."""
    left, p, q, taken = trial
    here, wants = first_slot(left), left.any(1)
    slot = left & (jnp.arange(left.shape[1]) == here[:, None])
    x = of_slot(tokens, left)[:, None]
    itself = jnp.arange(p.shape[1]) == x
    q = jnp.where(greedy[:, None], itself.astype(q.dtype), q)
    offered = pick(q, x)
    accepted = wants & (offered > 0) & (u * offered < pick(p, x))
    rejected = (wants & ~accepted)[:, None]
    p = jnp.where(rejected, _normalised(jnp.maximum(p - q, 0.0), p), p)
    q = jnp.where(rejected, _normalised(jnp.where(itself, 0.0, q), jnp.zeros_like(q)), q)
    done = accepted[:, None]
    return Trial(left & ~slot & ~done, p, q, taken | (slot & done))


def _normalised(weights: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Rows of weights [B,V] over their sums; where that is nothing, `otherwise`."""
    total = weights.sum(1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.maximum(total, 1e-38), otherwise)
