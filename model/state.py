"""What a model remembers between steps: one entry a layer, of kind PAGED, FIXED or NONE.

Bytes are known from the spec alone, so planning needs no arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..attention.blockwise import Blockwise
from ..attention.caches.paged import QUANTISED, PagedKV
from ..attention.caches.recurrent import RecurrentState
from ..attention.ops import Backend
from .config import AttentionConfig, ModelConfig


@dataclass(frozen=True)
class Capacity:
    """Sizes of the state: `num_pages` pages of `page_size` tokens, `seats` sequences (one more is padding).

    Recurrent layers have `snapshots` places more, for copies that the prefix cache keeps. `kv_dtype` is how keys
    and values are stored (None: as `dtype`); the first of the attention back ends decides how a page lies.
    """

    num_pages: int
    page_size: int
    seats: int
    dtype: jnp.dtype = jnp.dtype("float32")
    backends: tuple[Backend, ...] = (Blockwise(),)
    snapshots: int = 0
    kv_dtype: jnp.dtype | None = None


def state_spec(config: ModelConfig, capacity: Capacity, period: int | None = None) -> tuple:
    """ShapeDtypeStructs of the whole state, without any array."""
    return jax.eval_shape(lambda: make_state(config, capacity, period))


def make_state(config: ModelConfig, capacity: Capacity, period: int | None = None) -> tuple:
    """The empty state: a tuple with one entry a layer, or, for a stacked decoder, one a place in the period."""
    entries = []
    layers = 1 if period is None else config.num_layers // period
    for block in config.blocks[:period]:
        mixer = block.mixer
        if isinstance(mixer, AttentionConfig):
            entries.append(
                PagedKV.empty(
                    capacity.num_pages, capacity.page_size, mixer.kv_heads, mixer.head_dim,
                    capacity.kv_dtype or capacity.dtype, capacity.backends, layers,
                )
            )  # fmt: skip
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
    """Bytes of one page over all layers, scales included; 0 when no layer keeps pages."""
    mixers = [block.mixer for block in config.blocks if isinstance(block.mixer, AttentionConfig)]
    dtype = jnp.dtype(dtype)
    scale = 4 if dtype.name in QUANTISED else 0
    return sum(2 * m.kv_heads * (m.head_dim * dtype.itemsize + scale) for m in mixers) * page_size
