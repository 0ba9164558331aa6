"""What a model remembers between steps: one entry a layer, of kind PAGED, FIXED or NONE.

Bytes are known from the spec alone, so planning needs no arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..attention.caches.paged import PagedKV
from ..attention.caches.recurrent import RecurrentState
from .config import AttentionConfig, ModelConfig


@dataclass(frozen=True)
class Capacity:
    """Sizes of the state: `num_pages` pages of `page_size` tokens, `seats` sequences (one more is padding)."""

    num_pages: int
    page_size: int
    seats: int
    dtype: jnp.dtype = jnp.dtype("float32")
    backends: tuple[str, ...] = ("tokenloom.attention.blockwise",)


def state_spec(config: ModelConfig, capacity: Capacity) -> tuple:
    """ShapeDtypeStructs of the whole state, without any array."""
    return jax.eval_shape(lambda: make_state(config, capacity))


def make_state(config: ModelConfig, capacity: Capacity) -> tuple:
    """The empty state: a tuple with one entry a layer."""
    entries = []
    for block in config.blocks:
        mixer = block.mixer
        if isinstance(mixer, AttentionConfig):
            pages = (capacity.num_pages, mixer.kv_heads)
            k = jnp.zeros((*pages, mixer.head_dim, capacity.page_size), capacity.dtype)
            v = jnp.zeros((*pages, capacity.page_size, mixer.head_dim), capacity.dtype)
            entries.append(PagedKV(k, v, backends=capacity.backends))
        else:
            seats = capacity.seats + 1
            conv = jnp.zeros((seats, mixer.conv - 1, mixer.conv_dim), capacity.dtype)
            ssm = jnp.zeros((seats, mixer.heads, mixer.head_dim, mixer.state), jnp.float32)
            entries.append(RecurrentState(conv, ssm))
    return tuple(entries)


def state_bytes(state: tuple) -> int:
    """Bytes of a state or of its spec."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page over all layers; 0 when no layer keeps pages."""
    mixers = [block.mixer for block in config.blocks if isinstance(block.mixer, AttentionConfig)]
    return sum(2 * m.kv_heads * m.head_dim for m in mixers) * page_size * jnp.dtype(dtype).itemsize
