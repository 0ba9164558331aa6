"""A ragged batch as one flat list of equal steps, built on the device without a host's help.

Lean Attention (Sanovar et al. 2024, arXiv 2405.10480) lays the key tiles of all outputs on one line and cuts it in
equal parts. Here the line is a list of steps (slot, row, group): output `slot` takes in the keys of `group` of `row`,
groups being aligned runs of `step` keys. A slot's steps follow each other, so it is finished when the next begins,
and what a slot takes in depends on its own row alone: results do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Sees = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""`AttentionSpec.visible`, or as `Share` counts tokens: (positions, lengths) -> first and last of a row's keys."""


@dataclass(frozen=True)
class Ranges:
    """One entry a pair of (slot, row), in order of slots: groups first..first+count of the row; all i32[pairs]."""

    slot: jax.Array
    row: jax.Array
    first: jax.Array
    count: jax.Array


def row_ranges(lengths: jax.Array, n: int, sees: Sees, step: int, segments: int, segment: int) -> Ranges:
    """Rows of n tokens at their ends; slot b*segments+s is what row b sees of positions s*segment.. (in steps)."""
    B = lengths.shape[0]
    first, _ = sees(jnp.maximum(lengths - n, 0), lengths)
    _, last = sees(jnp.maximum(lengths - 1, 0), lengths)
    row = jnp.repeat(jnp.arange(B, dtype=jnp.int32), segments)
    part = jnp.tile(jnp.arange(segments, dtype=jnp.int32), B)
    per = segment // step if segments > 1 else jnp.iinfo(jnp.int32).max
    low = jnp.maximum(first[row] // step, part * per)
    high = jnp.where(segments > 1, jnp.minimum(last[row] // step, part * per + per - 1), last[row] // step)
    count = jnp.where(lengths[row] > 0, jnp.maximum(high - low + 1, 0), 0)
    return Ranges(jnp.arange(B * segments, dtype=jnp.int32), row, low, count)


def prompt_ranges(
    query_starts: jax.Array,
    lengths: jax.Array,
    ends: jax.Array,
    blocks: int,
    queries: int,
    sees: Sees,
    step: int,
) -> Ranges:
    """Blocks of `queries` tokens of the flat chunk, whose rows end with positions `ends`, each with the rows that
    overlap it."""
    R = lengths.shape[0]
    block = jnp.repeat(jnp.arange(blocks, dtype=jnp.int32), R)
    row = jnp.tile(jnp.arange(R, dtype=jnp.int32), blocks)
    low = jnp.maximum(query_starts[row], block * queries)
    high = jnp.minimum(query_starts[row + 1], (block + 1) * queries)
    shift = ends[row] - query_starts[row + 1]
    first, _ = sees(low + shift, lengths[row])
    _, last = sees(high - 1 + shift, lengths[row])
    count = jnp.where((high > low) & (last >= first), last // step - first // step + 1, 0)
    return Ranges(block, row, first // step, count)


@dataclass(frozen=True)
class Steps:
    """The list, padded to a static size: slot, row, group i32[size]; `opens` and `closes` mark a slot's first and
    last step. Core c runs steps starts[c]..starts[c+1] (i32[cores+1]); `counts` i32[slots] are steps a slot."""

    slot: jax.Array
    row: jax.Array
    group: jax.Array
    opens: jax.Array
    closes: jax.Array
    starts: jax.Array
    counts: jax.Array


def flatten(ranges: Ranges, slots: int, size: int, cores: int) -> Steps:
    """Lay ranges on one line of at most `size` steps, cut between slots into near-equal parts for `cores`."""
    ends = jnp.cumsum(ranges.count)
    total = ends[-1]
    item = jnp.minimum(jnp.arange(size, dtype=jnp.int32), jnp.maximum(total - 1, 0))
    pair = jnp.searchsorted(ends, item, side="right", method="compare_all").astype(jnp.int32)
    pair = jnp.minimum(pair, ends.shape[0] - 1)
    slot = ranges.slot[pair]
    group = ranges.first[pair] + item - (ends - ranges.count)[pair]
    counts = jnp.zeros(slots, jnp.int32).at[ranges.slot].add(ranges.count)
    slot_ends = jnp.cumsum(counts)
    opens = item == (slot_ends - counts)[slot]
    closes = item == slot_ends[slot] - 1
    ideal = total * jnp.arange(1, cores, dtype=jnp.int32) // cores
    cuts = slot_ends[jnp.abs(slot_ends[None] - ideal[:, None]).argmin(1)] if cores > 1 else ideal
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), cuts, total[None]])
    return Steps(slot, ranges.row[pair], group, opens, closes, starts, counts)
