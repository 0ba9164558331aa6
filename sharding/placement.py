"""Where one model lives: a plan on a mesh of devices, of this process or of several."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..attention.caches.policy import CachePolicy
from ..attention.caches.split import Split, SplitPages
from ..attention.ops import Backend
from ..attention.sharded import Sharded
from .plan import GROUPED, SHARED, TENSOR, Plan, mesh_axes, whole_experts

SEQUENCE = "seq"

Heads = Collection[tuple[int, int]]
"""(query heads, KV heads) of each kind of attention layer in a model."""

Experts = Collection[int]
"""How many experts each kind of mixture in a model has."""


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


def needs_experts(size: int, experts: Experts, heads: Heads, limit: int, asked: str) -> None:
    """ValueError unless every mixture's experts come out whole on `size` devices, with the nearest sizes (up to `limit`
    devices) over which they and the heads do; `asked` is how the message names what was asked."""
    if not experts:
        raise ValueError(
            f"{asked} keeps experts whole on their devices, but the model has no experts; use the tensor plan alone"
        )
    if any(count % size for count in experts):
        works = (one for one in possible_sizes(heads, limit) if not any(count % one for count in experts))
        near = sorted(works, key=lambda other: (abs(other - size), -other))[:3]
        shown = " and ".join(str(count) for count in sorted(set(experts)))
        raise ValueError(
            f"{asked} cannot keep experts whole on their devices: {shown} experts do not divide by {size}; the nearest "
            f"sizes that do are {', '.join(map(str, near))}"
        )


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, or that lie on all processes' devices already -> the same on their
    shardings (None: the default device). Each process makes only the parts of its own devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree, shardings)


@dataclass(frozen=True)
class Placement:
    """Weights and pages follow the plan; what a step brings and takes is whole on every device."""

    plan: Plan
    mesh: Mesh | AbstractMesh

    @staticmethod
    def here(
        tensor: int, sequence: int = 1, heads: Heads = (), experts: Experts | None = None, first: int = 0,
        copies: bool = False,
    ) -> Placement:  # fmt: skip
        """Over the devices from the `first` on: heads, MLP and vocabulary split over `tensor` of them, KV heads as far
        as they go, and each text over `sequence` such groups. `experts`: the model's, to be whole on their devices;
        None: cut. `copies`: as in `over`."""
        devices, size = jax.devices(), tensor * sequence
        if size > len(devices):
            asked = (
                f"tensor_parallel_size={tensor}" if sequence == 1 else f"sequence_parallel_size={sequence}"
            )
            if tensor > 1 and sequence > 1:
                asked = f"tensor_parallel_size={tensor} times {asked} is {size}"
            hint = " (on CPU: JAX_NUM_CPU_DEVICES=n in the environment)"
            raise ValueError(
                f"{asked}, but there are {len(devices)} {devices[0].platform} devices; lower it, "
                f"or start with more devices{hint if devices[0].platform == 'cpu' else ''}"
            )
        split = needs_split(tensor, heads, len(devices))
        if experts is not None:
            asked = f"enable_expert_parallel with tensor_parallel_size={tensor}"
            needs_experts(tensor, experts, heads, len(devices), asked)
        return Placement.over(devices[first : first + size], split, sequence, experts is not None, copies)

    @staticmethod
    def over(
        devices: Sequence[Any] | None, split: tuple[int, int], sequence: int = 1, experts: bool = False,
        copies: bool = False,
    ) -> Placement:  # fmt: skip
        """The tensor plan over these devices, also compile-only ones, with `split` from `split_heads`, and texts over
        `sequence` groups of them; `experts`: whole on their devices; `copies`: devices that have one KV head between
        them keep all of its pages each, as they do where texts are split already. None: a mesh of no devices in
        particular, to plan with."""
        shares, repeats = split
        plan, sizes, names = (
            (TENSOR, (shares,), ("tensor",))
            if repeats == 1
            else (GROUPED if copies or sequence > 1 else SHARED, split, ("kv", "rep"))
        )
        plan = whole_experts(plan) if experts else plan
        if sequence > 1:
            sizes, names = (sequence, *sizes), (SEQUENCE, *names)
            plan = Plan(
                f"sequence, {plan.name}", (*plan.table, ("tokens", SEQUENCE), ("page_tokens", SEQUENCE))
            )
        if devices is None:
            return Placement(plan, AbstractMesh(sizes, names))
        return Placement(plan, Mesh(np.array(devices).reshape(sizes), names))

    @property
    def whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def devices(self) -> list[Any]:
        """In the mesh's order; none of an abstract mesh."""
        return list(self.mesh.devices.flat) if isinstance(self.mesh, Mesh) else []

    @property
    def kv_shards(self) -> int:
        """Into how many parts keys and values are cut."""
        return self._devices("kv_heads") * self.page_parts

    @property
    def page_parts(self) -> int:
        """Over how many devices the tokens of a page are split."""
        return self._devices("page_tokens")

    @property
    def contexts(self) -> int:
        """Over how many of the devices that share the weights each page is split (decode context parallelism)."""
        return self.page_parts // self.sequence

    @property
    def repeats(self) -> int:
        """How many copies of each key and value there are."""
        return self.mesh.size // self.kv_shards

    @property
    def sequence(self) -> int:
        """Over how many devices, or groups that share the weights, each text is split."""
        return self._devices("tokens")

    def _devices(self, logical: str) -> int:
        """Into how many parts a logical axis is cut."""
        axes = mesh_axes(dict(self.plan.table).get(logical))
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """The mesh axes over which experts are split whole; none where they are cut, or on every device."""
        return mesh_axes(dict(self.plan.table).get("experts"))

    @property
    def spread(self) -> NamedSharding:
        """Activations [T,E] of which each device has some tokens."""
        return NamedSharding(self.mesh, PartitionSpec(dict(self.plan.table).get("tokens")))

    @property
    def apart(self) -> NamedSharding:
        """Activations [T,E] of which each of the devices that share the weights has some tokens."""
        return NamedSharding(self.mesh, PartitionSpec(dict(self.plan.table).get("heads")))

    def cache(self, cache: CachePolicy) -> CachePolicy:
        """What remembers: pages shared token by token where texts are split, or one KV head's devices share it."""
        table = dict(self.plan.table)
        (axis,) = mesh_axes(table.get("page_tokens")) or (None,)
        if axis is None:
            return cache
        return SplitPages(Split(self.mesh, axis, table.get("heads"), table.get("kv_heads")))

    def params(self, graphdef: nnx.GraphDef, specs: Any) -> Any:
        """The sharding of each parameter, from specs of the same tree."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.plan.place_params(graphdef, specs, self.mesh))

    def state(self, specs: tuple) -> tuple:
        """The sharding of each array of a state, from its spec."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.plan.place_state(specs, self.mesh))

    def backends(self, backends: tuple[Backend, ...]) -> tuple[Backend, ...]:
        """Attention back ends that run on every device with its own heads (a cache that splits pages sees to that
        itself)."""
        if self.page_parts > 1:
            return backends
        table = dict(self.plan.table)
        (axis,) = mesh_axes(table["kv_heads"])
        rep = next((name for name in mesh_axes(table["heads"]) if name != axis), None)
        return tuple(Sharded(backend, self.mesh, axis, rep) for backend in backends)
