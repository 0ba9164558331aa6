"""Random numbers of a row: a function of (seed, sample index, absolute position, purpose) and nothing else.

So batching, chunking, preemption, migration and resuming never change a sample.
"""

from __future__ import annotations

from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np


class Purpose(IntEnum):
    """What a random number is for; the values are part of the reproducibility contract."""

    SAMPLE = 0
    DRAFT = 1
    ACCEPT = 2


def seed_words(seed: int) -> np.ndarray:
    """u32[2]: a 64-bit seed as (high, low), the two words of a Threefry key."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} must lie in 0 to 2**64 - 1; take it modulo 2**64")
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def row_keys(seeds: jax.Array, sample_index: jax.Array, positions: jax.Array, purpose: Purpose) -> jax.Array:
    """keys[N] from seeds u32[N,2], sample_index i32[N] and absolute positions i32[N]."""

    def key(words, index, position):
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, index), position), int(purpose))

    return jax.vmap(key)(seeds, sample_index, positions)


def uniform(keys: jax.Array) -> jax.Array:
    """f32[N], one of 2**24 equally likely multiples of 2**-24 in [0, 1) for each key."""
    bits = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(keys)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def uniforms(keys: jax.Array, count: int) -> jax.Array:
    """f32[N,count], each as `uniform` gives it."""
    bits = jax.vmap(lambda key: jax.random.bits(key, (count,), jnp.uint32))(keys)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def gumbels(keys: jax.Array, count: int) -> jax.Array:
    """f32[N,count], independent standard Gumbel numbers with a full upper tail: what rare tokens are drawn by."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32, mode="high"))(keys)
