"""Cache policies: what attention layers remember of a text. A frozen dataclass, `LLM(cache=StreamingLLM(4, 1020))`.

A policy makes the state of each attention layer and says what an engine may do with it (`Abilities`); the state's
`attend` does the work. The engine asks the abilities, never which policy it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from ..blockwise import Blockwise
from ..ops import Backend


@dataclass(frozen=True)
class Capacity:
    """Sizes of the state: `num_pages` pages of `page_size` tokens, `seats` sequences (one more is padding).

    Recurrent layers have `snapshots` places more, for copies that the prefix cache keeps. `kv_dtype` is how keys
    and values are stored (None: as `dtype`); the first of the attention back ends decides how a page lies. `width` is
    the number of pages that one sequence may have.
    """

    num_pages: int
    page_size: int
    seats: int
    dtype: jnp.dtype = jnp.dtype("float32")
    backends: tuple[Backend, ...] = (Blockwise(),)
    snapshots: int = 0
    kv_dtype: jnp.dtype | None = None
    width: int = 0

    @property
    def stored(self) -> jnp.dtype:
        """The dtype of stored keys and values."""
        return jnp.dtype(self.kv_dtype or self.dtype)


class Heads(Protocol):
    """What a cache must know of an attention layer; a model's `AttentionConfig` is one."""

    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def window(self) -> int | None: ...


@dataclass(frozen=True)
class Abilities:
    """What an engine may do with what a policy remembers.

    pages             "all": a page for every page_size tokens; "prompt": only until the prompt is computed;
                      "none": a fixed size by seat
    may_share_prefix  pages that a prompt filled serve other texts that begin with it
    rebuildable       prompt and output computed anew as one prompt give the same state, so a sequence may be preempted
                      and resumed; otherwise it reserves all of its pages when it starts
    can_roll_back     what was stored for drafted tokens that are rejected can be forgotten, in trees too
    exact             the numbers of plain pages, but for rounding
    chunkable         a prompt may be cut anywhere
    quantises         keys and values may be stored in the integer and float8 dtypes of `kv_cache_dtype`
    shards            KV heads may be split over devices
    splits            the tokens of a text may be split over devices
    layers_alike      layers of one shape have the same kind of state
    """

    pages: Literal["all", "prompt", "none"] = "all"
    may_share_prefix: bool = False
    can_roll_back: bool = False
    rebuildable: bool = True
    exact: bool = False
    chunkable: bool = True
    quantises: bool = False
    shards: bool = False
    splits: bool = False
    layers_alike: bool = True

    @property
    def turned_off(self) -> str:
        """What an engine goes without because of this, in words; empty for plain pages."""
        missing = {
            "exactness": self.exact,
            "prefix cache": self.may_share_prefix,
            "drafts": self.can_roll_back,
            "preemption and resume": self.rebuildable,
            "chunked prefill": self.chunkable,
            "quantised kv_cache_dtype": self.quantises,
            "tensor parallel": self.shards,
            "sequence parallel": self.splits,
        }
        return ", ".join(name for name, there in missing.items() if not there)


class CachePolicy(ABC):
    """A frozen dataclass of settings: equal settings make equal states."""

    @property
    @abstractmethod
    def abilities(self) -> Abilities: ...

    @property
    def page_size(self) -> int | None:
        """Tokens a page, where the policy needs a size of its own; None: the engine chooses."""
        return None

    def longest(self, length: int) -> int:
        """How many positions texts of up to `length` tokens need: the largest distance at which a query sees, plus
        one."""
        return length

    @abstractmethod
    def create(self, heads: Heads, layer: int, capacity: Capacity, layers: int | None = None) -> Any:
        """The empty state of attention layer `layer` (counted from 0 over all blocks), or of `layers` equal ones that
        share arrays and run under a scan, of which `layer` is the first. ValueError where the layer does not suit."""
        ...


def bytes_a_page(policy: CachePolicy, heads: Heads, layer: int, capacity: Capacity) -> int:
    """Bytes that one page more costs in this layer."""

    def size(pages: int) -> int:
        grown = Capacity(pages, capacity.page_size, 1, capacity.dtype, kv_dtype=capacity.kv_dtype, width=1)
        spec = jax.eval_shape(lambda: policy.create(heads, layer, grown))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(spec))

    return size(2) - size(1)
