"""Which steps spread their prompt tokens over devices, and how those meet keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..attention.batch import Batch, Shape
from ..attention.forms import Form, Load, Speeds, Spread, choose
from ..attention.spread import plain, spread, spreads
from .placement import Placement
from .topology import GENERATIONS

NVLINK = Speeds(990e12, 3350e9, 450e9, 5e-6, torus=False)
"""An H100 in its node (data sheet: dense bfloat16, HBM3, NVLink one way)."""
HERE = Speeds(1e11, 2e10, 5e9, 5e-5, torus=False)
"""Devices that one CPU pretends to be."""


def speeds_of_kind(kind: str) -> Speeds:
    """Arithmetic, memory and links of a TPU that JAX names so."""
    found = next((one for one in GENERATIONS if one.kind == kind), GENERATIONS[1])
    return Speeds(found.bf16 / found.devices, found.bandwidth / found.devices, found.link_bandwidth)


def speeds_of(device: Any) -> Speeds:
    """Arithmetic, memory and links of a device, also of a compile-only one."""
    if device.platform == "tpu":
        return speeds_of_kind(device.device_kind)
    return HERE if device.platform == "cpu" else NVLINK


@dataclass(frozen=True)
class Spreading:
    """`sharding`: of activations [T,E] whose tokens are spread. load: of a step without tokens; form: what the user
    asked for, None: by cost."""

    sharding: NamedSharding
    load: Load
    length: int
    speeds: Speeds
    form: Form | None = None

    @staticmethod
    def of(
        place: Placement, config: Any, blocks: Any, *, width: int, length: int, form: Form | None = None,
        speeds: Speeds | None = None,
    ) -> Spreading:  # fmt: skip
        """For a model of attention layers (`ModelConfig`) whose texts are split at `place`. blocks: the parameters of
        all layers; width: bytes of a number; length: max_model_len; speeds None: those of the mesh's devices."""
        attention, tensor = config.blocks[0].mixer, place.mesh.size // place.sequence
        parameters = sum(leaf.size for leaf in jax.tree.leaves(blocks)) // config.num_layers
        load = Load(
            place.sequence, 0, 0, -(-attention.heads // tensor), -(-attention.kv_heads // tensor),
            attention.head_dim, width, parameters // tensor,
        )  # fmt: skip
        if speeds is None:
            assert isinstance(place.mesh, Mesh)
            speeds = speeds_of(np.asarray(place.mesh.devices).flat[0])
        return Spreading(place.spread, load, length, speeds, form)

    def over(self, shape: Shape) -> Spread | None:
        """How a step of this shape is spread; None: every device computes all of its tokens."""
        devices = self.load.devices
        if not spreads(shape, devices):
            return None
        form = self.form or choose(self.load.of(shape.C, max(0, self.length - shape.C) // 2), self.speeds)
        return None if form == "whole" else Spread(devices, form)

    def split(self, batch: Batch) -> tuple[Batch, ...]:
        over = self.over(batch.shape)
        return (batch if over is None else spread(batch, over),)

    def placed(self, x: jax.Array, part: Batch) -> jax.Array:
        return x if part.spread is None else jax.lax.with_sharding_constraint(x, self.sharding)

    def joined(self, xs: tuple[jax.Array, ...], shape: Shape) -> jax.Array:
        over = self.over(shape)
        return xs[0] if over is None else plain(xs[0], shape, over.devices)

    def options(self, shape: Shape) -> dict[str, str | bool]:
        del shape
        return {}
