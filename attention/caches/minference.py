"""MInference 1.0 (Jiang et al. 2024, arXiv 2407.02490): prompts read few keys, in one of three shapes a head.

A prompt is computed whole (the last 64 queries choose what all read), so the engine does not cut it; generations are
dense, over ordinary pages. A row that is cut all the same (or begins behind a cached prefix) is computed densely.
Layers that have a window of their own stay as they are. The offline search that gives each head its shape is not
here: give `heads`, or one `pattern` for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp

from ..batch import Batch
from ..ops import AttentionSpec, attention
from ..rotary import Rotate, unrotated
from ..sparse_prompt import BLOCK, FIRST_COLUMNS, FIRST_DIAGONALS, Plan, Prompts, attend, diagonals, top
from .paged import PagedKV
from .policy import Abilities, CachePolicy, Capacity, Heads
from .seats import rectangular


class Pattern(Protocol):
    """A shape: which keys the query heads `heads` of prompts read."""

    def plan(self, prompts: Prompts, heads: jax.Array) -> Plan: ...


@dataclass(frozen=True)
class AShape:
    """The `first` tokens and the `local` last ones before each query, rounded up to blocks."""

    first: int = 1024
    local: int = 4096

    def plan(self, prompts: Prompts, heads: jax.Array) -> Plan:
        plan = Plan.nothing(prompts.view.table.shape[0], heads.size, prompts.size)
        index = jnp.arange(plan.distances.shape[-1], dtype=jnp.int32)
        near, begin = index * BLOCK < self.local + BLOCK - 1, index * BLOCK < self.first
        return Plan(plan.distances | near, plan.places | begin, plan.columns)


@dataclass(frozen=True)
class VerticalSlash:
    """The `vertical` columns and the `slash` diagonals that the last 64 queries attend to most; the first 30 columns
    and the 100 nearest diagonals always."""

    vertical: int = 1000
    slash: int = 6096

    def plan(self, prompts: Prompts, heads: jax.Array) -> Plan:
        p, lengths = prompts.last()[:, heads], prompts.view.lengths
        index = jnp.arange(prompts.size, dtype=jnp.int32)
        exists = (index < lengths[:, None])[:, None]
        forced = jnp.where(index < FIRST_COLUMNS, jnp.inf, p.sum(2))
        columns = top(jnp.where(exists, forced, -jnp.inf), max(self.vertical, FIRST_COLUMNS))
        forced = jnp.where(index < FIRST_DIAGONALS, jnp.inf, diagonals(p, lengths))
        slashes = top(jnp.where(exists, forced, -jnp.inf), max(self.slash, FIRST_DIAGONALS))
        # A diagonal that lies 64 a + b back crosses the key blocks a and, for b > 0, a + 1 back.
        blocks = slashes.reshape(*slashes.shape[:2], -1, BLOCK)
        further = jnp.pad(blocks[..., 1:].any(-1), ((0, 0), (0, 0), (1, 0)))[..., :-1]
        nothing = Plan.nothing(*slashes.shape)
        return Plan(blocks.any(-1) | further, nothing.places, columns)


@dataclass(frozen=True)
class BlockSparse:
    """For each block of queries the `blocks` key blocks whose mean key suits its mean query best."""

    blocks: int = 100

    def plan(self, prompts: Prompts, heads: jax.Array) -> Plan:
        q, k = prompts.pooled()
        k = k[:, heads // (q.shape[1] // k.shape[1])]
        scores = jnp.einsum("rhqd,rhkd->rhqk", q[:, heads], k)
        index = jnp.arange(scores.shape[-1], dtype=jnp.int32)
        chosen = top(jnp.where(index[:, None] >= index, scores, -jnp.inf), self.blocks)
        nothing = Plan.nothing(scores.shape[0], heads.size, prompts.size)
        return Plan(nothing.distances, chosen, nothing.columns)


@dataclass(frozen=True)
class MInference(CachePolicy):
    """`pattern` for every head, or `heads`: one a query head of each layer. `dense_layers` first ones read all."""

    pattern: Pattern = VerticalSlash()
    heads: tuple[tuple[Pattern, ...], ...] | None = None
    dense_layers: int = 0

    def __repr__(self) -> str:
        return f"MInference({self.pattern!r})" if self.heads is None else "MInference(a pattern a head)"

    @property
    def abilities(self) -> Abilities:
        return Abilities(rebuildable=False, chunkable=False, quantises=True, layers_alike=False)

    @property
    def page_size(self) -> int | None:
        return BLOCK

    def create(
        self, heads: Heads, layer: int, capacity: Capacity, layers: int | None = None
    ) -> PagedKV | PlannedKV:
        pages = PagedKV.of(heads, capacity, layers)
        if layer < self.dense_layers or heads.window is not None:
            return pages
        if capacity.page_size != BLOCK:
            raise ValueError(
                f"{self!r} needs pages of {BLOCK} tokens, not {capacity.page_size}; leave page_size=None"
            )
        patterns = (self.pattern,) * heads.heads
        if self.heads is not None:
            patterns = self.heads[layer] if layer < len(self.heads) else ()
        if len(patterns) != heads.heads:
            raise ValueError(
                f"{self!r} has {len(patterns)} patterns for the {heads.heads} heads of layer {layer}"
            )
        return PlannedKV(pages, patterns)


@partial(jax.tree_util.register_dataclass, data_fields=["pages"], meta_fields=["patterns"])
@dataclass(frozen=True)
class PlannedKV:
    """One layer: its pages, and a pattern for each query head."""

    pages: PagedKV
    patterns: tuple[Pattern, ...]

    def layer(self, index: jax.Array) -> PlannedKV:
        return replace(self, pages=self.pages.layer(index))

    def put(self, index: jax.Array, new: PlannedKV) -> PlannedKV:
        return replace(new, pages=self.pages.put(index, new.pages))

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec,
        rotate: Rotate = unrotated,
    ) -> tuple[jax.Array, PlannedKV]:  # fmt: skip
        """q [T,Hq,D], k and v [T,Hkv,D], raw. One token a rectangular row."""
        q, k = rotate(q, batch.positions), rotate(k, batch.positions)
        B, new, parts = rectangular(batch, self, spec), replace(self, pages=self.pages.write(k, v, batch)), []
        if B:
            view = new.pages.view(batch).rows(0, B)
            parts.append(attention(q[:B, None], view, spec, self.pages.backends)[0][:, 0])
        if batch.shape.R:
            view = new.pages.view(batch).rows(B, batch.shape.rows)
            prompts = Prompts(q[B:], view, spec, batch.query_starts, self.pages.backends)
            cut = (batch.starts[B:] > 0) | ~batch.ends[B:]
            parts.append(attend(prompts, self._plan(prompts).whole(cut))[0])
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], new

    def _plan(self, prompts: Prompts) -> Plan:
        """The heads' plans side by side, each pattern's heads together."""
        kinds = tuple(dict.fromkeys(self.patterns))
        groups = [[h for h, one in enumerate(self.patterns) if one == kind] for kind in kinds]
        plans = [kind.plan(prompts, jnp.asarray(group)) for kind, group in zip(kinds, groups)]
        order = jnp.argsort(jnp.asarray([h for group in groups for h in group]))
        queries = max(plan.places.shape[2] for plan in plans)

        def wide(places: jax.Array) -> jax.Array:
            return jnp.broadcast_to(places, (*places.shape[:2], queries, places.shape[3]))

        return Plan(
            jnp.concatenate([plan.distances for plan in plans], 1)[:, order],
            jnp.concatenate([wide(plan.places) for plan in plans], 1)[:, order],
            jnp.concatenate([plan.columns for plan in plans], 1)[:, order],
        )
