"""Tile sizes of the attention kernels: a frozen dataclass a kernel, and a heuristic from shapes, dtypes and chip."""

from __future__ import annotations

from dataclasses import dataclass

from ..chips import Chip


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


@dataclass(frozen=True)
class TpuTiles:
    """`queries`: prompt tokens a block; `pages`: pages a step; `segment`: tokens after which a sequence is split, so
    that two cores share it (a multiple of pages * page_size; 0: never)."""

    queries: int
    pages: int
    segment: int = 0

    @staticmethod
    def choose(case: Case, chip: Chip) -> TpuTiles:
        queries = case.tokens if case.part == "rows" else min(case.tokens, max(8, 512 // case.group))
        pages = max(1, min(case.width, 512 // case.page_size))
        step = pages * case.page_size
        return TpuTiles(queries, pages, -(-4096 // step) * step if chip.cores > 1 else 0)


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
