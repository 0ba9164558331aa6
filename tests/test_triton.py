"""The Triton kernels: the shared cases in interpret mode, laws of bits, refusals, and lowering for a GPU."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom.attention.ops import AttentionSpec, PagedView, Tree
from tokenloom.pallas_kernels.attention.spec import Share
from tokenloom.pallas_kernels.attention.tiles import Case, TritonTiles
from tokenloom.pallas_kernels.attention.triton import TritonKernels
from tokenloom.pallas_kernels.attention.triton_rows import MOST_SEGMENTS, Cut
from tokenloom.pallas_kernels.attention.triton_softmax import pieces
from tokenloom.pallas_kernels.chips import GPUS, Chip
from tokenloom.pallas_kernels.lowering import lower_for_gpu
from tokenloom.tests import attention_cases as cases

# Few multiprocessors, so that every program has several items of the list, and some none.
SMALL = Chip("gpu", "small", 3, 227 << 10)
# Pages of 16 tokens are gathered, are whole tiles, or hold two; segments are of one tile, of several, never reached.
SHORT, ODD, LONG = TritonTiles(4, 16, 16), TritonTiles(3, 32, 96, programs=1), TritonTiles(16, 64, 512)
BY_NAME = {case.name: case for case in cases.CASES}
RUNS = {
    "llama-decode": SHORT,
    "llama-prompt": ODD,
    "llama-prompt-none-of-some": SHORT,
    "llama-decode-int8-q-bf16": SHORT,
    "llama-prompt-fp8": LONG,
    "gemma-decode-window-softcap": TritonTiles(3, 16, 48, programs=1),
    "phi-prompt-80-bf16": SHORT,
    "phi3-prompt-96-window-in-page": ODD,
    "several-rows-draft-4": TritonTiles(2, 16, 32),
    "chunks-across-pages": SHORT,
    "chunks-rows": ODD,
    "full-window": ODD,
    "one-token-pages-prompt": ODD,
    "pages-of-128": TritonTiles(1, 64, 64),
    "all-rows-empty": SHORT,
    "prompt-of-no-rows": SHORT,
    "tree-of-7-softcap-fp8": SHORT,
    "tree-of-33-window": TritonTiles(8, 16, 32),
    "split-decode": SHORT,
    "split-rows-window-bf16": TritonTiles(2, 16, 16),
    "split-prompt-window-int8": ODD,
    "split-prompt-full-fp8": SHORT,
    "split-prompt-of-what-was-before": ODD,
    "split-prompt-one-token-pages": SHORT,
    "split-tree-of-33-window": TritonTiles(8, 16, 32),
    "prompt-in-the-middle": SHORT,
    "prompt-window-beyond-its-text": ODD,
}


@pytest.mark.parametrize("name", RUNS)
def test_cases(name):
    cases.check(TritonKernels(SMALL, interpret=True, tiles=RUNS[name]), BY_NAME[name])


@pytest.mark.parametrize("seed", (1, 2, 127, 137))
def test_drawn_cases_with_the_heuristic(seed):
    cases.check(TritonKernels(SMALL, interpret=True), cases.drawn(seed))


@pytest.mark.parametrize("seed", range(4))
def test_drawn_split_cases(seed):
    cases.check(TritonKernels(SMALL, interpret=True), cases.drawn_split(seed))


@pytest.mark.parametrize("name", ["split-decode", "split-prompt-chunks", "split-tree-of-7-bf16"])
def test_parts_merge_to_the_whole(name):
    cases.check_parts(TritonKernels(SMALL, interpret=True, tiles=SHORT), BY_NAME[name])


@pytest.mark.parametrize("queries", [1, (1, 1)])
def test_what_no_query_sees_may_be_nan(queries):
    """Behind the ends of texts, and before their windows: a page there may have been given to somebody else."""
    case = cases.Case("nan", (37, 16), queries, spec=AttentionSpec(0.125, window=9), padding=0)
    problem = cases.build(case, "rows")
    k, v = np.full(problem.view.k_pages.shape, np.nan, np.float32), np.full_like(problem.view.k_pages, np.nan)
    table = np.asarray(problem.view.table).copy()
    for row, length in enumerate(case.lengths):
        at = np.arange(length - 9, length)
        here = table[row, at // 16], slice(None), at % 16
        k[here], v[here] = problem.k[row][at], problem.v[row][at]
        table[row, : (length - 9) // 16] = -7
    view = replace(problem.view, k_pages=jnp.asarray(k), v_pages=jnp.asarray(v), table=jnp.asarray(table))
    kernel = TritonKernels(SMALL, interpret=True, tiles=ODD)
    [(out, lse)] = cases.run(kernel, case, replace(problem, view=view))
    np.testing.assert_allclose(out, problem.out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, problem.lse, rtol=1e-5, atol=1e-5)


def test_no_tokens():
    case = cases.Case("none", (0,), (0,), padding=0)
    cases.check(TritonKernels(SMALL, interpret=True), case)


def test_a_row_gives_the_same_bits_alone_and_in_any_batch():
    """Rows of other lengths, a wider table and other programs change nothing: segments follow the row alone."""
    kernel = TritonKernels(SMALL, interpret=True, tiles=SHORT)
    case = replace(BY_NAME["llama-decode"], lengths=(70, 3, 0, 41), heads=4, kv_heads=2)
    problem = cases.build(case, "rows")
    [(out, lse)] = cases.run(kernel, case, problem)
    for row, cores, wider in ((0, 50, 40), (3, 1, 0)):
        view = problem.view.rows(row, row + 1)
        view = replace(view, table=jnp.pad(view.table, ((0, 0), (0, wider))))
        other = replace(kernel, chip=replace(SMALL, cores=cores))
        [(own, own_lse)] = cases.run(other, case, replace(problem, q=problem.q[row : row + 1], view=view))
        np.testing.assert_array_equal(own[0], out[row])
        np.testing.assert_array_equal(own_lse[0], lse[row])


def test_a_prompt_gives_the_same_bits_alone_and_cut_into_chunks():
    """Where rows begin with a block. (Elsewhere a tile may be masked here and not there, and the interpreter's
    exponentials differ in the last bit between its loops.)"""
    kernel = TritonKernels(SMALL, interpret=True, tiles=ODD)
    case = replace(BY_NAME["llama-prompt"], lengths=(40, 50), queries=(18, 50), heads=4, kv_heads=2)
    problem = cases.build(case, "rows")
    [(out, lse)] = cases.run(kernel, case, problem)
    for start, stop in ((0, 50), (21, 50)):
        view = replace(problem.view.rows(1, 2), lengths=jnp.asarray([stop], jnp.int32))
        starts = jnp.asarray([0, stop - start], jnp.int32)
        here = slice(18 + start, 18 + stop)
        [(own, own_lse)] = cases.run(
            kernel, case, replace(problem, q=problem.q[here], view=view, query_starts=starts)
        )
        np.testing.assert_array_equal(own, out[here])
        np.testing.assert_array_equal(own_lse, lse[here])


@pytest.mark.parametrize("window", [None, 1, 40, 5000])
@pytest.mark.parametrize("n", [1, 5])
def test_segments_cover_what_a_row_sees(window, n):
    cut = Cut(AttentionSpec(1.0, window=window), n, 100_000, 16, 64)
    lengths = jnp.asarray([0, 1, 15, 16, 17, 63, 64, 65, 8191, 8192, 8193, 16385, 99_999, 100_000], jnp.int32)
    start, size, segments = (np.asarray(x) for x in cut.of(lengths, Share()))
    sees = np.asarray(cut.low(lengths, Share()))
    assert segments.max() <= cut.most <= MOST_SEGMENTS
    assert not (start % 16).any() and not (size % 16).any()
    assert (start <= sees).all() and (sees - start < 16).all()
    assert (start + size * segments >= lengths).all() and (
        size * (segments - 1) < np.maximum(lengths - start, 1)
    ).all()


def test_pieces_are_powers_of_two():
    assert pieces(128) == ((0, 128),)
    assert pieces(80) == ((0, 64), (64, 16))
    assert pieces(112) == ((0, 64), (64, 32), (96, 16))


def small_view(
    dtype="bfloat16", dim=64, page_size=16, pages=8, kv_heads=2, scaled=True, width=4, rows=2, layout="rows"
):
    """A view of shapes only."""
    dtype = jnp.dtype(dtype)
    shape, scales = jax.ShapeDtypeStruct((pages, kv_heads, page_size, dim), dtype), None
    if scaled and dtype.itemsize == 1:
        scales = jax.ShapeDtypeStruct(shape.shape[:3], jnp.float32)
    table = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    return PagedView(
        shape, shape, table, jax.ShapeDtypeStruct((rows,), jnp.int32), scales, scales, layout=layout
    )


def lowered(kernels, view, spec, part, n=1, heads=8, dtype="bfloat16", tree=False):
    dim, rows = view.k_pages.shape[-1], view.lengths.shape[0]
    if part == "prompt":
        q, starts = (
            jax.ShapeDtypeStruct((50, heads, dim), dtype),
            jax.ShapeDtypeStruct((rows + 1,), jnp.int32),
        )
        return lower_for_gpu(lambda q, v, s: kernels.prompt(q, v, s, spec), q, view, starts)
    ints = jax.ShapeDtypeStruct((rows, n, -(-n // 32)), jnp.int32), jax.ShapeDtypeStruct((rows, n), jnp.int32)
    q = jax.ShapeDtypeStruct((rows, n, heads, dim), dtype)
    return lower_for_gpu(lambda q, v, t: kernels.rows(q, v, spec, t), q, view, Tree(*ints) if tree else None)


@pytest.mark.parametrize(
    "view, message",
    [
        (small_view(layout="paired"), "lie 'paired'"),
        (small_view(dim=72), "multiple of 16"),
        (small_view("float8_e5m2"), "float8_e5m2"),
        (small_view("int8", pages=1 << 20, dim=128), "32 bits"),
        (small_view("float32", dim=1024), "shared memory"),
    ],
)
def test_refuses(view, message):
    with pytest.raises(NotImplementedError, match=message):
        lowered(TritonKernels(SMALL, tiles=TritonTiles(1, 64, 64)), view, AttentionSpec(1.0), "rows")


def test_refuses_float8_before_ada():
    with pytest.raises(NotImplementedError, match="float8_e4m3fn on a100"):
        lowered(TritonKernels(GPUS["A100"]), small_view("float8_e4m3fn"), AttentionSpec(1.0), "rows")


@pytest.mark.parametrize(
    "view, tiles, message",
    [
        (small_view(kv_heads=3), None, "8 heads of 64, the pages 3 of 64"),
        (small_view("int8", scaled=False), None, "need k_scales"),
        (small_view(), TritonTiles(1, 24, 48), "power of two"),
        (small_view(), TritonTiles(1, 32, 48), "multiple of keys"),
    ],
)
def test_says_what_is_wrong(view, tiles, message):
    with pytest.raises(ValueError, match=message):
        lowered(TritonKernels(SMALL, tiles=tiles), view, AttentionSpec(1.0), "rows")


MASKS = {
    "causal": AttentionSpec(0.1),
    "window": AttentionSpec(0.1, window=9, softcap=30.0),
    "full": AttentionSpec(0.1, causal=False),
    "chunk": AttentionSpec(0.1, chunk=12),
}
GRID = [
    (dim, dtypes, mask, part)
    for at, dim in enumerate((64, 80, 96, 128, 256))
    for by, dtypes in enumerate(
        ("bfloat16 bfloat16", "float32 float32", "bfloat16 int8", "bfloat16 float8_e4m3fn")
    )
    for mask in [list(MASKS)[(at + by) % len(MASKS)]]
    for part in ("rows", "prompt")
]


@pytest.mark.parametrize("dim, dtypes, mask, part", GRID)
def test_lowers_for_a_gpu(dim, dtypes, mask, part):
    dtype, pages = dtypes.split()
    text = lowered(
        TritonKernels(GPUS["H200"]), small_view(pages, dim), MASKS[mask], part, dtype=dtype
    ).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1, "a reach of 64 tokens needs no merging"


def test_lowers_trees_long_texts_and_pools_beyond_4_gib():
    kernels, spec = TritonKernels(GPUS["H200"]), AttentionSpec(0.1)
    text = lowered(kernels, small_view(width=4096), spec, "rows", n=40, tree=True).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
    big = small_view(pages=1 << 22)
    assert big.k_pages.size * 2 > 1 << 32
    lowered(kernels, big, spec, "rows")
    lowered(kernels, big, spec, "prompt")


@pytest.mark.parametrize("chip", ["H200", "A100", "L4"])
@pytest.mark.parametrize("dtypes", ["bfloat16 bfloat16", "bfloat16 int8", "float32 float32", "float32 int8"])
def test_chosen_tiles_fit(chip, dtypes):
    """float32 needs much room: not every wide head fits."""
    for dim, group in itertools.product((64, 80, 128, 256), (1, 7, 64)):
        if dtypes.startswith("float32") and (dim > 128 or group > 7):
            continue
        for part, tokens in (("rows", 1), ("rows", 64), ("prompt", 2048)):
            case = Case(part, tokens, 2, group, dim, 16, 100, *dtypes.split())
            tiles = TritonTiles.choose(case, GPUS[chip])
            tiles.check(case, GPUS[chip])
            assert tiles.queries <= max(1, 128 // group)
            assert part == "prompt" or tiles.segment >= 32 * tokens * group
