"""Tile sizes of the attention kernels: a frozen dataclass a kernel, and a heuristic from shapes, dtypes and chip."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp

from ..chips import Chip, KiB
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
        """About 512 rows of packed queries against 512 keys, halved until the step fits in three quarters of VMEM; half
        the rows for wide heads in float32, whose products come in pieces that Mosaic spills to VMEM too."""
        rows = 256 if case.head_dim > 128 and "float32" in (case.q_dtype, case.kv_dtype) else 512
        tiles = TpuTiles(
            case.tokens
            if case.part == "rows"
            else min(-(-case.tokens // 8) * 8, max(8, rows // case.group // 8 * 8)),
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
    """`queries`: query tokens a block; `keys`: keys a step, a power of two; `segment`: tokens of a sequence that one
    item of a decode's work takes (a multiple of `keys`), doubled for long ones; Triton's `warps` and `stages`;
    `programs`: how many of a decode's programs share a multiprocessor."""

    queries: int
    keys: int
    segment: int
    warps: int = 4
    stages: int = 2
    programs: int = 2

    @staticmethod
    def choose(case: Case, chip: Chip) -> TritonTiles:
        """About 32 KiB of keys and values a step, half where they are converted; less where they do not fit.

        The numbers keep Triton from spilling registers, and so many programs fit a multiprocessor of 65536 registers.
        Segments are long enough that partial results are a small part of the keys and values they stand for.
        """
        size, prompt = jnp.dtype(case.kv_dtype).itemsize, case.part == "prompt"
        budget = 16 * KiB if size == 1 else 32 * KiB
        most = 128 if prompt and case.head_dim <= 64 else 64
        keys = min(most, max(16, power_of_two(budget // (2 * case.head_dim * size) + 1) // 2))
        exact = max(jnp.dtype(case.q_dtype).itemsize, size) == 4
        rows = 128 if prompt and case.head_dim <= 128 and not exact else 64
        queries = max(1, rows // case.group)
        if prompt:
            tiles = TritonTiles(queries, keys, 512, 4 if exact else 8, stages=3)
        else:
            segment = max(512, power_of_two(32 * case.tokens * case.group))
            tiles = TritonTiles(min(queries, case.tokens), keys, segment, stages=3)
        while tiles.shared_bytes(case) > chip.memory and (tiles.keys > 16 or tiles.queries > 1):
            if tiles.keys > 16:
                tiles = replace(tiles, keys=tiles.keys // 2)
            else:
                tiles = replace(tiles, queries=tiles.queries // 2)
        most = 3 if case.head_dim < 128 and size > 1 and tiles.rows(case.group) == 16 else 2
        return replace(tiles, programs=max(1, min(most, chip.memory // tiles.shared_bytes(case))))

    def rows(self, group: int) -> int:
        """Rows of the products: the query heads of a KV head times the queries, padded to what Triton multiplies."""
        return max(16, power_of_two(self.queries * group))

    def shared_bytes(self, case: Case) -> int:
        """What a program needs of shared memory: queries, the tiles that are under way, and for products in three parts
        the other halves of what is multiplied.

        Triton keeps (stages + 1) // 2 tiles, since their addresses come from the table, another load. Compared with
        Triton 3.9's allocations, of which it is 1.0 to 1.4 times.
        """
        q, kv = jnp.dtype(case.q_dtype).itemsize, jnp.dtype(case.kv_dtype).itemsize
        rows, wide = self.rows(case.group), q if kv == 1 else max(q, kv)
        tiles = max(2, (self.stages + 1) // 2) * 2 * self.keys * kv
        halves = 2 * self.keys * 4 + rows * 4 if wide == 4 else 0
        return (rows * wide + tiles + halves) * case.head_dim + 8 * KiB

    def check(self, case: Case, chip: Chip) -> None:
        """ValueError where the numbers do not go together, NotImplementedError where the chip has too little room."""
        if (
            min(asdict(self).values()) < 1
            or self.keys < 16
            or self.keys & (self.keys - 1)
            or self.segment % self.keys
        ):
            raise ValueError(
                f"{self}: keys must be a power of two of at least 16, segment a multiple of keys, the rest at least 1"
            )
        needed = self.shared_bytes(case)
        if needed > chip.memory:
            raise NotImplementedError(
                f"{self} needs {needed} bytes of shared memory for head dim {case.head_dim}, and a program of "
                f"{chip.name} has {chip.memory}"
            )


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class TwinTiles:
    """The plain twin's: `queries` prompt tokens meet one page at a time; a decode takes `pages` pages of any rows."""

    queries: int = 128
    pages: int = 8

    @staticmethod
    def choose(case: Case, chip: Chip) -> TwinTiles:
        del case, chip
        return TwinTiles()
