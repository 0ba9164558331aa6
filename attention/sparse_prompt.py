"""Which keys the heads of a prompt read, and attention over those only (MInference, arXiv 2407.02490).

The unit is a block of 64 tokens, and a block is a page. A plan says, for each query head, which key blocks queries
read by distance (diagonals), which by place (the beginning, or any), and single columns. Where the paper's kernel has
diagonals of 64 keys that start anywhere, these are widened to whole blocks: more keys, never fewer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas_kernels.attention.spec import multiplied
from .chosen import gather
from .ops import NEG_INF, AttentionSpec, Backend, PagedView, attention
from .pages import each_block, factored
from .probes import probabilities

BLOCK = 64
LAST_QUERIES, FIRST_COLUMNS, FIRST_DIAGONALS = 64, 30, 100


@partial(jax.tree_util.register_dataclass, data_fields=["distances", "places", "columns"], meta_fields=[])
@dataclass(frozen=True)
class Plan:
    """For R prompts and H query heads, S tokens in N = S/64 blocks: distances bool[R,H,N], key blocks read by how many
    blocks they lie back; places bool[R,H,Q,N], by query block (Q = 1: the same for all); columns bool[R,H,S]."""

    distances: jax.Array
    places: jax.Array
    columns: jax.Array

    @staticmethod
    def nothing(rows: int, heads: int, size: int) -> Plan:
        blocks = -(-size // BLOCK)
        flags = (jnp.zeros((rows, heads, *shape), bool) for shape in ((blocks,), (1, blocks), (size,)))
        return Plan(*flags)

    def whole(self, rows: jax.Array) -> Plan:
        """The same, but rows where bool[R] read everything."""
        return Plan(self.distances | rows[:, None, None], self.places, self.columns)

    def blocks(self, row: jax.Array, index: jax.Array) -> jax.Array:
        """Key blocks bool[H,N] that query block `index` of `row` reads; its own always."""
        places = self.places[row]
        back = index - jnp.arange(self.distances.shape[-1], dtype=jnp.int32)
        by_place = places[:, jnp.minimum(index, places.shape[1] - 1)]
        by_distance = jnp.where(back >= 0, self.distances[row][:, jnp.maximum(back, 0)], False)
        return (back >= 0) & (by_distance | by_place | (back == 0))


@dataclass(frozen=True)
class Prompts:
    """R prompts that are computed whole in this call: q [C,Hq,D], rotated, rows by starts i32[R+1], and pages."""

    q: jax.Array
    view: PagedView
    spec: AttentionSpec
    starts: jax.Array
    backends: tuple[Backend, ...]

    @property
    def size(self) -> int:
        return self.view.table.shape[1] * self.view.page_size

    def last(self) -> jax.Array:
        """The attention of each prompt's last 64 queries, f32[R,Hq,64,S]; 0 where there are fewer."""
        n = LAST_QUERIES
        places = jnp.maximum(self.starts[1:, None] - n + jnp.arange(n, dtype=jnp.int32), 0)
        q = self.q[jnp.minimum(places, self.q.shape[0] - 1)]
        _, lse = attention(q, self.view, self.spec, self.backends)
        index = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (q.shape[0], n))
        return probabilities(q, self.view, self.spec, lse, index)

    def pooled(self) -> tuple[jax.Array, jax.Array]:
        """Mean queries f32[R,Hq,N,D] and mean keys f32[R,Hkv,N,D] of the blocks of each prompt."""
        (R, blocks), dim = self.view.table.shape, self.q.shape[-1]
        heads, kv_heads, lengths = self.q.shape[1], self.view.kv_heads, self.view.lengths
        text = jnp.arange(self.size, dtype=jnp.int32)
        exists = (text < lengths[:, None])[:, None, :, None]
        k = gather(self.view, jnp.broadcast_to(text, (R, kv_heads, self.size)), dim)[0]
        q = self.q[jnp.minimum(self.starts[:-1, None] + text, self.q.shape[0] - 1)].swapaxes(1, 2)
        counts = jnp.clip(lengths[:, None] - jnp.arange(blocks) * BLOCK, 1, BLOCK)[:, None, :, None]

        def mean(x: jax.Array, heads: int) -> jax.Array:
            return (
                jnp.where(exists, x.astype(jnp.float32), 0).reshape(R, heads, blocks, BLOCK, dim).sum(3)
                / counts
            )

        return mean(q, heads), mean(k, kv_heads)


def top(scores: jax.Array, count: int) -> jax.Array:
    """bool[...,S]: the `count` highest of scores [...,S]; -inf is never among them."""
    values, places = lax.top_k(scores, min(count, scores.shape[-1]))
    return jnp.put_along_axis(jnp.zeros(scores.shape, bool), places, values > -jnp.inf, -1, inplace=False)


def diagonals(p: jax.Array, lengths: jax.Array) -> jax.Array:
    """Sums along diagonals of p f32[R,H,n,S], the attention of each row's last n queries: f32[R,H,S] by distance."""
    n, S = p.shape[2:]
    query = lengths[:, None] - n + jnp.arange(n, dtype=jnp.int32)
    key = query[:, :, None] - jnp.arange(S, dtype=jnp.int32)
    inside = (key >= 0) & (query >= 0)[:, :, None]
    index = jnp.broadcast_to(jnp.clip(key, 0, S - 1)[:, None], p.shape)
    return jnp.where(inside[:, None], jnp.take_along_axis(p, index, -1), 0.0).sum(2)


def attend(prompts: Prompts, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The prompt part over what the plan reads: (out [C,Hq,D], lse f32[C,Hq])."""
    q, view, spec = prompts.q, prompts.view, prompts.spec
    C, heads, dim = q.shape
    padded = jnp.pad(q, ((0, BLOCK), (0, 0), (0, 0)))

    def block(row, at, positions, carry):
        out, lse = carry
        chunk = lax.dynamic_slice_in_dim(padded, at, BLOCK).swapaxes(0, 1)
        got, got_lse = _block(chunk, replace(view, table=view.table[row][None]), spec, plan, row, positions)
        out = lax.dynamic_update_slice_in_dim(out, got.swapaxes(0, 1), at, 0)
        return out, lax.dynamic_update_slice_in_dim(lse, got_lse.T, at, 0)

    start = jnp.zeros((C + BLOCK, heads, dim)), jnp.full((C + BLOCK, heads), -jnp.inf)
    out, lse = each_block(prompts.starts, view.lengths, BLOCK, block, start, aligned=True)
    return out[:C].astype(q.dtype), lse[:C]


def _block(
    q: jax.Array, view: PagedView, spec: AttentionSpec, plan: Plan, row: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A block of queries of one row, q [Hq,64,D]: first the key blocks of each head, then its columns, 64
    keys at a time, with one online softmax. Heads read different keys; the longest list sets the number of turns."""
    blocks = plan.blocks(row, positions[0] // BLOCK)
    inside = jnp.repeat(blocks, BLOCK, -1)[:, : plan.columns.shape[-1]]
    columns = plan.columns[row] & ~inside & (jnp.arange(inside.shape[-1]) <= positions.max())
    size = columns.shape[1]
    turns = blocks.sum(-1), -(-columns.sum(-1) // BLOCK)
    # Stable sorts bring what is read to the front, in the order of the text.
    block_list = jnp.argsort(~blocks, -1, stable=True)
    column_list = jnp.pad(jnp.argsort(~columns, -1, stable=True), ((0, 0), (0, BLOCK)))
    offsets = jnp.arange(BLOCK, dtype=jnp.int32)
    dtype = multiplied(q.dtype, view.k_pages.dtype if view.k_scales is None else jnp.float32)
    q, factor = factored(q, spec, dtype)

    def by_block(turn, carry):
        tokens = block_list[:, turn][:, None] * BLOCK + offsets
        return fold(tokens, jnp.broadcast_to((turn < turns[0])[:, None], tokens.shape), carry)

    def by_column(turn, carry):
        tokens = lax.dynamic_slice_in_dim(column_list, turn * BLOCK, BLOCK, 1)
        return fold(tokens, turn * BLOCK + offsets < columns.sum(-1)[:, None], carry)

    def fold(tokens, exist, carry):
        out, highest, total = carry
        k, v = (x[0].astype(dtype) for x in gather(view, jnp.minimum(tokens, size - 1)[None], q.shape[-1]))
        scores = jnp.einsum("hqd,hkd->hqk", q, k, preferred_element_type=jnp.float32)
        scores = spec.capped(scores if factor == 1 else scores * factor)
        seen = exist[:, None] & (tokens[:, None] <= positions[:, None])
        scores = jnp.where(seen, scores, NEG_INF)
        new = jnp.maximum(highest, scores.max(-1))
        shrink, weights = jnp.exp(highest - new), jnp.where(seen, jnp.exp(scores - new[..., None]), 0.0)
        part = jnp.einsum("hqk,hkd->hqd", weights.astype(dtype), v, preferred_element_type=jnp.float32)
        return out * shrink[..., None] + part, new, total * shrink + weights.sum(-1)

    nothing = jnp.zeros(q.shape), jnp.full(q.shape[:2], NEG_INF), jnp.zeros(q.shape[:2])
    carry = lax.fori_loop(0, turns[0].max(), by_block, nothing)
    out, highest, total = lax.fori_loop(0, turns[1].max(), by_column, carry)
    lse = jnp.where(total > 0, highest + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)
    return out / jnp.maximum(total, 1e-30)[..., None], lse
