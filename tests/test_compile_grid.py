"""A part of the grid of `compile_grid.py`: kernels compile for chips that are not here, and without copying pages."""

from dataclasses import dataclass

import jax
import pytest
from tokenloom.attention.blockwise import Blockwise
from tokenloom.tests.compile_grid import Cell, available, call, cells, compile_cell

TPU = [
    Cell("tpu", "v5e", mask="window"),
    Cell("tpu", "v6e", 64, "int8", "tree"),
    Cell("tpu", "v4", 80, "float32"),
    Cell("tpu", "7x", 96, mask="chunk", part="prompt"),
    Cell("tpu", "v5e", mask="window", part="prompt", parts=2),
    Cell("tpu", "v5p", 64, "int8", "tree", parts=4),
]
GPU = [
    Cell("triton", "h200", dim, dtype, mask, part)
    for dim, dtype, mask, part in (
        (64, "bfloat16", "tree", "rows"),
        (80, "int8", "causal", "rows"),
        (128, "float8_e4m3fn", "window", "prompt"),
        (256, "bfloat16", "chunk", "prompt"),
        (96, "float32", "full", "rows"),
    )
] + [
    Cell("triton", "h200", 64, "int8", "tree", parts=4),
    Cell("triton", "h200", mask="window", part="prompt", parts=2),
]


@pytest.mark.tpu_topology
@pytest.mark.parametrize("cell", TPU, ids=str)
def test_tpu_kernels_compile(cell):
    if reason := available(cell.chip):
        pytest.skip(reason)
    found = compile_cell(cell)
    assert found.status == "ok", found.reason
    assert found.needs is not None and found.limit is not None and found.needs <= found.limit


@pytest.mark.parametrize("cell", GPU, ids=str)
def test_gpu_kernels_lower(cell):
    found = compile_cell(cell)
    assert found.status == "ok", found.reason
    assert found.needs is not None and found.limit is not None and found.needs <= found.limit


def test_the_grid_is_what_it_says():
    full, short = cells(True), cells(False)
    assert set(short) < set(full) and len(set(full)) == len(full)
    chips = {cell.chip for cell in full}
    assert chips == {"v4", "v5e", "v5p", "v6e", "7x", "h200", "a100", "l4"}
    # 5 head dims x 4 dtypes x (5 masks of rows, 4 of prompts), by a kernel and by the twin; both parts of split pages.
    assert len(full) == len(chips) * (180 * 2 + 2)


def test_refusals_and_failures_are_told_apart():
    @dataclass(frozen=True)
    class Refusing(Blockwise):
        def rows(self, *arguments, **more):
            raise NotImplementedError("no such mask")

    @dataclass(frozen=True)
    class Broken(Blockwise):
        def rows(self, *arguments, **more):
            raise TypeError("two\nlines")

    cell = Cell("twin", "h200")
    refused, failed = (compile_cell(cell, kind(lie="rows")) for kind in (Refusing, Broken))
    assert (refused.status, refused.reason) == ("refused", "no such mask")
    assert (failed.status, failed.reason) == ("failed", "TypeError: two lines")


@pytest.mark.tpu_topology
def test_copied_pages_are_a_failure():
    if reason := available("v5e"):
        pytest.skip(reason)

    @dataclass(frozen=True)
    class Copying(Blockwise):
        def rows(self, q, view, spec, tree=None):
            pages = jax.lax.optimization_barrier(view.k_pages + 1)
            return q + pages[view.table[0, 0], 0, 0], q[..., 0]

    found = compile_cell(Cell("twin", "v5e"), Copying(lie="rows"))
    assert found.status == "failed" and "copied" in found.reason, found


def test_calls_have_the_shapes_of_their_cell():
    _, (q, view, tree) = call(Cell("twin", "h200", 64, "int8", "tree"), Blockwise(lie="rows"))
    assert q.shape == (16, 8, 32, 64) and q.dtype == "bfloat16" and tree.bits.shape == (16, 8, 1)
    assert view.k_pages.dtype == "int8" and view.k_scales.shape == view.k_pages.shape[:3]
    _, (q, view, starts) = call(Cell("twin", "h200", 96, "float32", part="prompt"), Blockwise(lie="rows"))
    assert q.shape == (512, 32, 96) and q.dtype == "float32" and starts.shape == (view.lengths.shape[0] + 1,)
