"""Which layers a token runs through, by its position: layers as data, in the same programs as the full model.

The layers of a prompt's tokens and of generated tokens may differ. A layer that no token of a step needs is skipped
(`lax.cond`); where some need it, the others pass it by. What a token did not run through has no keys and values
there, so a schedule must never let a later token read such a place: both kinds here see to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class ReservedLayers:
    """Prompt tokens run through all layers, generated ones through `layers` alone: a layer that generated tokens pass
    by holds the prompt, and nobody reads it after the prompt."""

    layers: tuple[int, ...]

    def active(
        self, layer: int | jax.Array, count: int, positions: jax.Array, prompts: jax.Array
    ) -> jax.Array:
        """bool[T]: which tokens run through a layer of `count`; prompts i32[T]: tokens of their prompts."""
        reserved = jnp.zeros((count,), bool).at[jnp.array(self.layers)].set(True)
        return reserved[layer] | (positions < prompts)


@dataclass(frozen=True)
class DecayingDepth:
    """A token at position t runs through the first `warmup` layers and the last n(t) - warmup. n is `largest` in the
    prompt and falls linearly to `smallest` at `horizon`. It never grows with t and the last layers stay, so whatever
    layer runs ran for every token before."""

    warmup: int
    largest: int
    smallest: int
    horizon: int

    def depth(self, positions: jax.Array, prompts: jax.Array) -> jax.Array:
        """n(t) i32[T]."""
        share = jnp.minimum(positions, self.horizon) / self.horizon
        n = jnp.round(self.largest - (self.largest - self.smallest) * share).astype(jnp.int32)
        return jnp.where(positions < prompts, self.largest, jnp.clip(n, self.smallest, self.largest))

    def active(
        self, layer: int | jax.Array, count: int, positions: jax.Array, prompts: jax.Array
    ) -> jax.Array:
        """As `ReservedLayers.active`."""
        first = count - (self.depth(positions, prompts) - self.warmup)
        return (jnp.asarray(layer) < self.warmup) | (layer >= first)


Depth = ReservedLayers | DecayingDepth
