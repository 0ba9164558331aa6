"""Every attention kernel compiled for every chip it is for, with none of them here: head dims, dtypes, masks, parts.

A cell of the grid compiles one call: for TPUs with libtpu's whole compiler, for GPUs down to the module that the
driver's compiler takes. `benchmarks/compile_grid.py` prints the grid, `test_compile_grid.py` runs a part of it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from tokenloom.attention.blockwise import Blockwise
from tokenloom.attention.caches.paged import PagedKV
from tokenloom.attention.ops import AttentionSpec, Backend, PagedView, Tree
from tokenloom.pallas_kernels.attention.tiles import Case, TpuTiles, TritonTiles
from tokenloom.pallas_kernels.attention.tpu import TpuKernels
from tokenloom.pallas_kernels.attention.triton import TritonKernels
from tokenloom.pallas_kernels.chips import GPUS, Chip
from tokenloom.pallas_kernels.lowering import lower_for_gpu

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4", "7x": "tpu7x:2x2x1"}
GPU_KINDS = {"h200": "NVIDIA H200", "a100": "NVIDIA A100", "l4": "NVIDIA L4"}
HEAD_DIMS = (64, 80, 96, 128, 256)
# Stored keys and values; queries are bfloat16 but for float32.
DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")
MASKS = {
    "causal": AttentionSpec(0.1),
    "window": AttentionSpec(0.1, window=300),
    "full": AttentionSpec(0.1, causal=False),
    "chunk": AttentionSpec(0.1, chunk=64),
    "tree": AttentionSpec(0.1),
}
ROWS, DRAFTS, CHUNK, PROMPTS, HEADS, KV_HEADS, PAGE, WIDTH, PAGES = 16, 8, 512, 4, 32, 8, 128, 32, 513


@dataclass(frozen=True)
class Cell:
    """`kernel` "tpu", "triton" or "twin"; `parts`: devices that share each page token by token."""

    kernel: str
    chip: str
    head_dim: int = 128
    dtype: str = "bfloat16"
    mask: str = "causal"
    part: str = "rows"
    parts: int = 1

    def __str__(self) -> str:
        split = "" if self.parts == 1 else f" 1/{self.parts}"
        return f"{self.kernel} {self.chip} {self.part} {self.head_dim} {self.dtype} {self.mask}{split}"


@dataclass(frozen=True)
class Outcome:
    """`status` "ok", "refused" (NotImplementedError, with its reason) or "failed". Bytes: what a step of the kernel
    needs by its own estimate, the chip's limit for that, and what the compiler took beside arguments and results."""

    cell: Cell
    status: str
    reason: str
    seconds: float
    needs: int | None = None
    limit: int | None = None
    temporary: int | None = None


def cells(full: bool, chips: tuple[str, ...] = ()) -> list[Cell]:
    """All cells, or those that differ from the plainest of their chip in one thing; only of `chips`, when given."""

    def kernels() -> Iterator[tuple[str, str]]:
        for chip in chips or (*TOPOLOGIES, *(GPU_KINDS if full else ("h200",))):
            yield ("tpu" if chip in TOPOLOGIES else "triton"), chip
            yield "twin", chip

    found = []
    for kernel, chip in kernels():
        for dim, dtype, mask, part in itertools.product(HEAD_DIMS, DTYPES, MASKS, ("rows", "prompt")):
            odd = (dim != 128) + (dtype != "bfloat16") + (mask != "causal")
            wanted = full or odd <= (1 if kernel != "twin" else 0)
            if wanted and not (mask == "tree" and part == "prompt"):
                found.append(Cell(kernel, chip, dim, dtype, mask, part))
        if kernel != "twin":
            found += [Cell(kernel, chip, mask="window", part=part, parts=2) for part in ("rows", "prompt")]
    return found


def available(chip: str) -> str:
    """Why cells of a chip cannot be compiled here; empty when they can."""
    if chip in GPU_KINDS or find_spec("libtpu") is not None:
        return ""
    return "libtpu is not installed (the dev extra brings it)"


@cache
def tpu(chip: str) -> Any:
    """A device of a slice that is not here."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]


def chip_of(name: str) -> Chip:
    if name in TOPOLOGIES:
        return Chip.of(tpu(name))
    return next(chip for chip in GPUS.values() if chip.name == name)


def backend_of(cell: Cell) -> Backend:
    if cell.kernel == "twin":
        return Blockwise(lie="rows")
    chip = chip_of(cell.chip)
    return TpuKernels(chip) if cell.kernel == "tpu" else TritonKernels(chip)


def call(cell: Cell, backend: Backend) -> tuple[Callable, tuple]:
    """The function of a cell, and the shapes of what it takes: (q, view, query_starts or the tree's bits, ...)."""
    spec, q_dtype = MASKS[cell.mask], jnp.dtype("float32" if cell.dtype == "float32" else "bfloat16")

    def empty() -> PagedKV:
        return PagedKV.empty(PAGES, PAGE, KV_HEADS, cell.head_dim, jnp.dtype(cell.dtype), (backend,))

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    pages = jax.eval_shape(empty)
    count = ROWS if cell.part == "rows" else PROMPTS
    view = PagedView(
        pages.k, pages.v, ints(count, WIDTH), ints(count), pages.k_scales, pages.v_scales, pages.layout
    )  # type: ignore[arg-type]
    if cell.parts > 1:
        view = replace(view, parts=cell.parts, first=ints())
    if cell.part == "prompt":
        q = jax.ShapeDtypeStruct((CHUNK, HEADS, cell.head_dim), q_dtype)
        return lambda q, view, starts: backend.prompt(q, view, starts, spec), (q, view, ints(PROMPTS + 1))
    n = DRAFTS if cell.mask == "tree" else 1
    q = jax.ShapeDtypeStruct((ROWS, n, HEADS, cell.head_dim), q_dtype)
    if cell.mask != "tree":
        return lambda q, view: backend.rows(q, view, spec), (q, view)
    tree = Tree(ints(ROWS, n, 1), ints(ROWS, n))  # type: ignore[arg-type]
    return lambda q, view, tree: backend.rows(q, view, spec, tree), (q, view, tree)


def needs(cell: Cell, arguments: tuple) -> tuple[int | None, int | None]:
    """What a step of the kernel needs of the chip's fast memory by its own estimate, and what there is."""
    if cell.kernel == "twin":
        return None, None
    chip, case = chip_of(cell.chip), Case.of(cell.part, *arguments[:2])
    if cell.kernel == "tpu":
        return TpuTiles.choose(case, chip).vmem_bytes(case), chip.memory
    return TritonTiles.choose(case, chip).shared_bytes(case), chip.memory


def compile_cell(cell: Cell, backend: Backend | None = None) -> Outcome:
    """Compile one cell; whatever goes wrong is its outcome."""
    start = time.perf_counter()
    try:
        function, arguments = call(cell, backend or backend_of(cell))
        outcome = Outcome(cell, "ok", "", 0.0, *needs(cell, arguments))
        if cell.chip in GPU_KINDS:
            lower_for_gpu(function, *arguments, kind=GPU_KINDS[cell.chip])
        else:
            place = SingleDeviceSharding(tpu(cell.chip))
            specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
            memory = jax.jit(function).lower(*specs).compile().memory_analysis()
            outcome = replace(outcome, temporary=memory.temp_size_in_bytes)
            if (
                memory.temp_size_in_bytes
                >= arguments[1].k_pages.size * arguments[1].k_pages.dtype.itemsize // 2
            ):
                outcome = replace(
                    outcome, status="failed", reason="the pages are copied: see the temporaries"
                )
    except NotImplementedError as reason:
        outcome = Outcome(cell, "refused", _line(reason), 0.0)
    except Exception as error:
        outcome = Outcome(cell, "failed", f"{type(error).__name__}: {_line(error)}", 0.0)
    return replace(outcome, seconds=time.perf_counter() - start)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
