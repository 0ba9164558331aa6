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
    """Sizes of the state: `num_pages` pages of `page_size` tokens, `seats` sequences (one more is padding).

    Recurrent layers have `snapshots` places more, for copies that the prefix cache keeps. `keys_transposed` is
    the layout inside a page: True for CPU targets, False for TPU and GPU (`attention.ops`).
    """

    num_pages: int
    page_size: int
    seats: int
    dtype: jnp.dtype = jnp.dtype("float32")
    keys_transposed: bool = True
    backends: tuple[str, ...] = ("tokenloom.attention.blockwise",)
    snapshots: int = 0


def state_spec(config: ModelConfig, capacity: Capacity, period: int | None = None) -> tuple:
    """ShapeDtypeStructs of the whole state, without any array."""
    return jax.eval_shape(lambda: make_state(config, capacity, period))


def make_state(config: ModelConfig, capacity: Capacity, period: int | None = None) -> tuple:
    """The empty state: a tuple with one entry a layer, or, for a stacked decoder, one a place in the period."""
    entries, transposed = [], capacity.keys_transposed
    layers = 1 if period is None else config.num_layers // period
    for block in config.blocks[:period]:
        mixer = block.mixer
        if isinstance(mixer, AttentionConfig):
            pages = (layers * capacity.num_pages, mixer.kv_heads)
            v = jnp.zeros((*pages, capacity.page_size, mixer.head_dim), capacity.dtype)
            k = jnp.zeros((*pages, mixer.head_dim, capacity.page_size) if transposed else v.shape, v.dtype)
            entries.append(
                PagedKV(k, v, backends=capacity.backends, layers=layers, keys_transposed=transposed)
            )
        else:
            places = capacity.seats + capacity.snapshots + 1
            rows = (places,) if period is None else (layers, places)
            conv = jnp.zeros((*rows, mixer.conv - 1, mixer.conv_dim), capacity.dtype)
            ssm = jnp.zeros((*rows, mixer.heads, mixer.head_dim, mixer.state), jnp.float32)
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


def page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page over all layers; 0 when no layer keeps pages."""
    mixers = [block.mixer for block in config.blocks if isinstance(block.mixer, AttentionConfig)]
    return sum(2 * m.kv_heads * m.head_dim for m in mixers) * page_size * jnp.dtype(dtype).itemsize
