"""A step's tokens on devices that share the weights, in TokenWeave's order (Gond et al., arXiv 2505.11329).

Where heads and features are split, every mixer ends in a sum over devices, and everyone waits for it, adds it to all
of x and normalises that, as everyone else does. Here each device keeps, adds and normalises its own share of the
tokens: the sum becomes a reduce-scatter behind the mixer and an all-gather in front of the next, of the same bytes
together. And a step runs in two halves, which depend on each other only where the second half's tokens see the first
half's keys, so one of them can compute while the other travels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

if TYPE_CHECKING:
    from .batch import Batch


@dataclass(frozen=True)
class Weave:
    """Where activations [T,E] lie: `apart` between the mixers, each device having some tokens, and `together` in front
    of one, all tokens on each."""

    apart: NamedSharding
    together: NamedSharding

    def scatter(self, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, self.apart)

    def gather(self, x: jax.Array) -> jax.Array:
        # Said of x itself too, or the compiler gathers earlier: between a norm and its weights, say.
        return jax.lax.with_sharding_constraint(self.scatter(x), self.together)


def halves(batch: Batch, weave: Weave) -> tuple[Batch, Batch]:
    """A batch as two that run one behind the other, as two chunks would: its rectangular rows with the first half of
    its prompt part, and the rest. A prompt that lies across the cut has a part in both."""
    shape, starts = batch.shape, batch.query_starts
    rect, cut = shape.B * shape.q, shape.C // 2
    behind = jnp.clip(starts[1:] - cut, 0, starts[1:] - starts[:-1])
    until = batch.lengths.at[shape.B :].add(-behind)
    tokens = ("tokens", "positions", "pages", "slots", "rows", "valid")
    rows = ("page_table", "lengths", "seats", "ends")
    first = {name: getattr(batch, name)[: rect + cut] for name in tokens}
    rest = {name: getattr(batch, name)[rect + cut :] for name in tokens}
    rest |= {name: getattr(batch, name)[shape.B :] for name in rows}
    rest["rows"] = rest["rows"] - shape.B
    if batch.prompt_lengths is not None:
        rest["prompt_lengths"] = batch.prompt_lengths[shape.B :]
    one = replace(
        batch, shape=replace(shape, C=cut), query_starts=jnp.minimum(starts, cut), lengths=until, **first
    )
    two = replace(
        batch, shape=type(shape)(0, 1, shape.R, shape.C - cut), query_starts=jnp.maximum(starts - cut, 0),
        starts=until[shape.B :], ancestors=None, **rest,
    )  # fmt: skip
    # Positions and the like stay whole, or the compiler shares them out with x, and gathers what is made of them.
    one, two = (jax.lax.with_sharding_constraint(half, weave.together) for half in (one, two))
    return replace(one, weave=weave), replace(two, weave=weave)
