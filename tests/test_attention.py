"""The blockwise op equals its specification (`attention.ops.dense`) on ragged paged batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom.attention.blockwise import Blockwise
from tokenloom.attention.ops import AttentionSpec, PagedView, dense, merge

PAGE, WIDTH, HEADS, KV_HEADS, DIM = 4, 6, 4, 2, 8
SPECS = {
    "causal": AttentionSpec(0.3),
    "window": AttentionSpec(0.3, window=5),
    "softcap": AttentionSpec(0.8, softcap=1.5),
}


def texts(lengths):
    draw = np.random.default_rng(0)
    return [
        tuple(draw.standard_normal((n, KV_HEADS, DIM)).astype(np.float32) for _ in range(2)) for n in lengths
    ]


def paged(drawn, lengths, transposed):
    """The same keys and values in shuffled pages; pages that nobody owns hold numbers that would show."""
    table = np.zeros((len(lengths), WIDTH), np.int32)
    k_pages = np.full((1 + WIDTH * len(lengths), KV_HEADS, PAGE, DIM), 50.0, np.float32)
    v_pages = k_pages.copy()
    free = list(np.random.default_rng(1).permutation(np.arange(1, len(k_pages))))
    for row, (k, v) in enumerate(drawn):
        for at in range(0, len(k), PAGE):
            page = table[row, at // PAGE] = free.pop()
            part = k[at : at + PAGE]
            k_pages[page, :, : len(part)] = part.transpose(1, 0, 2)
            v_pages[page, :, : len(part)] = v[at : at + PAGE].transpose(1, 0, 2)
    if transposed:
        k_pages = np.ascontiguousarray(k_pages.transpose(0, 1, 3, 2))
    return PagedView(
        jnp.asarray(k_pages),
        jnp.asarray(v_pages),
        jnp.asarray(table),
        jnp.asarray(lengths),
        layout="transposed" if transposed else "rows",
    )


def same(got, expected):
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_rows_equal_dense(name, transposed):
    lengths, spec, n = [1, 4, 17, 0, 24], SPECS[name], 1
    drawn = texts(lengths)
    q = np.random.default_rng(2).standard_normal((5, n, HEADS, DIM)).astype(np.float32)
    out, lse = jax.jit(lambda q, view: Blockwise().rows(q, view, spec))(q, paged(drawn, lengths, transposed))
    for row, (k, v) in enumerate(drawn):
        if not lengths[row]:
            assert not np.any(out[row]) and np.all(np.isneginf(lse[row]))
            continue
        same((out[row], lse[row]), dense(q[row], k, v, np.array([len(k) - 1]), np.arange(len(k)), spec))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_prompts_equal_dense(name, transposed):
    lengths, counts, spec = [9, 0, 20, 5], [9, 0, 7, 1], SPECS[name]
    drawn = texts(lengths)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    q = np.random.default_rng(3).standard_normal((24, HEADS, DIM)).astype(np.float32)
    view = paged(drawn, lengths, transposed)
    out, lse = jax.jit(lambda q, view, at: Blockwise().prompt(q, view, at, spec))(q, view, starts)
    for row, (k, v) in enumerate(drawn):
        at = slice(starts[row], starts[row + 1])
        if counts[row]:
            positions = np.arange(lengths[row] - counts[row], lengths[row])
            same((out[at], lse[at]), dense(q[at], k, v, positions, np.arange(len(k)), spec))


def test_partial_results_merge():
    (k, v), spec = texts([20])[0], AttentionSpec(0.3)
    q, at = np.random.default_rng(4).standard_normal((3, HEADS, DIM)).astype(np.float32), np.array([3, 9, 19])
    whole = dense(q, k, v, at, np.arange(20), spec)
    # The first query sees nothing of the second half: an empty part changes nothing.
    halves = [dense(q, k[s], v[s], at, np.arange(20)[s], spec) for s in (slice(0, 8), slice(8, 20))]
    same(merge(*halves), whole)
    same(merge(*halves[::-1]), whole)
