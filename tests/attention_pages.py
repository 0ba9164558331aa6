"""Pages of the attention cases: rows of keys and values as codes, laid out as a back end wants them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tokenloom.attention.ops import Layout, PagedView

if TYPE_CHECKING:
    from tokenloom.tests.attention_cases import Case

HUGE = 1e30
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def store(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """x [S,Hkv,D] -> (codes [S,Hkv,D], scales [S,Hkv] or None, what the codes mean in float64)."""
    if dtype not in LARGEST:
        codes = x.astype(jnp.dtype(dtype))
        return codes, None, codes.astype(np.float64)
    scales = (np.abs(x).max(-1) / LARGEST[dtype]).astype(np.float32)
    codes = x / scales[..., None]
    codes = np.rint(codes).astype(np.int8) if dtype == "int8" else codes.astype(ml_dtypes.float8_e4m3fn)
    return codes, scales, codes.astype(np.float64) * scales[..., None]


class Pages:
    """Numpy pages [M,Hkv,ps,D] and scales [M,Hkv,ps] that are filled row by row, then laid as a layout wants."""

    def __init__(self, case: Case, draw: np.random.Generator) -> None:
        needed = [-(-length // case.span) for length in case.lengths]
        self.table = np.zeros((len(needed), max(needed, default=0) + case.spare), np.int32)
        pages, self.case = 1 + sum(needed) + 3, case
        shape = (pages, case.kv_heads, case.page_size)
        self.scaled = case.kv_dtype in LARGEST
        nothing = 100 if case.kv_dtype == "int8" else np.nan
        self.codes = [np.full((*shape, case.dim), nothing).astype(jnp.dtype(case.kv_dtype)) for _ in range(2)]
        self.scales = [np.full(shape, np.nan, np.float32) for _ in range(2)]
        free = list(draw.permutation(np.arange(1, pages)))
        for row, count in enumerate(needed):
            self.table[row, :count] = [free.pop() for _ in range(count)]
        for page in {0, *(self.table.ravel().tolist())}:
            for codes, scales in zip(self.codes, self.scales):
                codes[page], scales[page] = (100 if self.scaled else HUGE), HUGE

    def fill(self, which: int, row: int, codes: np.ndarray, scales: np.ndarray | None) -> None:
        [at] = np.nonzero(self.case.here(len(codes)))
        pages, slots = self.table[row, at // self.case.span], at % self.case.page_size
        self.codes[which][pages, :, slots] = codes[at]
        if scales is not None:
            self.scales[which][pages, :, slots] = scales[at]

    def view(self, layout: Layout) -> PagedView:
        k, v = self.codes
        if layout == "transposed":
            pages = jnp.asarray(np.ascontiguousarray(k.swapaxes(2, 3))), jnp.asarray(v)
        elif layout in ("rows", "padded"):
            lanes = -self.case.dim % 128 if layout == "padded" else 0
            pages = tuple(jnp.asarray(np.pad(x, ((0, 0), (0, 0), (0, 0), (0, lanes)))) for x in (k, v))
        else:
            pages = jnp.asarray(np.concatenate([k, v], -1)), None
        scales = [jnp.asarray(x) if self.scaled else None for x in self.scales]
        lengths = jnp.asarray(self.case.lengths, jnp.int32)
        view = PagedView(*pages, jnp.asarray(self.table), lengths, *scales, layout=layout)
        if self.case.parts == 1:
            return view
        first = jnp.int32(self.case.part * self.case.page_size)
        return replace(view, parts=self.case.parts, first=first)
