"""Tile sizes of the attention kernels: a frozen dataclass a kernel, and a heuristic from shapes, dtypes and chip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from ..chips import Chip
from .spec import PagedView


@dataclass(frozen=True, order=True)
class Case:
    """What tiles depend on. `part` "rows" or "prompt"; `tokens`: query tokens a row (rows) or in all (prompt);
    heads as one device sees them."""

    part: str
    tokens: int
    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    width: int
    q_dtype: str
    kv_dtype: str

    @staticmethod
    def of(part: str, q: jax.Array, view: PagedView) -> Case:
        """The case of a part: q [B,n,Hq,D] of "rows", [C,Hq,D] of "prompt"."""
        tokens, heads, dim = q.shape[-3:]
        return Case(
            part, tokens, view.kv_heads, heads // view.kv_heads, dim, view.page_size, view.table.shape[1],
            q.dtype.name, view.k_pages.dtype.name,
        )  # fmt: skip


@dataclass(frozen=True)
class TpuTiles:
    """`queries`: prompt tokens a block; `pages`: pages a step; `segment`: tokens after which a sequence is split, so
    that two cores share it (a multiple of pages * page_size; 0: never)."""

    queries: int
    pages: int
    segment: int = 0

    @staticmethod
    def choose(case: Case, chip: Chip) -> TpuTiles:
        """About 512 rows of packed queries against 512 keys, halved until the step fits in three quarters of VMEM."""
        tiles = TpuTiles(
            case.tokens
            if case.part == "rows"
            else min(-(-case.tokens // 8) * 8, max(8, 512 // case.group // 8 * 8)),
            max(1, min(case.width, 512 // case.page_size, 16)),
        )
        while tiles.vmem_bytes(case) > chip.memory * 3 // 4:
            if case.part == "prompt" and tiles.queries > 8 and tiles.queries * case.group >= 128:
                tiles = replace(tiles, queries=tiles.queries // 16 * 8)
            elif tiles.pages > 1:
                tiles = replace(tiles, pages=tiles.pages // 2)
            else:
                break
        step = tiles.pages * case.page_size
        split = chip.cores > 1 and case.part == "rows"
        return replace(tiles, segment=-(-4096 // step) * step if split else 0)

    def vmem_bytes(self, case: Case) -> int:
        """What a step needs: blocks twice (the pipeline fetches the next), the running state, one head's scores."""
        rows = -(-self.queries * case.group // 16) * 16
        lanes, keys = -(-case.head_dim // 128) * 128, self.pages * case.page_size
        q, kv = jnp.dtype(case.q_dtype).itemsize, jnp.dtype(case.kv_dtype).itemsize
        pages = 2 * case.kv_heads * keys * (lanes * kv + 4 * (case.kv_dtype in ("int8", "float8_e4m3fn")))
        queries = case.kv_heads * rows * lanes * (q + 4) + rows * 128 * 4 + case.kv_heads * rows * 4
        state = case.kv_heads * rows * (lanes + 256) * 4
        scores = 3 * rows * -(-keys // 128) * 128 * 4 + 2 * keys * lanes * 4
        return 2 * (pages + queries) + state + scores


@dataclass(frozen=True)
class TritonTiles:
    """`queries`: prompt tokens a block; `keys`: keys a step (divides the page); `segment`: tokens of a sequence that
    one program of a decode takes (a multiple of `keys`); Triton's `warps` and `stages`."""

    queries: int
    keys: int
    segment: int
    warps: int = 4
    stages: int = 2

    @staticmethod
    def choose(case: Case, chip: Chip) -> TritonTiles:
        del chip
        keys = min(case.page_size, 64 if case.head_dim > 64 else 128)
        return TritonTiles(max(1, 128 // case.group), keys, max(512, keys))


@dataclass(frozen=True)
class TwinTiles:
    """The plain twin's: `queries` prompt tokens meet one page at a time; a decode takes `pages` pages of any rows."""

    queries: int = 128
    pages: int = 8

    @staticmethod
    def choose(case: Case, chip: Chip) -> TwinTiles:
        del case, chip
        return TwinTiles()
