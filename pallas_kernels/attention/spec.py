"""What every attention kernel shares: the scores, the pages, draft trees, and who sees whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax import lax

NEG_INF = -1e30
WORD = 32

Layout = Literal["transposed", "rows", "padded", "paired"]
LANES = 128


def token_axis(layout: Layout) -> int:
    """Which axis of k_pages counts a page's tokens, 3 or 2; the other one holds a head's numbers."""
    return 3 if layout == "transposed" else 2


def stored_numbers(layout: Layout, head_dim: int) -> int:
    """Numbers that k_pages hold for a token and head."""
    return {"padded": -(-head_dim // LANES) * LANES, "paired": 2 * head_dim}.get(layout, head_dim)


def multiplied(q: jax.typing.DTypeLike, pages: jax.typing.DTypeLike) -> jnp.dtype:
    """What queries and pages of these dtypes are multiplied in, weights and values too, with sums in float32: codes of
    one byte become q's dtype, and of other pairs none loses bits."""
    return jnp.dtype(q) if jnp.dtype(pages).itemsize == 1 else jnp.promote_types(q, pages)


def page_shapes(
    layout: Layout, pages: int, kv_heads: int, page_size: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of k_pages and v_pages as `PagedView` describes them."""
    numbers = stored_numbers(layout, head_dim)
    plain = (pages, kv_heads, page_size, numbers)
    keys = (pages, kv_heads, numbers, page_size) if layout == "transposed" else plain
    return keys, None if layout == "paired" else plain


@dataclass(frozen=True)
class AttentionSpec:
    """What the scores are, and the mask.

    `window` w lets position i see i-w+1 and later; `softcap` c gives c*tanh(s/c). `causal` lets i see up to i;
    with `chunk` c up to the end of its chunk of c positions (chunk-causal: whole chunks see each other, and all
    before); without either everything that is stored (full).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and (self.chunk < 1 or not self.causal):
            raise ValueError(f"chunk={self.chunk} must be at least 1, and needs causal=True")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: a token sees itself")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap} must be above 0; None for no cap")

    def capped(self, scores: jax.Array) -> jax.Array:
        """Scaled scores after the soft cap, where there is one."""
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def visible(self, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(first, last) key position that queries at `positions` see in rows of `lengths` tokens, both included.

        Plain arithmetic on i32 arrays of any shape, so it serves inside kernels too.
        """
        last = lengths - 1
        if self.chunk is not None:
            last = jnp.minimum(last, (positions // self.chunk + 1) * self.chunk - 1)
        elif self.causal:
            last = jnp.minimum(last, positions)
        first = jnp.zeros_like(positions)
        return first if self.window is None else jnp.maximum(positions - self.window + 1, 0), last


@partial(jax.tree_util.register_dataclass, data_fields=["first"], meta_fields=["page_size", "parts"])
@dataclass(frozen=True)
class Share:
    """Which tokens of a text lie here: of every page_size * parts of them the page_size from `first` i32[] on; all of
    them where that is None.

    What lies here is in the order of the text. So what a query sees of it is one range again, and a kernel that counts
    only these tokens, closely, meets a text that is split like a whole one. Plain arithmetic, for inside kernels too,
    where `first` is a ref.
    """

    page_size: int = 1
    parts: int = 1
    first: jax.Array | None = None

    def before(self, positions: jax.Array) -> jax.Array:
        """How many of these tokens are in front of text positions i32[...]."""
        if self.first is None:
            return positions
        at = jnp.maximum(positions, 0)
        span = jnp.full_like(at, self.page_size * self.parts)
        return lax.div(at, span) * self.page_size + jnp.clip(
            lax.rem(at, span) - self.first[...], 0, self.page_size
        )

    def visible(
        self, spec: AttentionSpec, positions: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`AttentionSpec.visible`, counted in these tokens; the first lies behind the last where nothing is seen."""
        first, last = spec.visible(positions, lengths)
        return (first, last) if self.first is None else (self.before(first), self.before(last + 1) - 1)

    def positions(self, count: jax.Array) -> jax.Array:
        """Text positions i32[...] of these tokens, the inverse of `before`."""
        if self.first is None:
            return count
        size = jnp.full_like(count, self.page_size)
        return lax.div(count, size) * (self.page_size * self.parts) + lax.rem(count, size) + self.first[...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_pages", "v_pages", "table", "lengths", "k_scales", "v_scales", "first"],
    meta_fields=["layout", "parts"],
)
@dataclass(frozen=True)
class PagedView:
    """What storage shows of one layer; lengths i32[rows] in tokens (0: nothing to see), table i32[rows,P].

    How a page lies belongs to the back end:

    - "transposed" k_pages [M,Hkv,D,ps], v_pages [M,Hkv,ps,D]: on CPU the product with a query then streams
    - "rows"       both [M,Hkv,ps,D]: on TPU and GPU a write of one token is then contiguous
    - "padded"     the same with zeros behind D up to a multiple of 128: the lanes of a TPU, which takes that memory
      anyway; left to itself XLA stores such arrays another way round and copies them for the kernel
    - "paired"     k_pages [M,Hkv,ps,2D], v_pages None: a token's key, then its value, in one row; heads of 64 would
      waste half of the lanes otherwise

    int8 and float8 pages come with f32 scales [M,Hkv,ps], one for each token and head: k = codes * scale.

    Pages that several devices share token by token are `parts` times as long as what lies here, which begins with
    token `first` i32[] of each page: key positions then have gaps (`share`).
    """

    k_pages: jax.Array
    v_pages: jax.Array | None
    table: jax.Array
    lengths: jax.Array
    k_scales: jax.Array | None = None
    v_scales: jax.Array | None = None
    layout: Layout = "transposed"
    parts: int = 1
    first: jax.Array | None = None

    @property
    def dtype(self) -> jnp.dtype:
        return self.k_pages.dtype

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[token_axis(self.layout)]

    @property
    def span(self) -> int:
        """Tokens of a text that a page of the table stands for."""
        return self.page_size * self.parts

    def places(self, page: jax.Array) -> jax.Array:
        """Text positions i32[...,ps] of what lies here of the pages at places i32[...] of a table."""
        inside = jnp.arange(self.page_size, dtype=jnp.int32) + (0 if self.first is None else self.first)
        return page[..., None] * self.span + inside

    @property
    def share(self) -> Share:
        return Share(self.page_size, self.parts, self.first)

    @property
    def kv_heads(self) -> int:
        return self.k_pages.shape[1]

    def rows(self, start: int, stop: int) -> PagedView:
        return replace(self, table=self.table[start:stop], lengths=self.lengths[start:stop])


@partial(jax.tree_util.register_dataclass, data_fields=["bits", "depths"], meta_fields=[])
@dataclass(frozen=True)
class Tree:
    """Draft trees of n slots a row, for verification: slot j of row b is stored at position lengths[b]-n+j.

    bits i32[B,n,ceil(n/32)]: bit s of query j says whether it sees slot s (itself and its ancestors); depths
    i32[B,n]: how far a slot's text position lies behind the root's. All see what was stored before the tree.
    """

    bits: jax.Array
    depths: jax.Array

    @staticmethod
    def of(mask: jax.Array, depths: jax.Array, window: int | None = None) -> Tree:
        """From mask bool[B,n,n] (query, slot) and depths i32[B,n]; a window also holds between slots."""
        if window is not None:
            mask = mask & (depths[:, None, :] > depths[:, :, None] - window)
        B, n, _ = mask.shape
        words = -(-n // WORD)
        padded = jnp.pad(mask, ((0, 0), (0, 0), (0, words * WORD - n))).reshape(B, n, words, WORD)
        bits = (padded.astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
        return Tree(jax.lax.bitcast_convert_type(bits, jnp.int32), depths)

    @staticmethod
    def sees(words: Sequence[jax.Array], slots: jax.Array) -> jax.Array:
        """Whether queries with these words of bits (broadcast against `slots`) see slots; before the tree: yes."""
        word = words[0]
        for index in range(1, len(words)):
            word = jnp.where(slots >= index * WORD, words[index], word)
        return (slots < 0) | ((word >> (slots & (WORD - 1))) & 1 == 1)


class Backend(Protocol):
    """One way to run attention over pages: a frozen dataclass, so that it can be static in programs.

    A case that it cannot do raises NotImplementedError with the reason. Both parts return (out, lse): out in q's
    dtype, lse f32 [..., Hq], the log of the summed exponentials of the scaled, capped, masked scores. Queries that
    see nothing give out = 0 and lse = -inf.
    """

    def layout(self, head_dim: int) -> Layout:
        """How pages must lie for heads of this size."""
        ...

    def rows(
        self, q: jax.Array, view: PagedView, spec: AttentionSpec, tree: Tree | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The rectangular part: q [B,n,Hq,D], row b's n tokens are its last n positions (or a draft tree)."""
        ...

    def prompt(
        self, q: jax.Array, view: PagedView, query_starts: jax.Array, spec: AttentionSpec,
        ends: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """The prompt part, flat: q [C,Hq,D]; tokens of row r lie in query_starts[r]..query_starts[r+1] (i32[R+1])
        and are the last positions of that row, or those in front of `ends` i32[R]: other tokens of the row may then
        lie behind them, or not be stored yet. Tokens of no row give out = 0, lse = -inf."""
        ...
