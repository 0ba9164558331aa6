"""Probes equal their definitions in float64, obey their laws, and never hold a [T,S] matrix."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom.attention.ops import AttentionSpec, PagedView
from tokenloom.attention.probes import Noise, above, column_sums, logits, probabilities
from tokenloom.tests import attention_cases as cases

CASES = {case.name: case for case in cases.CASES}
# A prompt over more than one block of queries, which meet the same pages; the next one follows in the last block.
CASES["long-prompt"] = cases.Case("long-prompt", (150, 20), (141, 3), spec=AttentionSpec(0.125, window=90))
# One of each: layout, part, mask, dtype, soft cap, tree, page size, idle rows.
PROBED = [
    ("llama-prompt", "transposed"),
    ("gemma-decode-window-softcap", "rows"),
    ("chunks-and-window", "paired"),
    ("qwen-prompt-int8-bf16", "padded"),
    ("tree-of-33-window", "transposed"),
    ("tree-of-7-softcap-fp8", "rows"),
    ("one-token-pages-prompt", "paired"),
    ("full-rows-bf16", "transposed"),
    ("long-prompt", "rows"),
]


def posed(name, layout):
    """(case, problem, its lse as the op gives it, probabilities float64[count,Hq,length] of each row)."""
    case = CASES[name]
    problem = cases.build(case, layout)
    q = np.asarray(problem.q, np.float64).reshape(-1, case.heads, case.dim)
    matrices, at = [], 0
    for k, v, sees in zip(problem.k, problem.v, problem.sees):
        matrices.append(cases.softmax_attention(q[at : at + len(sees)], k, v, sees, case.spec)[2])
        at += len(sees)
    return case, problem, jnp.asarray(problem.lse, jnp.float32), matrices


def apart(matrices):
    """A probability that none of these comes near, so that rounding decides nothing."""
    logs = np.sort(np.log(np.concatenate([x[(x > 0.02) & (x < 0.2)] for x in matrices])))
    widest = np.diff(logs).argmax()
    return float(np.exp((logs[widest] + logs[widest + 1]) / 2))


def wide(matrices, view):
    """Rows of different lengths as one array [rows,...,S], zeros behind the end of a text."""
    S = view.table.shape[1] * view.page_size
    return np.stack([np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, S - x.shape[-1])]) for x in matrices])


def close(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name, layout", PROBED)
def test_sums_and_marks_are_their_definitions(name, layout):
    case, problem, lse, matrices = posed(name, layout)
    view, group = problem.view, case.heads // case.kv_heads
    weights = np.random.default_rng(0).uniform(0, 2, lse.shape[:-1]).astype(np.float32)
    alpha = apart(matrices)

    @jax.jit
    def probe(q, view, lse, weights):
        also = dict(query_starts=problem.query_starts, tree=problem.tree)
        sums = [
            column_sums(q, view, case.spec, lse, weights=weights, heads=h, **also) for h in ("sum", "max")
        ]
        marks = [above(q, view, case.spec, lse, least, **also) for least in (alpha, 0.0)]
        return sums, column_sums(q, view, case.spec, lse, **also), marks

    (summed, largest), plain, (marked, seen) = probe(problem.q, view, lse, weights)
    bounds = np.concatenate([[0], np.cumsum([len(x) for x in matrices])])
    each = [weights.reshape(-1)[start:stop] for start, stop in zip(bounds, bounds[1:])]  # noqa: RUF007
    grouped = [x.reshape(len(x), case.kv_heads, group, x.shape[-1]) for x in matrices]
    close(plain, wide([x.sum((0, 2)) for x in grouped], view))
    close(summed, wide([np.einsum("nhgs,n->hs", x, w) for x, w in zip(grouped, each)], view))
    close(largest, wide([np.einsum("nhs,n->hs", x.max(2), w) for x, w in zip(grouped, each)], view))
    expected = wide([(x >= alpha).any((0, 2)) for x in grouped], view)
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(marked, expected)
    expected = wide([np.broadcast_to(s.any(0), (case.kv_heads, s.shape[1])) for s in problem.sees], view)
    np.testing.assert_array_equal(seen, expected)
    # The law: each query gives out its weight once a head. Queries that see nothing give nothing.
    for row, (w, sees) in enumerate(zip(each, problem.sees)):
        close(summed[row].sum(-1), np.full(case.kv_heads, group * w[sees.any(1)].sum()), 1e-4)


@pytest.mark.parametrize("name, layout", PROBED)
def test_probabilities_are_rows_of_the_matrix(name, layout):
    case, problem, lse, matrices = posed(name, layout)
    counts = np.array([len(x) for x in matrices])[:, None]
    # The first, the last, one in the middle, one twice, and three that do not exist.
    index = np.concatenate([0 * counts, counts - 1, counts // 2, counts // 2, counts, counts + 99], 1)
    index = np.concatenate([index, np.full_like(counts, -1)], 1).astype(np.int32)

    @jax.jit
    def probe(q, view, lse, index):
        also = dict(query_starts=problem.query_starts, tree=problem.tree)
        return probabilities(q, view, case.spec, lse, index, **also)

    got = np.asarray(probe(problem.q, problem.view, lse, index))
    assert not got[:, :, 4:].any(), "tokens that do not exist attend to nothing"
    flat_out, at = problem.out.reshape(-1, case.heads, case.dim), 0
    for row, (p, count) in enumerate(zip(matrices, counts[:, 0])):
        if count:
            chosen = index[row, :4]
            close(got[row, :, :4, : p.shape[-1]], p[chosen].swapaxes(0, 1))
            visible = problem.sees[row][chosen].any(1)
            close(got[row, :, :4].sum(-1), np.broadcast_to(visible, (case.heads, 4)), 1e-4)
            values = np.repeat(problem.v[row], case.heads // case.kv_heads, axis=1)
            out = np.einsum("hrs,shd->rhd", got[row, :, :4, : p.shape[-1]], values)
            close(out, flat_out[at + chosen], 1e-4)
        assert not got[row, :, :, p.shape[-1] :].any()
        at += count


@pytest.mark.parametrize(
    "name, layout", [("gemma-decode-window-softcap", "paired"), ("mqa-decode-fp8", "rows")]
)
def test_logits_are_scores(name, layout):
    case, problem, _, matrices = posed(name, layout)
    got = jax.jit(lambda q, view: logits(q, view, case.spec))(problem.q, problem.view)
    got = np.asarray(got, np.float64)
    expected = wide([x[0] for x in matrices], problem.view)
    np.testing.assert_array_equal(np.isneginf(got), expected == 0)
    q = np.asarray(problem.q, np.float64)[:, 0]
    for row, k in enumerate(problem.k):
        scores = np.einsum("hd,shd->hs", q[row], np.repeat(k, case.heads // case.kv_heads, axis=1))
        scores = scores * case.spec.scale
        if case.spec.softcap is not None:
            scores = case.spec.softcap * np.tanh(scores / case.spec.softcap)
        sees = problem.sees[row][0]
        close(got[row][:, : len(sees)][:, sees], scores[:, sees])


def test_chunks_of_a_prompt_add_up_to_the_whole():
    """Sums with A2SF's weights, and rows of the matrix, over three chunks of two prompts."""
    case = replace(CASES["gpt2-prompt"], lengths=(37, 20), queries=(37, 20), padding=0, heads=4, kv_heads=2)
    problem = cases.build(case, "rows")
    q, lse, decay = np.asarray(problem.q), np.asarray(problem.lse, np.float32), 0.9
    weights = np.concatenate([decay ** np.arange(length - 1, -1, -1) for length in case.lengths])
    index = np.array([[36, 3, 15], [19, 7, 8]], np.int32)

    @jax.jit
    def probe(q, lengths, starts, lse, weights, index):
        view = replace(problem.view, lengths=lengths)
        sums = column_sums(q, view, case.spec, lse, weights=weights, query_starts=starts)
        return sums, probabilities(q, view, case.spec, lse, index, query_starts=starts)

    whole = probe(q, np.array([37, 20], np.int32), np.array([0, 37, 57], np.int32), lse, weights, index)
    added = [np.zeros_like(x) for x in whole]
    C, done = 57, np.zeros(2, int)
    for counts in ((16, 1), (5, 0), (16, 19)):
        taken = [slice(base + at, base + at + n) for base, at, n in zip((0, 37), done, counts)]
        parts = [np.concatenate([x[s] for s in taken]) for x in (q, lse, weights.astype(np.float32))]
        parts = [np.pad(x, [(0, C - len(x))] + [(0, 0)] * (x.ndim - 1)) for x in parts]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        lengths = np.where(np.array(counts) > 0, done + counts, 0).astype(np.int32)
        shifted = (index - done[:, None]).astype(np.int32)
        got = probe(parts[0], lengths, starts, parts[1], parts[2], shifted)
        added = [a + np.asarray(b) for a, b in zip(added, got)]
        done = done + counts
    assert tuple(done) == case.lengths
    for a, b in zip(added, whole):
        close(a, b)


def gumbel(key, queries, keys, heads):
    """The noise that `Noise` promises, float64[queries,heads,keys]."""
    fold = jax.random.fold_in
    each = jax.vmap(
        jax.vmap(lambda n, s: jax.random.gumbel(fold(fold(key, n), s), heads), (None, 0)), (0, None)
    )
    z = np.asarray(each(queries, keys), np.float64)
    return z.reshape(*z.shape[:2], -1).swapaxes(1, 2)


@pytest.mark.parametrize("queries, page_size", [((19, 0, 4), 16), (2, 4)])
def test_noisy_sums_are_keyformers(queries, page_size):
    """Scores with noise and a temperature have a softmax of their own, which gives out each query's weight once."""
    case = cases.Case("noisy", (19, 0, 9), queries, page_size=page_size, spec=AttentionSpec(0.125, window=12))
    problem = cases.build(case, "rows")
    noise = Noise(jax.random.split(jax.random.key(3), 3), jnp.array([1.0, 1.5, 2.0]))

    @jax.jit
    def probe(q, view, noise):
        return column_sums(q, view, case.spec, None, noise=noise, query_starts=problem.query_starts)

    got = np.asarray(probe(problem.q, problem.view, noise))
    q, at = np.asarray(problem.q, np.float64).reshape(-1, case.heads, case.dim), 0
    for row, (k, sees, count) in enumerate(zip(problem.k, problem.sees, case.counts)):
        length = len(k)
        if length:
            x = np.einsum("nhd,shd->nhs", q[at : at + count], np.repeat(k, 2, axis=1)) * case.spec.scale
            x = x + gumbel(noise.keys[row], np.arange(length - count, length), np.arange(length), (2, 2))
            f = np.where(sees[:, None], np.exp(x / float(noise.temperatures[row])), 0)
            f /= f.sum(-1, keepdims=True)
            close(got[row, :, :length], f.reshape(count, 2, 2, length).sum((0, 2)))
            close(got[row].sum(-1), np.full(2, 2 * count), 1e-4)
        assert not got[row, :, length:].any()
        at += count


def shapes(C, S, heads, kv_heads, dim, page_size):
    """A prompt part of one row with C tokens over S, to be compiled only."""
    pages = (S // page_size + 1, kv_heads, page_size, dim)
    view = PagedView(
        jax.ShapeDtypeStruct(pages, jnp.bfloat16),
        jax.ShapeDtypeStruct(pages, jnp.bfloat16),
        jax.ShapeDtypeStruct((1, S // page_size), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        layout="rows",
    )
    q = jax.ShapeDtypeStruct((C, heads, dim), jnp.bfloat16)
    return q, view, jax.ShapeDtypeStruct((C, heads), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)


@pytest.mark.parametrize("probe", ["sums", "marks", "rows"])
def test_no_matrix_is_held(probe):
    """A matrix of 8,192 x 8,192 for a single head would be 256 MiB in float32, 64 MiB as booleans."""
    spec, C = AttentionSpec(0.1, window=3000), 8192

    def program(q, view, lse, starts):
        if probe == "sums":
            return column_sums(q, view, spec, lse, query_starts=starts)
        if probe == "marks":
            return above(q, view, spec, lse, 1e-3, query_starts=starts)
        return probabilities(q, view, spec, lse, jnp.arange(8)[None], query_starts=starts)

    compiled = jax.jit(program).lower(*shapes(C, C, 8, 2, 16, 32)).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2**24


def test_wrong_shapes_name_both_sides():
    case, problem, lse, _ = posed("llama-prompt", "rows")
    q, view, starts, spec = problem.q, problem.view, problem.query_starts, case.spec
    with pytest.raises(ValueError, match="query_starts for the prompt part only"):
        column_sums(q, view, spec, lse)
    with pytest.raises(ValueError, match="lse, or noise and lse=None"):
        column_sums(q, view, spec, None, query_starts=starts)
    with pytest.raises(ValueError, match="pass what the op took and gave"):
        above(q, view, spec, lse[:-1], 0.1, query_starts=starts)
    with pytest.raises(ValueError, match=r"q has 4 rows, the view 2"):
        column_sums(q, view.rows(0, 2), spec, lse, query_starts=starts)
    with pytest.raises(ValueError, match=r"weights \(3,\)"):
        column_sums(q, view, spec, lse, weights=jnp.ones(3), query_starts=starts)
    with pytest.raises(ValueError, match="index has 1 rows, the view 4"):
        probabilities(q, view, spec, lse, jnp.zeros((1, 2), jnp.int32), query_starts=starts)
    with pytest.raises(ValueError, match="alpha=2"):
        above(q, view, spec, lse, 2.0, query_starts=starts)
    with pytest.raises(ValueError, match=r"not \[B,1,Hq,D\]"):
        logits(q, view, spec)
