"""The attention op: plain back ends compute the shared cases; partial results merge; sinks; who refuses what."""

import itertools
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom.attention.blockwise import Blockwise
from tokenloom.attention.ops import AttentionSpec, PagedView, attention, dense, merge, with_sinks
from tokenloom.tests import attention_cases as cases

# Odd settings: blocks and steps that do not divide anything, of one, and larger than everything.
TWINS = (
    Blockwise(),
    Blockwise(query_block=5, pages_a_step=3, lie="rows"),
    Blockwise(query_block=1, pages_a_step=1, lie="paired"),
    Blockwise(query_block=1000, pages_a_step=64, lie="transposed"),
    Blockwise(query_block=16, pages_a_step=2, lie="padded"),
)
EVERYWHERE = {"llama-prompt-fp8", "tree-of-7"}
PAIRS = [
    pytest.param(case, twin, id=f"{case}-{twin.lie}-{twin.query_block}-{twin.pages_a_step}")
    for index, case in enumerate(
        (*cases.CASES, *(kind(seed) for seed in range(3) for kind in (cases.drawn, cases.drawn_split)))
    )
    for place, twin in enumerate(TWINS)
    if place == index % len(TWINS) or (case.name in EVERYWHERE and place < 3)
]
SPEC = AttentionSpec(0.3)
partly, merging = jax.jit(dense, static_argnames="spec"), jax.jit(merge)


@pytest.mark.parametrize("case, twin", PAIRS)
def test_blockwise(case, twin):
    cases.check(twin, case)


@pytest.mark.parametrize("name", ["split-rows-window-bf16", "split-prompt"])
def test_parts_merge_to_the_whole(name):
    cases.check_parts(TWINS[0], next(case for case in cases.CASES if case.name == name))


@pytest.mark.parametrize("name", ["llama-decode-bf16", "qwen-prompt-int8-bf16", "llama-decode-int8-q-bf16"])
def test_the_twin_multiplies_in_the_dtype_of_queries(name):
    """Matrix units want bfloat16: scores and weighted values of bfloat16 queries, with sums in float32."""
    case = next(case for case in cases.CASES if case.name == name)
    problem, twin = cases.build(case, "rows"), Blockwise(lie="rows")

    def run(q, view, starts):
        if starts is None:
            return twin.rows(q, view, case.spec)
        return twin.prompt(q, view, starts, case.spec)

    text = jax.jit(run).lower(problem.q, problem.view, problem.query_starts).as_text()
    products = re.findall(r"dot_general.*contracting_dims = \[3\].*: \((.*), (.*)\) -> (.*)", text)
    assert len(products) == 2
    for left, right, out in products:
        assert left.endswith("xbf16>") and right.endswith("xbf16>") and out.endswith("xf32>")


@pytest.mark.parametrize("rows, dtype", [(1, "float32"), (64, "float32"), (64, "bfloat16")])
def test_the_twin_holds_no_matrix(rows, dtype):
    """8,192 queries, each over 8,192 tokens: scores of one head would be 256 MiB; q and out are 4 MiB each.

    Nor does it widen the pool: of 64 rows it would be 64 MiB of keys in float32.
    """
    make, twin, spec = jax.ShapeDtypeStruct, Blockwise(lie="rows"), AttentionSpec(0.1, window=3000)
    pages = make((1 + rows * 256, 2, 32, 16), jnp.bfloat16)
    view = PagedView(pages, pages, make((rows, 256), jnp.int32), make((rows,), jnp.int32), layout="rows")
    if rows == 1:
        q, starts = make((8192, 8, 16), dtype), make((2,), jnp.int32)
        lowered = jax.jit(lambda q, view, starts: twin.prompt(q, view, starts, spec)).lower(q, view, starts)
    else:
        q = make((rows, 8192 // rows, 8, 16), dtype)
        lowered = jax.jit(lambda q, view: twin.rows(q, view, spec)).lower(q, view)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**24


@pytest.mark.parametrize(
    "spec", [SPEC, AttentionSpec(0.9, window=7, softcap=2.0), AttentionSpec(0.3, chunk=6)]
)
def test_dense_is_the_definition(spec):
    q, k, v = texts(11, 29)
    sees = cases.text_sees(spec, 29, 11)
    expected = cases.softmax_attention(q, k, v, sees, spec)
    at, everything = (np.arange(18, 29), np.arange(29)), np.ones((11, 29), bool)
    same(partly(q, k, v, *at, spec, everything), expected)
    hidden = np.arange(29)[None, :] % 3 > 0
    expected = cases.softmax_attention(q, k, v, sees & hidden, spec)
    same(partly(q, k, v, *at, spec, np.broadcast_to(hidden, (11, 29))), expected)


def texts(queries, tokens, heads=4, kv_heads=2, dim=8):
    draw = np.random.default_rng(tokens)
    shapes = (queries, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim)
    return tuple(draw.standard_normal(shape).astype(np.float32) for shape in shapes)


def same(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got[0], expected[0], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(got[1], expected[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cuts", [(0,), (1,), (19,), (20,), (7, 8), (3, 3, 11), tuple(range(1, 20))])
def test_keys_split_anywhere_merge_to_the_whole(cuts):
    q, k, v = texts(3, 20)
    at = np.array([3, 9, 19])  # the first query sees nothing of the later parts
    whole = cases.softmax_attention(q, k, v, np.arange(20)[None, :] <= at[:, None], SPEC)
    bounds, parts = [0, *cuts, 20], []
    for start, stop in itertools.pairwise(bounds):
        mine = (np.arange(20) >= start) & (np.arange(20) < stop)
        parts.append(partly(q, k, v, at, np.where(mine, np.arange(20), -1), SPEC))
    for ordered in (parts, parts[::-1], parts[1:] + parts[:1]):
        merged = ordered[0]
        for part in ordered[1:]:
            merged = merging(merged, part)
        same(merged, whole)


def test_merge_with_nothing_changes_no_bit():
    q, k, v = texts(3, 20)
    part = partly(q, k, v, np.array([3, 9, 19]), np.arange(20), SPEC)
    nothing = jnp.zeros((3, 4, 8)), jnp.full((3, 4), -jnp.inf)
    for merged in (merging(part, nothing), merging(nothing, part)):
        np.testing.assert_array_equal(merged[0], part[0])
        np.testing.assert_array_equal(merged[1], part[1])
    out, lse = merging(nothing, nothing)
    assert not np.any(out) and np.all(np.isneginf(lse))


def test_merge_keeps_distant_parts_apart():
    """Parts whose lse lie 1e4 apart: the exponential of their difference must not overflow."""
    a = jnp.ones((1, 1, 4)), jnp.full((1, 1), -5e3)
    b = jnp.full((1, 1, 4), 2.0), jnp.full((1, 1), 5e3)
    for merged in (merge(a, b), merge(b, a)):
        same(merged, b)


def test_sinks_take_weight_and_have_no_value():
    q, k, v = texts(4, 20)
    at, sinks = np.array([0, 3, 9, 19]), np.array([-3.0, 0.0, 1.5, 6.0])
    sees = np.arange(20)[None, :] <= at[:, None]
    _, lse, probabilities = cases.softmax_attention(q, k, v, sees, SPEC)
    total = np.log(np.exp(lse) + np.exp(sinks))
    weights = probabilities * np.exp(lse - total)[..., None]
    out = np.einsum("nhs,shd->nhd", weights, np.repeat(v, 2, axis=1))
    np.testing.assert_allclose(weights.sum(-1) + np.exp(sinks - total), 1)
    same(with_sinks(*partly(q, k, v, at, np.arange(20), SPEC), jnp.asarray(sinks, jnp.float32)), (out, total))


def test_a_sink_is_all_that_an_idle_row_sees():
    case = next(case for case in cases.CASES if case.name == "all-rows-empty")
    problem, sinks = cases.build(case, "rows"), jnp.arange(4.0)
    program = jax.jit(lambda q, view: attention(q, view, SPEC, (Blockwise(lie="rows"),), sinks=sinks))
    out, lse = program(problem.q, problem.view)
    assert not np.any(out)
    np.testing.assert_allclose(lse, np.broadcast_to(np.arange(4.0), (2, 1, 4)))


@dataclass(frozen=True)
class Picky(Blockwise):
    """Refuses one part, and says why."""

    refuses: str = "rows"

    def rows(self, q, view, spec, tree=None):
        if self.refuses == "rows":
            raise NotImplementedError("no rows today")
        return super().rows(q, view, spec, tree)

    def prompt(self, q, view, query_starts, spec, ends=None):
        if self.refuses == "prompt":
            raise NotImplementedError("prompts on Mondays only")
        return super().prompt(q, view, query_starts, spec, ends)


@dataclass(frozen=True)
class Wrong(Blockwise):
    """Must never be asked."""

    def rows(self, q, view, spec, tree=None):
        raise AssertionError("a later back end was tried although an earlier one accepts")

    prompt = rows


@pytest.mark.parametrize("name", ["window-1", "pages-of-4-prompt"])
def test_back_ends_are_tried_in_order(name):
    case = next(case for case in cases.CASES if case.name == name)
    problem = cases.build(case, "transposed")
    refused = "rows" if problem.query_starts is None else "prompt"
    accepts = "prompt" if refused == "rows" else "rows"

    def tried(*backends):
        starts = problem.query_starts
        return jax.jit(lambda q, view: attention(q, view, case.spec, backends, query_starts=starts))(
            problem.q, problem.view
        )

    same(tried(Picky(refuses=refused), Picky(refuses=accepts), Wrong()), (problem.out, problem.lse))
    with pytest.raises(NotImplementedError) as raised:
        tried(Picky(refuses=refused), Picky(refuses=refused, query_block=3))
    reason = "no rows today" if refused == "rows" else "prompts on Mondays only"
    assert str(raised.value).count(f"Picky: {reason}") == 2
    with pytest.raises(NotImplementedError):
        tried()


def test_queries_and_pages_of_two_models_are_refused():
    case = next(case for case in cases.CASES if case.name == "window-1")
    for layout in ("transposed", "rows", "padded", "paired"):
        problem = cases.build(case, layout)
        backends = (Blockwise(lie=layout),)
        with pytest.raises(ValueError, match="13 query heads do not share 2 KV heads evenly"):
            attention(problem.q[:, :, :13], problem.view, case.spec, backends)
        with pytest.raises(ValueError, match=f"queries have heads of 200, for which {layout} pages hold"):
            attention(jnp.zeros((*problem.q.shape[:3], 200)), problem.view, case.spec, backends)


def test_errors_are_not_refusals():
    """A mistake in the input must not send the case on to the next back end."""

    class Mistaken(Blockwise):
        def rows(self, q, view, spec, tree=None):
            raise ValueError("q has 3 heads, the pages 2: pass a multiple")

    problem = cases.build(cases.CASES[0], "transposed")
    with pytest.raises(ValueError, match="pass a multiple"):
        attention(problem.q, problem.view, SPEC, (Mistaken(), Wrong()))


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(window=0), "window=0"),
        (dict(window=-4), "window=-4"),
        (dict(chunk=0), "chunk=0"),
        (dict(chunk=4, causal=False), "causal=True"),
    ],
)
def test_masks_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        AttentionSpec(0.3, **settings)
