"""SpecTr (Sun et al. 2023, arXiv 2310.15141): several independent drafts, selected from by optimal transport.

K lines are drawn independently from the draft model below one root. At each depth the lines that agree with what was
accepted so far offer k' independent candidates of q; k-sequential selection (algorithm 3 of the paper) accepts one of
them with a probability of at least 1 - 1/e of the best possible, and what is emitted has the target's distribution p:

    beta(rho) = sum_x min(q(x), p(x) / rho),  p_acc = 1 - (1 - beta)^k',  rho* solves p_acc = rho beta
    candidate x is accepted with probability min(1, p(x) / (rho* q(x))); where none is, the token is drawn from
    p(x) - min(q(x), p(x) / rho*) p_acc / beta, normalised
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from ...model.config import ModelConfig
from ..sampling.inverse import inverse
from ..sampling.keys import Purpose, uniforms
from ..sampling.sampler import Sampler, SamplerState
from .draft import Accepted, Draft, DraftShape, Rows, Target, Verifier
from .drawn_tree import Choices, Level, OpenedTree
from .rejection import reject

BISECTIONS = 30  # an interval of at most K - 1 halves to below float32's resolution


@dataclass(frozen=True)
class SpecTr:
    """model, seed: the draft model, as `DraftModel` takes it; drafts: K independent lines; tokens: how long each is.

    Rows that do not draw have nothing to draw independently: their lines begin with the draft's K most likely tokens.
    """

    model: str | Path | ModelConfig = "demo-draft"
    drafts: int = 4
    tokens: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.drafts < 1 or self.tokens < 1:
            raise ValueError(f"drafts={self.drafts} and tokens={self.tokens} must both be at least 1")

    @property
    def shapes(self) -> tuple[DraftShape, ...]:
        return (DraftShape(self.drafts * self.tokens + 1, self.tokens, chain=self.drafts == 1),)

    def open(self, target: Target) -> OpenedTree:
        return OpenedTree(self.model, self.seed, self.drafts, Lines(self.drafts), target)


@dataclass(frozen=True)
class Lines:
    """K lines that share the root only, each drawn by itself."""

    count: int

    @property
    def verifier(self) -> Verifier:
        return KSequential()

    def grow(self, choices: Choices, level: int, memory: None) -> Level:
        K, (B, w, V) = self.count, choices.q.shape
        q = jnp.broadcast_to(choices.q, (B, K, V)).reshape(B * K, V)
        token = inverse(q, uniforms(choices.keys, K).reshape(-1))[0].reshape(B, K)
        if level == 1:
            _, best = lax.top_k(choices.z[:, 0], K)
            token = jnp.where(choices.greedy[:, None], best, token)
        above = jnp.arange(K, dtype=jnp.int32) if w == K else jnp.zeros((K,), jnp.int32)
        return Level(token, jnp.broadcast_to(above, (B, K)), jnp.ones((B, K), bool))


@dataclass(frozen=True)
class KSequential:
    """The verifier for trees whose siblings were drawn independently from `Draft.probs`, duplicates included."""

    def accept(
        self, sampler: Sampler, seated: SamplerState, draft: Draft, logits: jax.Array, rows: Rows, depth: int
    ) -> tuple[Accepted, SamplerState]:
        def judge(seated: SamplerState, positions: jax.Array, p: jax.Array, q: jax.Array, below: jax.Array):
            rho, rest = transport(p, q, below.sum(1))
            keys = sampler.keys(seated, rows.seats, positions, Purpose.ACCEPT)
            of_target, of_draft = (jnp.take_along_axis(x, draft.token, 1) for x in (p, q))
            u = uniforms(keys, draft.token.shape[1])
            return below & (u * rho[:, None] * of_draft < of_target), rest

        return reject(judge, sampler, seated, draft, logits, rows, depth)


def transport(p: jax.Array, q: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(rho* f32[B], what is left of p f32[B,V] where no candidate is accepted, not normalised), for count i32[B]
    independent candidates of q f32[B,V]; p itself where there is none."""
    k = jnp.maximum(count, 1).astype(jnp.float32)

    def overlap(rho: jax.Array) -> tuple[jax.Array, jax.Array]:
        least = jnp.minimum(q, p / rho[:, None])
        beta = jnp.minimum(least.sum(1), 1.0)
        return least, beta

    def any_accepted(beta: jax.Array) -> jax.Array:
        return -jnp.expm1(k * jnp.log1p(-beta))

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = (low + high) / 2
        beta = overlap(middle)[1]
        small = any_accepted(beta) > middle * beta
        return jnp.where(small, middle, low), jnp.where(small, high, middle)

    # Any rho from rho* on is valid, so the upper end is taken.
    rho = lax.fori_loop(0, BISECTIONS, halve, (jnp.ones_like(k), k))[1]
    least, beta = overlap(rho)
    share = jnp.where(beta > 0, any_accepted(beta) / jnp.maximum(beta, 1e-30), 0.0)
    rest = jnp.where((count > 0)[:, None], jnp.maximum(p - least * share[:, None], 0.0), p)
    return rho, jnp.where(rest.sum(1, keepdims=True) > 0, rest, p)
