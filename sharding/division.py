"""How a slice is divided by name: replicas, and the devices that share one model.

    tensor=8            one model over 8 devices: heads, MLP and vocabulary split
    data=2,tensor=4     two replicas of 4 devices each, every one with all weights and its own sequences
    expert=8            one model over 8 devices: heads and vocabulary split, experts whole on their devices
    tensor, data=2      what is left out follows from the number of devices

`tensor` runs: `LLM(tensor_parallel_size=n)`. Replicas run as one process each. `expert` can be planned only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .placement import Heads, Placement, needs_split
from .plan import Plan

AXES = ("data", "tensor", "expert")


@dataclass(frozen=True)
class Division:
    """`data` replicas of `size` devices; `experts`: whole on their devices, rather than cut."""

    data: int
    size: int
    experts: bool = False

    @staticmethod
    def parse(text: str, devices: int) -> Division:
        """From a name, for a slice of so many devices; ValueError naming what would cover them."""
        factors: dict[str, int | None] = {}
        for part in text.lower().split(","):
            match = re.fullmatch(r"\s*([a-z]+)\s*(?:=\s*(\d+))?\s*", part)
            if match is None or match[1] not in AXES or match[1] in factors or match[2] == "0":
                hint = (
                    " (sequences are not split over devices)"
                    if match is not None and match[1] == "seq"
                    else ""
                )
                raise ValueError(
                    f"plan {text!r} is not known{hint}: give auto, or factors such as tensor={devices}, "
                    f"data=2,tensor={max(1, devices // 2)} or expert={devices}"
                )
            factors[match[1]] = None if match[2] is None else int(match[2])
        if "tensor" in factors and "expert" in factors:
            raise ValueError(
                f"plan {text!r}: experts are split over the same devices as heads; name one of the two"
            )
        inner = "expert" if "expert" in factors else "tensor"
        data, size = factors.get("data"), factors.get(inner)
        if size is None:
            data = data or 1
            size = devices // data
        elif data is None:
            data = devices // size if "data" in factors else 1
        if data * size != devices:
            shown = max((d for d in range(1, devices + 1) if devices % d == 0 and d <= size), default=1)
            raise ValueError(
                f"plan {text!r} covers {data} x {size} of the slice's {devices} devices; the nearest that covers all "
                f"is data={devices // shown},{inner}={shown}"
            )
        return Division(data, size, inner == "expert")

    @property
    def name(self) -> str:
        inner = f"{'expert' if self.experts else 'tensor'}={self.size}"
        return inner if self.data == 1 else f"data={self.data},{inner}"

    def place(self, heads: Heads, devices: Sequence[Any] | None = None) -> Placement:
        """Where one replica lives: on the first of `devices`, or on a mesh to plan with."""
        split = needs_split(self.size, heads, 4 * self.size, f"plan {self.name!r}")
        placed = Placement.over(None if devices is None else devices[: self.size], split)
        return replace(placed, plan=_experts(placed.plan)) if self.experts else placed


def divisions(devices: int, experts: bool) -> list[Division]:
    """Every division of so many devices, widest first."""
    sizes = [size for size in range(devices, 0, -1) if devices % size == 0]
    kinds = (False, True) if experts else (False,)
    return [Division(devices // size, size, kind) for size in sizes for kind in kinds if size > 1 or not kind]


def _experts(plan: Plan) -> Plan:
    """The same with experts split instead of the features inside them."""
    table = dict(plan.table)
    return Plan(
        "expert", (*((name, axes) for name, axes in plan.table if name != "mlp"), ("experts", table["mlp"]))
    )
