"""How a slice is divided by name: replicas, and the devices that share one model.

    tensor=8            one model over 8 devices: heads, MLP and vocabulary split
    data=2,tensor=4     two replicas of 4 devices each, every one with all weights and its own sequences
    expert=8            one model over 8 devices: as tensor=8, but experts whole on their devices
    seq=8               one model over 8 devices, all weights on each, every text split over them
    seq=2,tensor=4      every text split over two groups of 4 devices, each of which holds all weights
    tensor, data=2      what is left out follows from the number of devices

All run: `LLM(tensor_parallel_size=n, sequence_parallel_size=m, data_parallel_size=d)`, `expert=n` with
`enable_expert_parallel=True` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from .placement import Experts, Heads, Placement, needs_experts, needs_split

AXES = ("data", "seq", "tensor", "expert")


@dataclass(frozen=True)
class Division:
    """`data` replicas of `seq` groups, which share each text, of `size` devices, which share the weights; `experts`:
    whole on their devices, rather than cut."""

    data: int
    size: int
    experts: bool = False
    seq: int = 1

    @staticmethod
    def parse(text: str, devices: int) -> Division:
        """From a name, for a slice of so many devices; ValueError naming what would cover them."""
        factors: dict[str, int | None] = {}
        for part in text.lower().split(","):
            match = re.fullmatch(r"\s*([a-z]+)\s*(?:=\s*(\d+))?\s*", part)
            if match is None or match[1] not in AXES or match[1] in factors or match[2] == "0":
                raise ValueError(
                    f"plan {text!r} is not known: give auto, or factors such as tensor={devices}, "
                    f"data=2,tensor={max(1, devices // 2)}, seq=2,tensor={max(1, devices // 2)} or expert={devices}"
                )
            factors[match[1]] = None if match[2] is None else int(match[2])
        if "tensor" in factors and "expert" in factors:
            raise ValueError(
                f"plan {text!r}: experts are split over the same devices as heads; name one of the two"
            )
        inner = "expert" if "expert" in factors else "tensor"
        open_axis = next((axis for axis in (inner, "seq", "data") if factors.get(axis, 1) is None), None)
        if open_axis is None and inner not in factors:
            open_axis = inner
        given = {axis: factors.get(axis) or 1 for axis in ("data", "seq", inner)}
        if open_axis is not None:
            given[open_axis] = max(1, devices // prod(n for axis, n in given.items() if axis != open_axis))
        data, seq, size = given.values()
        if data * seq * size != devices:
            shown = max((d for d in range(1, devices + 1) if devices % d == 0 and d <= size), default=1)
            covers = " x ".join(str(n) for n in ((data, size) if seq == 1 else (data, seq, size)))
            raise ValueError(
                f"plan {text!r} covers {covers} of the slice's {devices} devices; the nearest that covers all "
                f"is {'data' if seq == 1 else 'seq'}={devices // shown},{inner}={shown}"
            )
        return Division(data, size, inner == "expert", seq)

    @property
    def name(self) -> str:
        factors = {"data": self.data, "seq": self.seq, "expert" if self.experts else "tensor": self.size}
        shown = [f"{axis}={n}" for axis, n in factors.items() if n > 1]
        return ",".join(shown) or "tensor=1"

    @property
    def devices(self) -> int:
        """Of one replica."""
        return self.size * self.seq

    def place(
        self, heads: Heads, devices: Sequence[Any] | None = None, experts: Experts = (), copies: bool = False
    ) -> Placement:  # fmt: skip
        """Where one replica of a model with such heads and `experts` lives: on the first of `devices`, or on a mesh to
        plan with. `copies`: as in `Placement.over`."""
        asked = f"plan {self.name!r}"
        split = needs_split(self.size, heads, 4 * self.size, asked)
        if self.experts:
            needs_experts(self.size, experts, heads, 4 * self.size, asked)
        taken = None if devices is None else devices[: self.devices]
        return Placement.over(taken, split, self.seq, self.experts, copies)


def divisions(devices: int, experts: bool, texts: bool = False) -> list[Division]:
    """The divisions of so many devices into replicas, or with `texts` also into groups that share each text of one
    replica: widest first."""
    sizes = [size for size in range(devices, 0, -1) if devices % size == 0]
    found = []
    for size in sizes:
        for kind in (False, True) if experts and size > 1 else (False,):
            found.append(Division(devices // size, size, kind))
            if texts and size < devices:
                found.append(Division(1, size, kind, devices // size))
    return found
