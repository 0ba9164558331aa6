"""Where one model lives: a plan on a mesh of devices of this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..attention.ops import Backend
from ..attention.sharded import Sharded
from .plan import TENSOR, Plan


@dataclass(frozen=True)
class Placement:
    """Weights and pages follow the plan; what a step brings and takes is whole on every device."""

    plan: Plan
    mesh: Mesh

    @staticmethod
    def tensor(size: int) -> Placement:
        """Heads, KV heads, MLP and vocabulary split over the first `size` devices."""
        devices = jax.devices()
        if size > len(devices):
            hint = " (on CPU: JAX_NUM_CPU_DEVICES=n in the environment)"
            raise ValueError(
                f"tensor_parallel_size={size}, but there are {len(devices)} {devices[0].platform} devices; lower it, "
                f"or start with more devices{hint if devices[0].platform == 'cpu' else ''}"
            )
        return Placement(TENSOR, Mesh(np.array(devices[:size]), ("tensor",)))

    @property
    def whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def params(self, graphdef: nnx.GraphDef, specs: Any) -> Any:
        """The sharding of each parameter, from specs of the same tree."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.plan.place_params(graphdef, specs, self.mesh))

    def state(self, specs: tuple) -> tuple:
        """The sharding of each array of a state, from its spec."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.plan.place_state(specs, self.mesh))

    def backends(self, backends: tuple[Backend, ...]) -> tuple[Backend, ...]:
        """Attention back ends that run on every device with its own heads."""
        axis = dict(self.plan.table)["kv_heads"]
        return tuple(Sharded(backend, self.mesh, axis) for backend in backends)
