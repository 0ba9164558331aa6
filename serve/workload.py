"""Attention calls to time: random paged keys and values of given lengths, and how to time calls side by side."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..attention.caches.paged import QUANTISED, PagedKV
from ..attention.ops import AttentionSpec, Backend, PagedView
from ..pallas_kernels.attention.tiles import Case

BURST_SECONDS = 0.02


@dataclass(frozen=True)
class Heads:
    """One layer's attention as one device has it, and how it is stored."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str = "float32"
    kv_dtype: str = "float32"

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim, self.page_size) < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}, and head_dim={self.head_dim} and "
                f"page_size={self.page_size} at least 1"
            )

    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.head_dim**-0.5)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values, scales included."""
        scale = 4 if self.kv_dtype in QUANTISED else 0
        return 2 * self.kv_heads * (self.head_dim * jnp.dtype(self.kv_dtype).itemsize + scale)


@dataclass(frozen=True)
class Work:
    """One call. `rows`: one token of each of `lengths`, at the end of a text of so many tokens. `prompt`: `tokens`
    tokens at the end of each of `lengths`. Tables are `width` pages wide."""

    part: str
    lengths: tuple[int, ...]
    width: int
    tokens: int = 1

    def case(self, heads: Heads) -> Case:
        return Case(
            self.part, self.queries, heads.kv_heads, heads.heads // heads.kv_heads, heads.head_dim,
            heads.page_size, self.width, jnp.dtype(heads.dtype).name, jnp.dtype(heads.kv_dtype).name,
        )  # fmt: skip

    @property
    def queries(self) -> int:
        """Query tokens a row, of a rectangular part; in all, of a prompt part."""
        return 1 if self.part == "rows" else self.tokens * len(self.lengths)

    def kv_bytes(self, heads: Heads) -> int:
        """Bytes of keys and values that the call must read at least once."""
        return sum(self.lengths) * heads.token_bytes

    def flops(self, heads: Heads) -> int:
        """Floating-point operations of the two products under a causal mask; a multiply-add is two."""
        seen = sum(self.tokens * (2 * n - self.tokens + 1) // 2 for n in self.lengths)
        return 4 * seen * heads.heads * heads.head_dim

    def __str__(self) -> str:
        if self.part == "prompt":
            return f"prefill {self.queries} of {sum(self.lengths)}"
        counts = Counter(self.lengths)
        return "decode " + " + ".join(f"{counts[length]} x {length}" for length in counts)


class Inputs:
    """Random inputs of a call, on the default device: q, and views that are used in turn, lying as `backend` wants.

    With `copies` above 1 each view has pages of its own, as each layer of a model has: what the chip's caches hold
    after a call is then of no use to the next.
    """

    def __init__(self, work: Work, heads: Heads, backend: Backend, copies: int = 1):
        size = heads.page_size
        counts = [-(-length // size) for length in work.lengths]
        if max(counts) > work.width:
            raise ValueError(
                f"{max(work.lengths)} tokens need {max(counts)} pages of {size}; width is {work.width}"
            )
        rows, pages = len(counts), sum(counts)
        order = np.random.default_rng(0).permutation(copies * pages).astype(np.int32) + 1
        pool = _pages(heads, backend, copies * pages + 1)
        lengths = jnp.asarray(work.lengths, jnp.int32)
        self.views = []
        for copy in range(copies):
            table = np.zeros((rows, work.width), np.int32)
            mine = iter(order[copy * pages : (copy + 1) * pages])
            for row, count in enumerate(counts):
                table[row, :count] = [next(mine) for _ in range(count)]
            self.views.append(replace(pool, table=jnp.asarray(table), lengths=lengths))
        shape = (rows, 1) if work.part == "rows" else (work.queries,)
        self.q = _draw(9, (*shape, heads.heads, heads.head_dim), jnp.dtype(heads.dtype))
        self.starts = None
        if work.part == "prompt":
            self.starts = jnp.arange(rows + 1, dtype=jnp.int32) * work.tokens
        self._at = 0

    def caller(self, backend: Backend, spec: AttentionSpec) -> Callable[[], Any]:
        """A compiled call of the back end on the next of the views; NotImplementedError when it refuses."""

        def run(q: jax.Array, view: PagedView, starts: jax.Array | None):
            if starts is None:
                return backend.rows(q, view, spec)
            return backend.prompt(q, view, starts, spec)

        compiled = jax.jit(run).lower(self.q, self.views[0], self.starts).compile()

        def call():
            self._at += 1
            return compiled(self.q, self.views[self._at % len(self.views)], self.starts)

        return call


def _pages(heads: Heads, backend: Backend, pages: int) -> PagedView:
    """So many random pages as this back end wants them, without rows."""

    def empty() -> PagedKV:
        dtype = jnp.dtype(heads.kv_dtype)
        return PagedKV.empty(pages, heads.page_size, heads.kv_heads, heads.head_dim, dtype, (backend,))

    none = jnp.zeros((0,), jnp.int32)
    spec = jax.eval_shape(empty)
    k, v, k_scales, v_scales = (
        None if one is None else _draw(seed, one.shape, one.dtype)
        for seed, one in enumerate((spec.k, spec.v, spec.k_scales, spec.v_scales))
    )
    assert k is not None
    return PagedView(k, v, none, none, k_scales, v_scales, spec.layout)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(seed: int, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    key = jax.random.key(seed, impl="rbg")
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.randint(key, shape, -127, 128, dtype)
    return jax.random.normal(key, shape, jnp.bfloat16 if dtype.itemsize == 1 else dtype).astype(dtype)


def bursts(
    calls: Sequence[Callable[[], Any]], rounds: int, seconds: float = BURST_SECONDS, slack: float = math.inf
) -> list[list[float]]:
    """Seconds a call of each, once a round: all take turns, so that what disturbs a round disturbs them all.

    A burst is as many calls as last about `seconds`, dispatched back to back and waited for at the end. Each call is
    made twice before, to warm up; the second counts as round 0. What takes `slack` times as long as the best so far
    is not repeated.
    """

    def burst(call: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        last = [call() for _ in range(count)][-1]
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / count

    for call in calls:
        burst(call, 1)
    found = [[burst(call, 1)] for call in calls]
    counts = [max(1, min(256, int(seconds / once[0]))) for once in found]
    for _ in range(rounds):
        limit = slack * min(map(min, found))
        for index, call in enumerate(calls):
            if min(found[index]) <= limit:
                found[index].append(burst(call, counts[index]))
    return found


def side_by_side(
    calls: Sequence[Callable[[], Any]], rounds: int, seconds: float = BURST_SECONDS, slack: float = math.inf
) -> list[float]:
    """The smallest of `bursts` of each call."""
    return [min(taken) for taken in bursts(calls, rounds, seconds, slack)]
