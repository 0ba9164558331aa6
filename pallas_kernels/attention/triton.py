"""Attention over paged KV on GPU, in Pallas kernels that Triton compiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..chips import Chip
from .spec import AttentionSpec, Layout, PagedView, Tree
from .tiles import Case, TritonTiles
from .triton_prompt import PromptKernel
from .triton_rows import Cut, MergeKernel, RowsKernel
from .triton_softmax import Product
from .tuned import Tuned

PAGES = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")
# Triton converts float8_e4m3fn from compute capability 8.9 on.
WITHOUT_FLOAT8 = ("a100",)


@dataclass(frozen=True)
class TritonKernels:
    """`interpret` runs the kernels on CPU. `tiles` overrides the choice, for measuring; cases near to one that was
    measured take the `tuned` tiles."""

    chip: Chip
    interpret: bool = False
    tiles: TritonTiles | None = None
    tuned: Tuned[TritonTiles] = Tuned()

    def layout(self, head_dim: int) -> Layout:
        del head_dim
        return "rows"

    def rows(
        self, q: jax.Array, view: PagedView, spec: AttentionSpec, tree: Tree | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """See `Backend.rows`. One kernel, or two where a row may have more than one segment."""
        if not q.size:
            return _nothing(q)
        B, n, heads, dim = q.shape
        product = Product.of(q.dtype, view.k_pages.dtype, self.interpret)
        tiles = self._tiles("rows", q, view, spec)
        cut = Cut(spec, n, view.table.shape[1] * view.page_size, tiles.keys, tiles.segment)
        items, blocks = B * cut.most, -(-n // tiles.queries)
        programs = min(self.chip.cores * tiles.programs, items * view.kv_heads * blocks)
        dtype = q.dtype if cut.most == 1 else jnp.float32
        outs, lses = self._call(
            RowsKernel(cut, tiles, product, programs), (programs,), tiles,
            jax.ShapeDtypeStruct((items, n, heads, dim), dtype),
        )(q, view, tree)  # fmt: skip
        if cut.most == 1:
            return outs, lses
        merging = TritonTiles(1, tiles.keys, tiles.segment, 1, 1)
        return self._call(MergeKernel(cut), (B, n, heads), merging, q)(view.lengths, view.share, outs, lses)

    def prompt(
        self, q: jax.Array, view: PagedView, query_starts: jax.Array, spec: AttentionSpec,
        ends: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """See `Backend.prompt`."""
        if not q.size:
            return _nothing(q)
        tiles = self._tiles("prompt", q, view, spec)
        product = Product.of(q.dtype, view.k_pages.dtype, self.interpret)
        grid = (-(-q.shape[0] // tiles.queries), view.kv_heads)
        return self._call(PromptKernel(spec, tiles, product), grid, tiles, q)(q, query_starts, view, ends)

    def _call(self, kernel: Any, grid: tuple[int, ...], tiles: TritonTiles, out: Any) -> Any:
        """A Pallas call that gives (out, lse): out like `out`, lse f32 without its last dimension."""
        shapes = jax.ShapeDtypeStruct(out.shape, out.dtype), jax.ShapeDtypeStruct(out.shape[:-1], jnp.float32)
        return pl.pallas_call(
            kernel.__call__, shapes, grid=grid, interpret=self.interpret, name=type(kernel).__name__,
            compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        )  # fmt: skip

    def _tiles(self, part: str, q: jax.Array, view: PagedView, spec: AttentionSpec) -> TritonTiles:
        """The tiles of a case; NotImplementedError for what the kernels cannot do, ValueError for what is wrong."""
        heads, dim = q.shape[-2:]
        if view.layout != "rows" or view.v_pages is None:
            raise NotImplementedError(f"pages lie {view.layout!r}; the Triton kernels read 'rows'")
        if heads % view.kv_heads or dim != view.k_pages.shape[-1]:
            raise ValueError(
                f"q has {heads} heads of {dim}, the pages {view.kv_heads} of {view.k_pages.shape[-1]}: give as many "
                "query heads as a multiple of KV heads, of the same size"
            )
        pages = view.k_pages.dtype
        if pages.name not in PAGES or (pages.name == "float8_e4m3fn" and self.chip.name in WITHOUT_FLOAT8):
            raise NotImplementedError(f"pages of {pages.name} on {self.chip.name}")
        if (view.k_scales is None or view.v_scales is None) and pages.itemsize == 1:
            raise ValueError(
                f"pages of {pages.name} need k_scales and v_scales, f32 [pages, KV heads, page size]"
            )
        if spec.scale <= 0:
            raise NotImplementedError(f"scale={spec.scale}: the largest score is found before scaling")
        if dim % 16:
            raise NotImplementedError(
                f"head dim {dim} is no multiple of 16, the least that Triton multiplies"
            )
        if 2**31 < view.k_pages.size <= 2**32 and pages.itemsize == 1:
            raise NotImplementedError(
                f"{view.k_pages.size} elements of one byte: Pallas computes offsets of arrays up to 4 GiB in 32 bits, "
                "which reach 2**31 elements; use fewer pages, or more than 4 GiB"
            )
        case = Case.of(part, q, view)
        tiles = self.tiles or self.tuned.lookup(case) or TritonTiles.choose(case, self.chip)
        tiles.check(case, self.chip)
        return tiles


def _nothing(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of no tokens: a grid has at least one program."""
    return q, jnp.zeros(q.shape[:-1], jnp.float32)
