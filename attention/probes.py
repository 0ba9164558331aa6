"""Probes: what attention looked like, for caches that evict, select or mix precisions. Never a [T,S] matrix.

Each is a second blockwise pass over the live pages, given `lse` from the op where probabilities are asked for
(p = exp(score - lse), as FlashAttention's backward pass rebuilds them, arXiv 2205.14135): a block of queries meets a
few pages at a time. S = P * page_size is the width of the tables in tokens; behind the end of a text, and before the
window, all is 0 (False, -inf).

Each takes the rectangular part (q [B,n,Hq,D], lse f32[B,n,Hq], and `tree` where the op had one) or, with
`query_starts` i32[R+1], the flat prompt part (q [C,Hq,D], lse f32[C,Hq]); `rows` below is B or R. A row's query
tokens are its last ones, as in the op; sinks count where `lse` counts them. Every layout and dtype of pages will do.

Whom they serve: `column_sums` H2O (arXiv 2306.14048), A2SF (arXiv 2407.20485, weights a**(distance to the last
query)) and, with `Noise`, Keyformer (arXiv 2403.09054); `probabilities` LazyLLM, ZipCache and MInference; `logits`
TidalDecode; `above` LazyEviction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas_kernels.attention.spec import AttentionSpec, PagedView, Tree
from .blockwise import softmax_row, softmax_rows
from .pages import Noise, Queries, block_view, each_block, pack, unpack

__all__ = ["Noise", "above", "column_sums", "logits", "probabilities"]

QUERY_BLOCK, KEYS_A_STEP = 128, 256

Fold = Literal["sum", "max"]
# part(scores f32[W,Hkv,N,ps], -inf where unseen; row i32[W]) -> f32[W,X,ps]: what pages add to X columns of their row.
Part = Callable[[jax.Array, jax.Array], jax.Array]


def _collect(queries: Queries, out: jax.Array, base: jax.Array | int, part: Part, how: Fold) -> jax.Array:
    """out f32[rows,X,P,ps] with the parts of all pages that the queries see; their row 0 is row `base` of out."""
    total, find = queries.pages
    width = max(1, KEYS_A_STEP // queries.view.page_size)

    def step(index, out):
        row, page, live = find(index * width + jnp.arange(width, dtype=jnp.int32))
        scores, seen, _, _ = queries.meet(row, page, live)
        new = part(jnp.where(seen, scores, -jnp.inf), row)
        at = out.at[base + row, :, page]  # items that do not live are unseen, and add nothing
        fold = at.add if how == "sum" else at.max
        return fold(new, mode="promise_in_bounds")

    return lax.fori_loop(0, (total + width - 1) // width, step, out)


def _all_queries(
    q: jax.Array, view: PagedView, spec: AttentionSpec, query_starts: jax.Array | None, tree: Tree | None,
    beside: tuple[jax.Array, ...], part: Callable[..., jax.Array], how: Fold, columns: int,
    noise: Noise | None = None,
) -> jax.Array:  # fmt: skip
    """Parts of all queries of either part of a batch, f32[rows,columns,S].

    `beside` are arrays of a number (or one a head) a query token, given to part(scores, row, *beside) like q's blocks:
    [B,n,...]. With `noise` the lse of the noisy scores, f32[B,n,Hq], goes in front of them.
    """
    rows, P = view.table.shape
    out = jnp.full((rows, columns, P, view.page_size), 0.0 if how == "sum" else -jnp.inf, jnp.float32)
    if query_starts is None:
        queries = Queries.last(q, view, spec, tree, noise)
        if noise is not None:
            beside = (unpack(softmax_rows(queries, min(rows, 8))[1], q.shape[1]), *beside)
        out = _collect(queries, out, 0, lambda scores, row: part(scores, row, *beside), how)
        return out.reshape(rows, columns, -1)
    step = min(QUERY_BLOCK, q.shape[0])
    padded = [jnp.pad(x, ((0, step), *((0, 0),) * (x.ndim - 1))) for x in (q, *beside)]

    def block(row, at, positions, out):
        chunk, *others = (lax.dynamic_slice_in_dim(x, at, step)[None] for x in padded)
        mine = block_view(view, row, spec, positions)
        queries = Queries.of(
            chunk, mine, spec, positions[None], noise=None if noise is None else noise.row(row)
        )
        if noise is not None:
            others = (unpack(softmax_row(queries)[1], step), *others)
        return _collect(queries, out, row, lambda scores, place: part(scores, place, *others), how)

    return each_block(query_starts, view.lengths, step, block, out).reshape(rows, columns, -1)


def _check(q: jax.Array, lse: jax.Array, view: PagedView, query_starts: jax.Array | None) -> None:
    part, ndim = ("rectangular", 4) if query_starts is None else ("prompt", 3)
    if q.ndim != ndim or lse.shape != q.shape[:-1]:
        raise ValueError(
            f"the {part} part needs q of {ndim} dimensions and lse without the last one; q is {q.shape}, lse "
            f"{lse.shape}: pass what the op took and gave, and query_starts for the prompt part only"
        )
    rows = q.shape[0] if query_starts is None else query_starts.shape[0] - 1
    if rows != view.table.shape[0]:
        raise ValueError(f"q has {rows} rows, the view {view.table.shape[0]}: pass the view of the same rows")


def _below(scores: jax.Array, lse: jax.Array, kv_heads: int, row: jax.Array) -> jax.Array:
    """Logarithms of probabilities, f32[W,Hkv,N,ps], from lse f32[B,n,Hq]; queries that see nothing give -inf."""
    packed = pack(jnp.where(jnp.isneginf(lse), 0.0, lse), kv_heads)
    return scores - packed[row][..., None]


def column_sums(
    q: jax.Array, view: PagedView, spec: AttentionSpec, lse: jax.Array | None, *,
    weights: jax.Array | None = None, heads: Fold = "sum", noise: Noise | None = None,
    query_starts: jax.Array | None = None, tree: Tree | None = None,
) -> jax.Array:  # fmt: skip
    """The attention that each stored token gets, f32[rows,Hkv,S]: a weighted sum over the row's query tokens.

    `weights` f32 of a number a query token ([B,n] or [C]; None: all 1; 0 leaves drafts out that were not accepted).
    Of the G query heads of a KV head the sum counts, or the largest. Over a row the columns add up to G times the
    sum of its weights (heads="sum"). Sums over chunks of a prompt add; decay is in the weights, and for what earlier
    chunks left, in the caller's hands. With `noise`, instead of lse (None), one more pass finds the lse of the noisy
    scores first.
    """
    if (lse is None) == (noise is None):
        raise ValueError(
            "column_sums needs lse, or noise and lse=None: the op's lse is that of scores without noise"
        )
    _check(q, q[..., 0] if lse is None else lse, view, query_starts)
    if weights is None:
        weights = jnp.ones(q.shape[:-2], jnp.float32)
    if weights.shape != q.shape[:-2]:
        raise ValueError(f"weights {weights.shape} must have a number a query token of q, {q.shape[:-2]}")
    kv_heads, group = view.kv_heads, q.shape[-2] // view.kv_heads

    def part(scores, row, lse, weights):
        p = jnp.exp(_below(scores, lse, kv_heads, row))
        grouped = p.reshape(*p.shape[:2], -1, group, p.shape[-1])
        by_token = grouped.sum(3) if heads == "sum" else grouped.max(3)
        return jnp.einsum("whns,wn->whs", by_token, weights[row])

    weights = weights.astype(jnp.float32)
    beside = (weights,) if lse is None else (lse, weights)
    return _all_queries(q, view, spec, query_starts, tree, beside, part, "sum", kv_heads, noise)


def above(
    q: jax.Array, view: PagedView, spec: AttentionSpec, lse: jax.Array, alpha: float, *,
    query_starts: jax.Array | None = None, tree: Tree | None = None,
) -> jax.Array:  # fmt: skip
    """Whether any query token of the row, with any of the G heads, gives a stored token a probability of at least
    alpha: bool[rows,Hkv,S]. alpha = 0 asks who is seen at all."""
    _check(q, lse, view, query_starts)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is a probability: choose 0 to 1")
    least = math.log(alpha) if alpha else -jnp.inf

    def part(scores, row, lse):
        return _below(scores, lse, view.kv_heads, row).max(2)

    most = _all_queries(q, view, spec, query_starts, tree, (lse,), part, "max", view.kv_heads)
    return (most >= least) & (most > -jnp.inf)


def logits(q: jax.Array, view: PagedView, spec: AttentionSpec) -> jax.Array:
    """Scaled and capped scores of one query token a row, q [B,1,Hq,D]: f32[B,Hq,S], -inf where unseen.

    Their softmax is the attention.
    """
    if q.ndim != 4 or q.shape[1] != 1:
        raise ValueError(
            f"q is {q.shape}, not [B,1,Hq,D]: scores of several tokens a row would be a [T,S] matrix"
        )
    _check(q, q[..., 0], view, None)

    def part(scores, row):
        del row
        return scores.reshape(scores.shape[0], q.shape[2], -1)

    return _all_queries(q, view, spec, None, None, (), part, "max", q.shape[2])


def probabilities(
    q: jax.Array, view: PagedView, spec: AttentionSpec, lse: jax.Array, index: jax.Array, *,
    query_starts: jax.Array | None = None, tree: Tree | None = None,
) -> jax.Array:  # fmt: skip
    """Rows of the attention matrix: f32[rows,Hq,R,S] for R query tokens of each row, index i32[rows,R].

    An index counts from the row's first query token (the last token of a prompt of which this call brings c tokens
    is c-1). One that is negative or too large gives zeros, so chunks can share the indices of a whole prompt.
    """
    _check(q, lse, view, query_starts)
    rows, R = index.shape
    if rows != view.table.shape[0]:
        raise ValueError(f"index has {rows} rows, the view {view.table.shape[0]}: give every row R indices")
    if query_starts is None:
        counts, first = jnp.full(rows, q.shape[1], jnp.int32), jnp.arange(rows, dtype=jnp.int32) * q.shape[1]
    else:
        counts, first = query_starts[1:] - query_starts[:-1], query_starts[:-1]
    exists = (index >= 0) & (index < counts[:, None])
    place = jnp.where(exists, index, 0)
    flat = jnp.where(exists, first[:, None] + place, 0)
    q, lse = (x.reshape(-1, *x.shape[-axes:])[flat] for x, axes in ((q, 2), (lse, 1)))
    depths, before = place, view.lengths - counts
    if tree is not None:
        depths = jnp.take_along_axis(tree.depths, place, 1)
        tree = Tree(jnp.take_along_axis(tree.bits, place[..., None], 1), depths)
    positions = jnp.where(exists, before[:, None] + depths, -1)
    queries = Queries.of(q, view, spec, positions, tree, before)
    kv_heads = view.kv_heads

    def part(scores, row):
        p = jnp.exp(_below(scores, lse, kv_heads, row))
        return p.reshape(p.shape[0], -1, p.shape[-1])

    out = jnp.zeros((rows, q.shape[2] * R, view.table.shape[1], view.page_size), jnp.float32)
    out = _collect(queries, out, 0, part, "sum").reshape(
        rows, kv_heads, R, -1, view.table.shape[1] * view.page_size
    )
    return out.swapaxes(2, 3).reshape(rows, -1, R, out.shape[-1])
