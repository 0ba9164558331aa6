"""Ragged paged cases for attention back ends, and the check that a back end computes them.

How to use it, in a test of a back end (any frozen dataclass with `layout`, `rows` and `prompt`):

    @pytest.mark.parametrize("case", [c for c in CASES if ...], ids=str)
    def test_kernel(case):
        check(MyBackend(interpret=True), case)

`check` asks the back end how pages must lie, builds the case that way, runs it twice under jit and compares it with
numpy in float64, written from the definition and from the numbers as stored (rounded, dequantised). A back end that
refuses a case raises NotImplementedError out of `check`: name in your test which cases it may refuse. `CASES` are
named cases on the head shapes of real models with short texts; `drawn(seed)` draws more. To look at one case by hand:
`problem = build(case, "rows")`, then `run(backend, case, problem)` and `problem.out`, `problem.lse`.

What lies where nothing may be read: pages in no table are NaN; the null page (0, which fills tables past the end of a
text) and slots behind the end of a text hold 1e30, because a live engine leaves old but finite numbers there.
Lengths of the rectangular part are 0 (an idle row) or at least n. A prompt row may have a text and no query: half of a
step may hold none of its tokens (`attention/weave.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from tokenloom.attention.blockwise import Blockwise
from tokenloom.attention.ops import AttentionSpec, Backend, Layout, PagedView, Tree, merge
from tokenloom.tests.attention_pages import Pages, store

# Kernels and twin multiply the same numbers, and round weights in the same place; but the maxima that weights are taken
# from stand elsewhere, since tiles do, so a weight may be rounded up here and down there.
SLACK = 1.1


@dataclass(frozen=True)
class Case:
    """One call of a back end. `queries` is n of the rectangular part, or the query counts of prompt rows.

    `tree`: the n queries are slots of a draft tree, drawn at random; the last `idle` of them see no slot. `padding`:
    tokens of no row behind the prompt part. `spare`: table entries past the longest row. dtype is q's. With `parts` of
    a page's tokens only part number `part` lies here, page_size of them. `ends`: positions behind the queries of prompt
    rows (None: their lengths).
    """

    name: str
    lengths: tuple[int, ...]
    queries: int | tuple[int, ...] = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    page_size: int = 16
    spec: AttentionSpec = AttentionSpec(0.125)
    dtype: str = "float32"
    kv_dtype: str = "float32"
    tree: bool = False
    idle: int = 0
    padding: int = 3
    spare: int = 1
    seed: int = 0
    parts: int = 1
    part: int = 0
    ends: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def counts(self) -> tuple[int, ...]:
        return (self.queries,) * len(self.lengths) if isinstance(self.queries, int) else self.queries

    @property
    def span(self) -> int:
        """Tokens of a text that a page stands for."""
        return self.page_size * self.parts

    def here(self, length: int) -> np.ndarray:
        """bool[length]: which tokens of a text lie here."""
        return np.arange(length) % self.span // self.page_size == self.part

    @property
    def exact(self) -> bool:
        """Everything in float32: the result must be right to float32."""
        return self.dtype == self.kv_dtype == "float32"


@dataclass(frozen=True)
class Problem:
    """A case's arrays; k and v [tokens,Hkv,D] of each row as stored, sees bool[count,tokens] of each row, and what
    must come out, in float64: out like q, lse [..., Hq]."""

    q: jax.Array
    view: PagedView
    query_starts: jax.Array | None
    tree: Tree | None
    k: list[np.ndarray]
    v: list[np.ndarray]
    sees: list[np.ndarray]
    out: np.ndarray
    lse: np.ndarray


def softmax_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, sees: np.ndarray, spec: AttentionSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From the definition, in float64: q [N,Hq,D], k and v [S,Hkv,D], sees bool[N,S].

    Returns out [N,Hq,D], lse [N,Hq] and the probabilities [N,Hq,S].
    """
    shared_by = q.shape[1] // k.shape[1]
    k, v = (np.repeat(np.asarray(x, np.float64), shared_by, axis=1) for x in (k, v))
    scores = np.einsum("nhd,shd->nhs", np.asarray(q, np.float64), k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    scores = np.where(sees[:, None, :], scores, -np.inf)
    top = np.max(scores, -1, keepdims=True, initial=-1e300)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    probabilities = weights / np.where(total > 0, total, 1.0)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return np.einsum("nhs,shd->nhd", probabilities, v), lse, probabilities


def text_sees(spec: AttentionSpec, length: int, count: int, end: int | None = None) -> np.ndarray:
    """bool[count,length]: which tokens of a text its last `count` tokens see, or those in front of `end`."""
    end = length if end is None else end
    at, keys = np.arange(end - count, end)[:, None], np.arange(length)[None, :]
    seen = np.ones((count, length), bool)
    if spec.causal:
        seen = keys <= at if spec.chunk is None else keys // spec.chunk <= at // spec.chunk
    return seen if spec.window is None else seen & (keys > at - spec.window)


def draw_trees(draw: np.random.Generator, rows: int, n: int, idle: int) -> tuple[np.ndarray, np.ndarray]:
    """(ancestors bool[rows,n,n], itself included, depths i32[rows,n]) of random trees; idle slots see none."""
    ancestors, depths = np.zeros((rows, n, n), bool), np.zeros((rows, n), np.int32)
    for row in range(rows):
        for slot in range(n):
            if slot:
                parent = draw.integers(max(0, slot - 6), slot)
                ancestors[row, slot] = ancestors[row, parent]
                depths[row, slot] = depths[row, parent] + 1
            ancestors[row, slot, slot] = True
        ancestors[row, n - idle :] = False
    return ancestors, depths


def tree_sees(spec: AttentionSpec, length: int, ancestors: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """bool[n,length]: the text before the tree, then ancestors; a window counts text positions, not slots."""
    n = len(depths)
    before = length - n
    text = np.concatenate([np.arange(before), before + depths])
    seen = np.concatenate([np.ones((n, before), bool), ancestors], axis=1)
    return seen if spec.window is None else seen & (text[None, :] > (before + depths)[:, None] - spec.window)


def build(case: Case, layout: Layout) -> Problem:
    """The arrays of a case, and what must come out."""
    draw = np.random.default_rng(case.seed + 1)
    pages, stored = Pages(case, draw), ([], [])
    for row, length in enumerate(case.lengths):
        for which in range(2):
            x = draw.standard_normal((length, case.kv_heads, case.dim)).astype(np.float32)
            codes, scales, meant = store(x, case.kv_dtype)
            pages.fill(which, row, codes, scales)
            stored[which].append(meant)
    tokens = sum(case.counts) + (0 if isinstance(case.queries, int) else case.padding)
    q = draw.standard_normal((tokens, case.heads, case.dim)).astype(jnp.dtype(case.dtype))
    tree, ancestors, depths = None, None, None
    if case.tree:
        ancestors, depths = draw_trees(draw, len(case.lengths), case.counts[0], case.idle)
        tree = Tree.of(jnp.asarray(ancestors), jnp.asarray(depths), case.spec.window)
    out, lse = np.zeros((tokens, case.heads, case.dim)), np.full((tokens, case.heads), -np.inf)
    at, seen_by_row = 0, []
    for row, (length, count, end) in enumerate(zip(case.lengths, case.counts, case.ends or case.lengths)):
        here, at = slice(at, at + count), at + count
        if not length:
            seen = np.zeros((count, 0), bool)
        elif ancestors is not None and depths is not None:
            seen = tree_sees(case.spec, length, ancestors[row], depths[row])
        else:
            seen = text_sees(case.spec, length, count, end)
        seen = seen & case.here(length)
        seen_by_row.append(seen)
        out[here], lse[here], _ = softmax_attention(q[here], stored[0][row], stored[1][row], seen, case.spec)
    starts = None
    if isinstance(case.queries, int):
        rect = (len(case.lengths), case.queries, case.heads)
        q, out, lse = q.reshape(*rect, case.dim), out.reshape(*rect, case.dim), lse.reshape(rect)
    else:
        starts = jnp.asarray(np.concatenate([[0], np.cumsum(case.counts)]), jnp.int32)
    return Problem(jnp.asarray(q), pages.view(layout), starts, tree, *stored, seen_by_row, out, lse)


def run(
    backend: Backend, case: Case, problem: Problem, times: int = 1
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(out, lse) of `times` runs of the case, compiled once."""
    if problem.query_starts is None:
        program = jax.jit(lambda q, view, _, tree: backend.rows(q, view, case.spec, tree))
    else:
        ends = None if case.ends is None else jnp.asarray(case.ends, jnp.int32)
        program = jax.jit(lambda q, view, starts, _: backend.prompt(q, view, starts, case.spec, ends))
    results = [program(problem.q, problem.view, problem.query_starts, problem.tree) for _ in range(times)]
    return [(np.asarray(out), np.asarray(lse)) for out, lse in results]


def errors(problem: Problem, out: np.ndarray, lse: np.ndarray) -> tuple[float, float, float]:
    """(rms of out, worst of out, worst of lse), relative to the largest number of each head's out; lse absolute."""
    live = ~np.isneginf(problem.lse)
    if not live.any():
        return 0.0, 0.0, 0.0
    largest = np.abs(problem.out).max(-1, keepdims=True)
    off = (np.abs(out.astype(np.float64) - problem.out) / np.where(largest > 0, largest, 1.0))[live]
    return (
        float(np.sqrt((off**2).mean())),
        float(off.max()),
        float(np.abs(lse[live] - problem.lse[live]).max()),
    )


def judge(case: Case, problem: Problem, out: np.ndarray, lse: np.ndarray) -> None:
    """Asserts shapes, dtypes, what sees nothing, and the errors that need no twin."""
    assert out.shape == problem.out.shape and lse.shape == problem.lse.shape
    assert out.dtype == jnp.dtype(case.dtype) and lse.dtype == np.float32
    assert not np.isnan(out.astype(np.float32)).any() and not np.isnan(lse).any()
    blind = np.isneginf(problem.lse)
    assert not out[blind].any(), "queries that see nothing must give exactly 0"
    np.testing.assert_array_equal(
        np.isneginf(lse), blind, "lse = -inf where, and only where, nothing is seen"
    )
    if case.exact:
        np.testing.assert_allclose(out, problem.out, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lse, problem.lse, rtol=1e-5, atol=1e-5)
    _, worst, worst_lse = errors(problem, out, lse)
    assert worst <= 2e-2, f"out is off by {worst:.1e} of its head's largest number"
    assert worst_lse <= 2e-2, f"lse is off by {worst_lse:.1e}"


def check(backend: Backend, case: Case) -> None:
    """Asserts that the back end computes the case.

    All in float32: 1e-5, absolute and relative. Otherwise 2e-2 of a head's largest number, and root mean square (of
    out) and worst (of lse) errors at most `SLACK` times those of the plain twin, or 1e-5. Queries that see nothing
    give exactly 0 and -inf, there is no NaN, and a second run gives the same bits.
    """
    problem = build(case, backend.layout(case.dim))
    first, second = run(backend, case, problem, times=2)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b, "a second run gave other bits")
    judge(case, problem, *first)
    if case.exact or isinstance(backend, Blockwise):
        return
    [twin] = run(Blockwise(lie=problem.view.layout), case, problem)
    for name, ours, its in zip(("out, rms", "out", "lse"), errors(problem, *first), errors(problem, *twin)):
        if name != "out":
            assert ours <= max(1e-5, SLACK * its), f"{name}: error {ours:.1e}, the twin's is {its:.1e}"


def check_parts(backend: Backend, case: Case) -> None:
    """Asserts that the results of all parts of a split case merge to what its text gives whole."""
    parts = [build(replace(case, part=part), backend.layout(case.dim)) for part in range(case.parts)]
    found = [run(backend, case, problem)[0] for problem in parts]
    out, lse = (jnp.asarray(x, jnp.float32) for x in found[0])
    for other, its in found[1:]:
        out, lse = merge((out, lse), (jnp.asarray(other, jnp.float32), jnp.asarray(its)))
    heads, dim = case.heads, case.dim
    q, out, lse = (
        np.asarray(x).reshape(-1, heads, *n) for x, n in ((parts[0].q, (dim,)), (out, (dim,)), (lse, ()))
    )
    near, at = 1e-5 if case.exact else 2e-2, 0
    for row, (length, count, end) in enumerate(zip(case.lengths, case.counts, case.ends or case.lengths)):
        here, at = slice(at, at + count), at + count
        sees = np.logical_or.reduce([problem.sees[row] for problem in parts])
        if length and not case.tree:
            np.testing.assert_array_equal(sees, text_sees(case.spec, length, count, end))
        k, v = parts[0].k[row], parts[0].v[row]
        whole, total, _ = softmax_attention(q[here], k, v, sees, case.spec)
        np.testing.assert_allclose(out[here], whole, atol=near, rtol=near)
        np.testing.assert_allclose(lse[here], total, atol=near, rtol=near)


LLAMA = dict(heads=32, kv_heads=8, dim=128, spec=AttentionSpec(128**-0.5))
GEMMA = dict(heads=8, kv_heads=4, dim=256, spec=AttentionSpec(1 / 16, window=20, softcap=3.0))
PHI = dict(heads=32, kv_heads=32, dim=80, spec=AttentionSpec(80**-0.5))
PHI3 = dict(heads=32, kv_heads=32, dim=96, spec=AttentionSpec(96**-0.5, window=11))
GPT2 = dict(heads=12, kv_heads=12, dim=64)
QWEN = dict(heads=14, kv_heads=2, dim=64)
MQA = dict(heads=8, kv_heads=1, dim=128, spec=AttentionSpec(128**-0.5))
BF16 = dict(dtype="bfloat16", kv_dtype="bfloat16")
INT8 = dict(kv_dtype="int8")
FP8 = dict(kv_dtype="float8_e4m3fn")
FIRST, SECOND = dict(parts=2), dict(page_size=8, parts=2, part=1)


def _case(
    name: str, lengths: tuple[int, ...], queries: int | tuple[int, ...] = 1, *traits: dict, **more
) -> Case:
    settings = {name: value for trait in (*traits, more) for name, value in trait.items()}
    return Case(name, lengths, queries, **settings)


CASES = (
    _case("llama-decode", (1, 37, 0, 16, 32, 17), 1, LLAMA),
    _case("llama-decode-bf16", (5, 48, 0, 33), 1, LLAMA, BF16),
    _case("llama-decode-int8-q-bf16", (40, 1, 17), 1, LLAMA, INT8, dtype="bfloat16"),
    _case("llama-prompt", (9, 0, 40, 5), (9, 0, 21, 1), LLAMA),
    _case("llama-prompt-none-of-some", (30, 40, 17, 25), (0, 13, 0, 25), LLAMA),
    _case("llama-prompt-fp8", (25, 30), (25, 7), LLAMA, FP8),
    _case("gemma-decode-window-softcap", (64, 3, 21, 20, 19), 1, GEMMA),
    _case("gemma-prompt-window-softcap-bf16", (50, 12), (30, 12), GEMMA, BF16),
    _case("phi-decode-80", (31, 0, 16), 1, PHI),
    _case("phi-prompt-80-bf16", (20, 35), (20, 3), PHI, BF16),
    _case("phi3-prompt-96-window-in-page", (33, 14), (33, 2), PHI3),
    _case("gpt2-prompt", (1, 17, 2), (1, 17, 2), GPT2),
    _case("gpt2-decode-int8", (18, 70, 0, 1), 1, GPT2, INT8),
    _case("qwen-decode-group-of-7", (33, 16, 1), 1, QWEN),
    _case("qwen-prompt-int8-bf16", (40, 18, 0), (33, 18, 0), QWEN, INT8, dtype="bfloat16"),
    _case("mqa-decode-fp8", (29, 64), 1, MQA, FP8),
    _case("mqa-prompt-in-one-query", (64, 64), (1, 1), MQA),
    _case("several-rows-draft-4", (4, 40, 0, 19), 4, QWEN),
    _case("window-1", (40, 1, 16), 1, QWEN, spec=AttentionSpec(0.125, window=1)),
    _case("window-in-page-prompt", (45, 20), (40, 20), spec=AttentionSpec(0.125, window=5)),
    _case("window-beyond-text", (45, 1), 1, spec=AttentionSpec(0.125, window=4096)),
    _case("softcap-hard", (30, 18), (13, 18), spec=AttentionSpec(1.0, softcap=1.5)),
    _case("chunks-in-page", (35, 20, 7), (35, 9, 7), spec=AttentionSpec(0.125, chunk=5)),
    _case("chunks-across-pages", (70, 36, 0), (60, 36, 0), spec=AttentionSpec(0.125, chunk=24)),
    _case("chunks-rows", (48, 30), 6, spec=AttentionSpec(0.125, chunk=4)),
    _case("chunks-and-window", (50, 33), (50, 20), spec=AttentionSpec(0.125, chunk=12, window=17)),
    _case("full-prompt", (35, 0, 18), (35, 0, 4), spec=AttentionSpec(0.125, causal=False)),
    _case("full-rows-bf16", (35, 0, 18), 3, BF16, spec=AttentionSpec(0.125, causal=False)),
    _case("full-window", (40, 9), (30, 9), spec=AttentionSpec(0.125, causal=False, window=6)),
    _case("one-token-pages", (7, 0, 1, 12), 1, page_size=1),
    _case("one-token-pages-prompt", (7, 1, 12), (7, 1, 5), page_size=1),
    _case("pages-of-4-prompt", (8, 9, 4), (8, 9, 4), page_size=4),
    _case("pages-with-one-token", (17, 33, 49), (17, 17, 1), page_size=16),
    _case("pages-of-128", (130, 1, 128, 0), 1, LLAMA, page_size=128),
    _case("all-rows-empty", (0, 0), 1),
    _case("prompt-of-no-rows", (0, 0), (0, 0)),
    _case("tables-without-spare", (32, 16), (16, 16), spare=0),
    _case("tables-much-wider", (20, 16), 1, spare=9),
    _case("tree-of-1", (1, 30, 0), 1, QWEN, tree=True),
    _case("tree-of-7", (7, 40, 23, 0), 7, LLAMA, tree=True, idle=2),
    _case("tree-of-33-window", (33, 80, 49), 33, tree=True, idle=1, spec=AttentionSpec(0.125, window=9)),
    _case("tree-of-33-bf16", (60, 0, 34), 33, BF16, tree=True),
    _case("tree-of-64", (64, 100), 64, tree=True, idle=3),
    _case("tree-of-64-window-int8", (64, 90), 64, INT8, tree=True, spec=AttentionSpec(0.125, window=4)),
    _case("tree-of-7-softcap-fp8", (21, 7), 7, MQA, FP8, tree=True, spec=AttentionSpec(0.3, softcap=2.0)),
    _case("split-decode", (1, 37, 0, 16, 90, 17), 1, QWEN, SECOND),
    _case("split-rows-window-bf16", (40, 3, 61), 3, BF16, SECOND, spec=AttentionSpec(0.125, window=9)),
    _case("split-prompt", (70, 0, 12, 30), (70, 0, 3, 11), QWEN, FIRST),
    _case("split-prompt-window-int8", (70, 40), (30, 40), INT8, SECOND, spec=AttentionSpec(0.125, window=20)),
    _case("split-prompt-chunks", (70, 33), (61, 5), SECOND, spec=AttentionSpec(0.125, chunk=12)),
    _case("split-prompt-full-fp8", (45, 9), (20, 9), FP8, SECOND, spec=AttentionSpec(0.125, causal=False)),
    _case("split-prompt-of-what-was-before", (40, 0, 9), (20, 6, 3), SECOND, ends=(60, 6, 14)),
    _case("split-prompt-one-token-pages", (9, 4), (9, 2), page_size=1, parts=4, part=2),
    _case("split-tree-of-33-window", (33, 80, 49), 33, SECOND, tree=True, idle=1, spec=AttentionSpec(0.125, window=9)),
    _case("split-tree-of-7-bf16", (7, 90, 23, 0), 7, LLAMA, BF16, FIRST, tree=True),
    _case("prompt-in-the-middle", (60, 41), (20, 9), ends=(50, 20)),
    _case("prompt-window-beyond-its-text", (20, 9), (20, 9), ends=(40, 70), spec=AttentionSpec(0.125, window=12)),
)  # fmt: skip


def drawn(seed: int, page_sizes: tuple[int, ...] = (1, 4, 8, 16, 32)) -> Case:
    """A random ragged case: any part, mask, head shape, page size and dtype."""
    draw = np.random.default_rng(1000 + seed)
    size, rows = int(draw.choice(page_sizes)), int(draw.integers(1, 6))
    heads, kv_heads, dim = [(8, 2, 64), (4, 4, 80), (7, 1, 96), (6, 3, 128), (4, 1, 256)][draw.integers(5)]
    window = [None, 1, size - 1 or 1, size + 3, 1000][draw.integers(5)]
    softcap = [None, None, 2.0][draw.integers(3)]
    mask = [{}, {}, {"chunk": int(draw.integers(1, 2 * size + 2))}, {"causal": False}][draw.integers(4)]
    dtypes = [("float32", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "int8"),
              ("float32", "float8_e4m3fn"), ("float32", "bfloat16")][draw.integers(6)]  # fmt: skip
    lengths = [int(x) for x in draw.choice([0, 1, size, size + 1, *draw.integers(1, 60, 4)], rows)]
    spec = AttentionSpec(float(dim**-0.5), window=window, softcap=softcap, **mask)
    case = Case(f"drawn-{seed}", (), 1, heads, kv_heads, dim, size, spec, *dtypes, seed=seed)
    kind = ["rows", "tree", "prompt", "prompt"][draw.integers(4)]
    if kind == "prompt":
        counts = tuple(int(draw.integers(1, length + 1)) if length else 0 for length in lengths)
        return replace(case, lengths=tuple(lengths), queries=counts, padding=int(draw.integers(4)))
    n = int(draw.integers(1, 5) if kind == "rows" else draw.integers(1, 41))
    lengths = tuple(length + n - 1 if length else 0 for length in lengths)
    if kind == "rows":
        return replace(case, lengths=lengths, queries=n)
    spec = replace(spec, causal=True, chunk=None)
    return replace(case, lengths=lengths, queries=n, spec=spec, tree=True, idle=int(draw.integers(n)))


def drawn_split(seed: int) -> Case:
    """A case of `drawn`, of which 1/2 or 1/4 lies here."""
    draw, case = np.random.default_rng(2000 + seed), drawn(seed)
    parts = int(draw.choice([2, 4]))
    return replace(case, name=f"split-{seed}", parts=parts, part=int(draw.integers(parts)))
