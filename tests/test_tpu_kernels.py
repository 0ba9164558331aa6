"""The TPU kernel against float64, interpreted on CPU: one core and two, memory as NaN, races."""

from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from tokenloom.attention.ops import AttentionSpec
from tokenloom.pallas_kernels.attention.tiles import Case, TpuTiles
from tokenloom.pallas_kernels.attention.tpu import TpuKernels
from tokenloom.pallas_kernels.attention.worklist import flatten, prompt_ranges, row_ranges
from tokenloom.pallas_kernels.chips import TPUS
from tokenloom.tests.attention_cases import CASES, build, check, check_parts, drawn, drawn_split, run
from tokenloom.tests.devices import run_on
from tokenloom.tests.interpreter import raced, simulated

V5E, V4 = TPUS["TPU v5e"], TPUS["TPU v4"]
NAMED = {case.name: case for case in CASES}
ONE_CORE = (
    "llama-decode", "llama-decode-int8-q-bf16", "llama-prompt-fp8", "gemma-prompt-window-softcap-bf16",
    "llama-prompt-none-of-some",
    "phi-prompt-80-bf16", "phi3-prompt-96-window-in-page", "gpt2-prompt", "qwen-decode-group-of-7",
    "mqa-prompt-in-one-query", "chunks-across-pages", "full-rows-bf16", "one-token-pages-prompt",
    "all-rows-empty", "prompt-of-no-rows", "tree-of-33-window", "tree-of-64-window-int8",
    "split-decode", "split-prompt-chunks", "split-prompt-of-what-was-before", "prompt-in-the-middle",
    "split-prompt-one-token-pages", "split-tree-of-7-bf16",
)  # fmt: skip


@pytest.mark.parametrize("name", ONE_CORE)
def test_named_cases(name):
    check(TpuKernels(V5E, interpret=True), NAMED[name])


@pytest.mark.parametrize("seed", (*range(4), 127, 137))
def test_drawn_cases_on_two_cores(seed):
    """127 and 137: int8, bfloat16 queries and one dominant key, whose weight's rounding is the whole error."""
    check(TpuKernels(V4, interpret=True), drawn(seed))


@pytest.mark.parametrize("seed", range(4))
def test_drawn_split_cases(seed):
    check(TpuKernels(V4, interpret=True), drawn_split(seed))


@pytest.mark.parametrize("name", ["split-rows-window-bf16", "split-prompt", "split-tree-of-33-window"])
def test_parts_merge_to_the_whole(name):
    check_parts(TpuKernels(V5E, interpret=True), NAMED[name])


@pytest.mark.parametrize("name", ["qwen-decode-group-of-7", "gpt2-prompt", "split-prompt-window-int8"])
def test_memory_spaces_and_races(name):
    """TPU memories are simulated; what nobody wrote is NaN; two cores may not touch the same memory."""
    assert not raced(lambda: check(TpuKernels(V4, interpret=simulated(2)), NAMED[name]))


def test_a_race_is_noticed():
    """The detector that the test above trusts: two cores write the same block."""

    def body(out):
        out[...] = jnp.full(out.shape, pl.program_id(0), jnp.float32)

    def run():
        jax.block_until_ready(
            pl.pallas_call(
                body, grid=(2,), out_specs=pl.BlockSpec((8, 128), lambda core: (0, 0)),
                out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=simulated(2),
                compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            )()
        )  # fmt: skip

    assert raced(run)


def test_what_others_left_in_a_page_never_shows():
    """NaN behind the end of a text: weights of 0 times NaN would poison the row."""
    case = NAMED["pages-with-one-token"]
    backend = TpuKernels(V5E, interpret=True)
    problem = build(case, backend.layout(case.dim))
    pages = np.array(problem.view.k_pages)
    for row, length in enumerate(case.lengths):
        last = problem.view.table[row, (length - 1) // case.page_size]
        pages[last, :, (length - 1) % case.page_size + 1 :] = np.nan
    poisoned = replace(problem, view=replace(problem.view, k_pages=jnp.asarray(pages)))
    [clean], [out] = run(backend, case, problem), run(backend, case, poisoned)
    np.testing.assert_array_equal(out[0], clean[0])


def test_split_sequences_equal_whole_ones():
    """Two cores share a sequence at fixed places; merged, it is what one core computes."""
    case = NAMED["tables-much-wider"]
    case = replace(case, lengths=(150, 16, 0, 64), spec=AttentionSpec(0.125), page_size=16)
    for segment in (16, 64):
        check(TpuKernels(V4, True, TpuTiles(1, 1, segment)), case)


def test_a_row_does_not_depend_on_its_batch():
    """Alone, or beside longer and shorter rows: the same bits, also where two cores share the work."""
    case = NAMED["llama-decode"]
    backend = TpuKernels(V4, True, TpuTiles(1, 1, 16))
    problem = build(case, "rows")
    [(together, lse)] = run(backend, case, problem)
    for row in (1, 4):
        alone = replace(problem, q=problem.q[row : row + 1], view=problem.view.rows(row, row + 1))
        [(out, its)] = run(backend, case, alone)
        np.testing.assert_array_equal(out[0], together[row])
        np.testing.assert_array_equal(its[0], lse[row])


ON_A_MESH = """
import jax, numpy as np
from tokenloom.attention.sharded import Sharded
from tokenloom.pallas_kernels.attention.tpu import TpuKernels
from tokenloom.pallas_kernels.chips import TPUS
from tokenloom.tests.attention_cases import CASES, check

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("tensor",))
backend = Sharded(TpuKernels(TPUS["TPU v5e"], interpret=True), mesh, "tensor")
named = {case.name: case for case in CASES}
for name in ("gpt2-prompt", "qwen-decode-group-of-7", "gpt2-decode-int8"):
    check(backend, named[name])
try:
    check(backend, named["mqa-decode-fp8"])
except NotImplementedError as reason:
    print(reason)
"""


def test_heads_split_over_a_mesh():
    assert "1 KV heads do not split over 2 devices of axis 'tensor'" in run_on(2, "-c", ON_A_MESH)


@pytest.mark.parametrize("segment, cores, window", [(0, 1, None), (16, 2, None), (32, 3, 20)])
def test_every_visible_key_is_visited_once(segment, cores, window):
    """The list covers each (row, group) that a query sees exactly once, in order, cut between slots."""
    rows, step, spec = 5, 8, AttentionSpec(1.0, window=window)
    segments = -(-96 // segment) if segment else 1

    @jax.jit
    def build_list(lengths):
        ranges = row_ranges(lengths, 1, spec.visible, step, segments, segment)
        steps = flatten(ranges, rows * segments, rows * (12 + segments), cores)
        first, last = spec.visible(lengths - 1, lengths)
        return asdict(steps), first, last

    for lengths in np.random.default_rng(0).integers(0, 90, (20, rows)).astype(np.int32):
        steps, first, last = jax.tree.map(np.asarray, build_list(lengths))
        starts, slot, total = steps["starts"], steps["slot"], int(steps["starts"][-1])
        got = list(zip(steps["row"][:total].tolist(), steps["group"][:total].tolist()))
        want = [
            (row, group)
            for row in range(rows)
            if lengths[row] > 0
            for group in range(first[row] // step, last[row] // step + 1)
        ]
        assert got == want
        assert np.all(np.diff(slot[:total]) >= 0) and np.all(np.diff(starts) >= 0)
        live = int((steps["counts"] > 0).sum())
        assert int(steps["opens"][:total].sum()) == int(steps["closes"][:total].sum()) == live
        for cut in starts[1:-1]:
            assert cut in (0, total) or slot[cut - 1] != slot[cut]
        if segment:
            assert np.diff(starts).max() <= -(-total // cores) + segment // step


def test_prompt_blocks_visit_the_rows_that_overlap_them():
    starts, lengths = jnp.asarray([0, 5, 5, 20], jnp.int32), jnp.asarray([5, 0, 40], jnp.int32)
    ranges = prompt_ranges(starts, lengths, lengths, 3, 8, AttentionSpec(1.0).visible, 8)
    live = [tuple(int(x[i]) for x in (ranges.slot, ranges.row, ranges.first, ranges.count)) for i in range(9)]
    assert [one for one in live if one[3]] == [(0, 0, 0, 1), (0, 2, 0, 4), (1, 2, 0, 5), (2, 2, 0, 5)]


def test_tiles_fit_every_chip_or_are_refused():
    case = Case("prompt", 2048, 8, 4, 128, 128, 64, "bfloat16", "bfloat16")
    for chip in TPUS.values():
        assert TpuTiles.choose(case, chip).vmem_bytes(case) <= chip.memory
    wide = TpuKernels(V4, True, TpuTiles(4096, 16))
    with pytest.raises(NotImplementedError, match="MiB of VMEM; v4 has 16 MiB"):
        check(wide, NAMED["llama-prompt"])


def test_refusals_name_the_reason():
    problem = build(NAMED["one-token-pages"], "rows")
    with pytest.raises(NotImplementedError, match="pages of 1 tokens of float32: a TPU tile has 8 rows"):
        TpuKernels(V5E).rows(problem.q, problem.view, AttentionSpec(1.0))
    table = jnp.zeros((2, 1 << 17), jnp.int32)
    with pytest.raises(NotImplementedError, match="KiB of 1024 KiB of SMEM"):
        TpuKernels(V5E, True).rows(problem.q, replace(problem.view, table=table), AttentionSpec(1.0))
    problem = build(NAMED["one-token-pages"], "transposed")
    with pytest.raises(NotImplementedError, match="transposed"):
        TpuKernels(V5E).rows(problem.q, problem.view, AttentionSpec(1.0))
