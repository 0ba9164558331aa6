"""Where one model lives: a plan on a mesh of devices of this process."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..attention.ops import Backend
from ..attention.sharded import Sharded
from .plan import GROUPED, TENSOR, Plan, mesh_axes

Heads = Collection[tuple[int, int]]
"""(query heads, KV heads) of each kind of attention layer in a model."""


def split_heads(size: int, heads: Heads) -> tuple[int, int] | None:
    """How `size` devices share attention heads: (shares of the KV heads, devices that repeat each share).

    With fewer KV heads than devices every device has one KV head and a part of its query heads. None where heads do
    not come out whole.
    """
    if all(query % size == 0 and kv % size == 0 for query, kv in heads):
        return size, 1
    counts = {kv for _, kv in heads}
    shares = counts.pop() if len(counts) == 1 else 0
    if shares and size % shares == 0 and all(query % size == 0 for query, _ in heads):
        return shares, size // shares
    return None


def possible_sizes(heads: Heads, limit: int) -> list[int]:
    """The numbers of devices up to `limit` over which these heads split."""
    return [size for size in range(1, limit + 1) if split_heads(size, heads) is not None]


def needs_split(size: int, heads: Heads, limit: int, asked: str | None = None) -> tuple[int, int]:
    """`split_heads`, or ValueError with the nearest sizes (up to `limit` devices) that work; `asked` is how the message
    names what was asked."""
    found = split_heads(size, heads)
    if found is None:
        near = sorted(possible_sizes(heads, limit), key=lambda other: (abs(other - size), -other))[:3]
        shown = " and ".join(f"{query} query heads with {kv} KV heads" for query, kv in sorted(set(heads)))
        raise ValueError(
            f"{asked or f'tensor_parallel_size={size}'} splits neither the model's KV heads nor whole groups of "
            f"queries: it has {shown}; the nearest sizes that do are {', '.join(map(str, near))}"
        )
    return found


@dataclass(frozen=True)
class Placement:
    """Weights and pages follow the plan; what a step brings and takes is whole on every device."""

    plan: Plan
    mesh: Mesh | AbstractMesh

    @staticmethod
    def tensor(size: int, heads: Heads = ()) -> Placement:
        """Heads, MLP and vocabulary split over the first `size` devices, KV heads as far as they go."""
        devices = jax.devices()
        if size > len(devices):
            hint = " (on CPU: JAX_NUM_CPU_DEVICES=n in the environment)"
            raise ValueError(
                f"tensor_parallel_size={size}, but there are {len(devices)} {devices[0].platform} devices; lower it, "
                f"or start with more devices{hint if devices[0].platform == 'cpu' else ''}"
            )
        return Placement.over(devices[:size], needs_split(size, heads, len(devices)))

    @staticmethod
    def over(devices: Sequence[Any] | None, split: tuple[int, int]) -> Placement:
        """The tensor plan over these devices, also compile-only ones, with `split` from `split_heads`. None: a mesh
        of no devices in particular, to plan with."""
        shares, repeats = split
        plan, sizes, names = (
            (TENSOR, (shares,), ("tensor",)) if repeats == 1 else (GROUPED, split, ("kv", "rep"))
        )
        if devices is None:
            return Placement(plan, AbstractMesh(sizes, names))
        return Placement(plan, Mesh(np.array(devices).reshape(sizes), names))

    @property
    def whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def kv_shards(self) -> int:
        """Into how many parts keys and values are cut."""
        target = dict(self.plan.table).get("kv_heads")
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes(target))

    def params(self, graphdef: nnx.GraphDef, specs: Any) -> Any:
        """The sharding of each parameter, from specs of the same tree."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.plan.place_params(graphdef, specs, self.mesh))

    def state(self, specs: tuple) -> tuple:
        """The sharding of each array of a state, from its spec."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.plan.place_state(specs, self.mesh))

    def backends(self, backends: tuple[Backend, ...]) -> tuple[Backend, ...]:
        """Attention back ends that run on every device with its own heads."""
        table = dict(self.plan.table)
        (axis,) = mesh_axes(table["kv_heads"])
        rep = next((name for name in mesh_axes(table["heads"]) if name != axis), None)
        return tuple(Sharded(backend, self.mesh, axis, rep) for backend in backends)
