"""The order in which attention back ends are tried, chosen by the chip that a program is for."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from ..pallas_kernels.attention.tiles import TpuTiles, TritonTiles, TwinTiles
from ..pallas_kernels.attention.tpu import TpuKernels
from ..pallas_kernels.attention.triton import TritonKernels
from ..pallas_kernels.attention.tuned import Tuned, load
from ..pallas_kernels.chips import GPUS, TPUS, Chip
from .blockwise import Blockwise
from .ops import Backend

T = TypeVar("T")


def backends(chip: Chip, measured: Path | None = None) -> tuple[Backend, ...]:
    """The kernels of the chip first, then the plain twin, which takes every case.

    `measured`: the folder of tables that `tokenloom tune` writes; None: heuristics choose the tiles.
    """

    def tuned(kind: type[T]) -> Tuned[T]:
        return Tuned() if measured is None else load(measured, chip, kind)

    if chip.platform == "cpu":
        return (Blockwise(tuned=tuned(TwinTiles)),)
    if chip.platform == "tpu":
        return (TpuKernels(chip, tuned=tuned(TpuTiles)), Blockwise(lie="rows"))
    return (TritonKernels(chip, tuned=tuned(TritonTiles)), Blockwise(lie="rows"))


def named(name: str, chip: Chip) -> tuple[Backend, ...]:
    """Only the back end "blockwise", "tpu" or "triton".

    Kernels for another chip than this one run interpreted: slowly, for tests and for writing kernels on a laptop."""
    if name == "blockwise":
        return (Blockwise(lie="transposed" if chip.platform == "cpu" else "rows"),)
    if name == "tpu":
        here = chip.platform == "tpu"
        return (TpuKernels(chip if here else TPUS["TPU v5e"], interpret=not here),)
    if name == "triton":
        here = chip.platform == "gpu"
        return (TritonKernels(chip if here else GPUS["H200"], interpret=not here),)
    raise ValueError(f"attention_backend {name!r} is not known; choose blockwise, tpu or triton, or None")
