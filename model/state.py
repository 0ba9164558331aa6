"""What a model remembers between steps: one entry a layer, of kind PAGED, FIXED or NONE.

Bytes are known from the spec alone, so planning needs no arrays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..attention.caches.paged import Pages
from ..attention.caches.policy import CachePolicy, Capacity, bytes_a_page
from ..attention.caches.recurrent import RecurrentState
from ..attention.caches.seats import zeros
from .config import AttentionConfig, ModelConfig


def state_spec(
    config: ModelConfig, capacity: Capacity, period: int | None = None, cache: CachePolicy = Pages()
) -> tuple:
    """ShapeDtypeStructs of the whole state, without any array."""
    return jax.eval_shape(lambda: make_state(config, capacity, period, cache))


def make_state(
    config: ModelConfig, capacity: Capacity, period: int | None = None, cache: CachePolicy = Pages()
) -> tuple:
    """The empty state: a tuple with one entry a layer, or, for a stacked decoder, one a place in the period."""
    entries = []
    layers = None if period is None else config.num_layers // period
    for index, block in enumerate(config.blocks[:period]):
        mixer = block.mixer
        if isinstance(mixer, AttentionConfig):
            entries.append(cache.create(mixer, index, capacity, layers))
        else:
            places = capacity.seats + capacity.snapshots + 1
            conv = zeros((places, mixer.conv - 1, mixer.conv_dim), capacity.dtype, layers)
            ssm = zeros((places, mixer.heads, mixer.head_dim, mixer.state), jnp.dtype("float32"), layers)
            entries.append(RecurrentState(conv, ssm))
    return tuple(entries)


def state_bytes(state: tuple) -> int:
    """Bytes of a state or of its spec."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def snapshot_bytes(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Bytes of one sequence's recurrent state over all layers; 0 when no layer is recurrent."""
    mixers = [block.mixer for block in config.blocks if not isinstance(block.mixer, AttentionConfig)]
    conv = sum((m.conv - 1) * m.conv_dim for m in mixers) * jnp.dtype(dtype).itemsize
    return conv + sum(m.heads * m.head_dim * m.state for m in mixers) * 4


def page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype, cache: CachePolicy = Pages()) -> int:
    """Bytes of one page over all layers, scales included; 0 when no layer keeps pages."""
    capacity = Capacity(1, page_size, 1, jnp.dtype(dtype))
    mixers = [(at, block.mixer) for at, block in enumerate(config.blocks)]
    return sum(bytes_a_page(cache, m, at, capacity) for at, m in mixers if isinstance(m, AttentionConfig))
