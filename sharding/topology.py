"""Slices of TPUs by name: chips, shape, and devices to compile for where no TPU is.

JAX names a slice by its shape (`v5e:4x4`), Google Cloud by a count (`v5e-16`, `v5p-8`): of chips for v5e and v6e, of
TensorCores, two a chip, for v4, v5p and TPU7x. A JAX device is a chip, but for TPU7x, where it is one of a chip's two
halves.

Sources: Google Cloud's documentation, system architecture and supported configurations of v4, v5p, v5e, v6e and TPU7x
(docs.cloud.google.com/tpu/docs): capacities, peaks, bandwidths, shapes; how the generations are counted also in
AI-Hypercomputer/xpk, system_characteristics.py. Links: the chip's interconnect bandwidth there over its links, as in
"How to Scale Your Model" (jax-ml.github.io/scaling-book), chapter 2. Usable memory: the limit that libtpu's compiler
names when a program is too large.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any

from ..pallas_kernels.chips import TPUS, Chip

GiB = 1 << 30


@dataclass(frozen=True)
class Generation:
    """One kind of TPU, in numbers of one chip.

    kind: as JAX names the device. memory: bytes of HBM that programs may use; bandwidth: bytes a second of it. bf16,
    int8, fp8: operations a second at peak, a multiply-add being two (0: the chip has no such units). links: how many,
    each of `link_bandwidth` bytes a second each way. counted: what the cloud's name counts, a chip; devices: of JAX;
    host: the most chips that one host has.
    """

    name: str
    kind: str
    memory: int
    bandwidth: float
    bf16: float
    int8: float
    fp8: float
    links: int
    link_bandwidth: float
    counted: int
    devices: int
    host: int
    prefixes: tuple[str, ...]
    shapes: tuple[str, ...]

    def topologies(self) -> Iterator[Topology]:
        """The slices that can be had, smallest first."""
        return (Topology(self, _shape(text)) for text in self.shapes)


PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16", "16x16x16",
)  # fmt: skip
GENERATIONS = (
    Generation(
        "v4", "TPU v4", int(30.75 * GiB), 1228e9, 275e12, 275e12, 0, 6, 45e9, 2, 1, 4, ("v4",), CUBES
    ),
    Generation(
        "v5e", "TPU v5 lite", int(15.75 * GiB), 819e9, 197e12, 394e12, 0, 4, 45e9, 1, 1, 8, ("v5e", "v5litepod"), PLANES
    ),
    Generation(
        "v5p", "TPU v5", int(95.73 * GiB), 2765e9, 459e12, 918e12, 0, 6, 90e9, 2, 1, 4, ("v5p",), CUBES
    ),
    Generation(
        "v6e", "TPU v6 lite", int(31.24 * GiB), 1638e9, 918e12, 1836e12, 0, 4, 90e9, 1, 1, 8, ("v6e",), PLANES
    ),
    Generation(
        "tpu7x", "TPU7x", 2 * int(94.74 * GiB), 7380e9, 2307e12, 0, 4614e12, 6, 90e9, 2, 2, 4, ("tpu7x", "v7x"),
        ("1x1x1", *CUBES),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """A slice: `shape` chips of one generation."""

    generation: Generation
    shape: tuple[int, ...]

    @staticmethod
    def parse(text: str) -> Topology:
        """From JAX's name or Google Cloud's, in any case; ValueError with the nearest that exists."""
        match = re.fullmatch(r"([a-z]+\d+[a-z]*)[:-](\d+(?:x\d+)*)", text.strip().lower())
        found = [one for one in GENERATIONS if match is not None and match[1] in one.prefixes]
        if match is None or not found:
            known = "; ".join(f"{one.name}:{one.shapes[2]}" for one in GENERATIONS)
            raise ValueError(
                f"topology {text!r} is not known: give a generation with a shape, as JAX does ({known}), or with "
                f"Google Cloud's count (v5e-16, v5p-8)"
            )
        (generation,), size = found, match[2]
        wanted = _shape(size) if "x" in size else ()
        chips = prod(wanted) if wanted else int(size) / generation.counted
        for topology in generation.topologies():
            if topology.shape == wanted or (not wanted and topology.chips == chips):
                return topology
        near = min(generation.topologies(), key=lambda one: (abs(one.chips - chips), -one.chips))
        others = " ".join(topology.name for topology in generation.topologies())
        raise ValueError(
            f"{generation.name} has no slice {text!r} ({chips:g} chips); the nearest is {near}. All: {others}"
        )

    @property
    def chips(self) -> int:
        return prod(self.shape)

    @property
    def devices(self) -> int:
        """How many devices JAX shows."""
        return self.chips * self.generation.devices

    @property
    def hosts(self) -> int:
        """How many machines it takes, at least."""
        return -(-self.chips // self.generation.host)

    @property
    def name(self) -> str:
        """As JAX names it."""
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def cloud(self) -> str:
        """As Google Cloud names it."""
        return f"{self.generation.name}-{self.chips * self.generation.counted}"

    def __str__(self) -> str:
        return f"{self.name} ({self.cloud})"

    @property
    def device(self) -> Device:
        """What one JAX device of it has."""
        one, parts = self.generation, self.generation.devices
        return Device(
            TPUS[one.kind], one.memory // parts, one.bandwidth / parts, one.bf16 / parts,
            one.links * one.link_bandwidth / parts,
        )  # fmt: skip

    def larger(self) -> Iterator[Topology]:
        """The slices of the same generation with more chips, smallest first."""
        return (one for one in self.generation.topologies() if one.chips > self.chips)

    def compile_only(self) -> list[Any]:
        """Devices to compile for. ValueError when libtpu is not there."""
        if find_spec("libtpu") is None:
            raise ValueError(
                f"compiling for {self} needs libtpu (pip install libtpu; Linux on x86-64); without it only "
                f"predictions are possible (--predict-only)"
            )
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        from jax.experimental import topologies

        # Two cores of a v4 chip are one device where programs run, but two unless the description says so.
        more = {"chip_config_name": "megacore"} if self.generation.name == "v4" else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=self.name, **more).devices


@dataclass(frozen=True)
class Device:
    """One JAX device: what kernels know of it, bytes of memory that programs may use, bytes a second of it, bf16
    operations a second, and bytes a second that it can send over all its links together."""

    chip: Chip
    memory: int
    bandwidth: float
    flops: float
    interconnect: float


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))
