"""The order in which attention back ends are tried, chosen by the chip that a program is for."""

from __future__ import annotations

from ..pallas_kernels.chips import Chip
from .blockwise import Blockwise
from .ops import Backend


def backends(chip: Chip) -> tuple[Backend, ...]:
    """The kernels of the chip first, then the plain twin, which takes every case."""
    return (Blockwise(),) if chip.platform == "cpu" else (Blockwise(lie="rows"),)
