"""Sharding plans: one table from logical axes to mesh axes, applied to weights and state.

Weights carry the logical name of each dimension where they are defined (`model/layers.py`); a plan maps names to
mesh axes, and everything else follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..attention.caches.paged import PagedKV
from ..attention.caches.split import SplitKV

LOGICAL = (
    "embed", "heads", "kv_heads", "mlp", "vocab", "experts", "expert_mlp", "layers", "tokens", "page_tokens",
)  # fmt: skip
"""Axes of weights and state; `tokens`: of what a step computes; `page_tokens`: of a page of keys and values."""

AnyMesh = Mesh | AbstractMesh
Target = str | tuple[str, ...]
"""A mesh axis, or several that split one dimension together, the first of them slowest."""


def mesh_axes(target: Target | None) -> tuple[str, ...]:
    """The mesh axes of a target; none for None."""
    return () if target is None else (target,) if isinstance(target, str) else target


@dataclass(frozen=True)
class Plan:
    """`table` maps logical axes to mesh axes; those that it does not name are replicated."""

    name: str
    table: tuple[tuple[str, Target], ...]

    def __post_init__(self) -> None:
        unknown = [logical for logical, _ in self.table if logical not in LOGICAL]
        if unknown:
            raise ValueError(
                f"plan {self.name!r} names unknown logical axes {unknown}; known: {', '.join(LOGICAL)}"
            )

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
        """The partition of an array whose trailing dimensions have these logical axes.

        A mesh axis that two dimensions claim goes to the first (weights of attention have both `heads` and
        `embed`); a dimension that its mesh axis does not divide is an error.
        """
        table, used = dict(self.table), set()
        parts: list[Target | None] = [None] * (len(shape) - len(axes))
        for name, size in zip(axes, shape[len(parts) :]):
            target = table.get(name) if name is not None else None
            taken = mesh_axes(target)
            chips = math.prod(mesh.shape[axis] for axis in taken)
            if used.intersection(taken):
                raise ValueError(
                    f"plan {self.name!r} maps two dimensions of {axes} to mesh axis {target!r}; map one of them "
                    f"to another axis"
                )
            if size % chips:
                raise ValueError(
                    f"plan {self.name!r} splits {name!r} over {chips} chips, but its size is {size}; "
                    f"use a mesh axis whose size divides {size}"
                )
            used.update(taken)
            parts.append(target)
        return PartitionSpec(*parts)

    def place_params(self, graphdef: nnx.GraphDef, specs: Mapping[Any, Any], mesh: AnyMesh) -> Any:
        """ShapeDtypeStructs of the params -> the same with their shardings."""
        module = nnx.merge(graphdef, specs)
        axes = nnx.to_pure_dict(
            jax.tree.map(
                lambda v: tuple(v.get_metadata()["axes"]),
                nnx.state(module),
                is_leaf=lambda v: isinstance(v, nnx.Variable),
            )
        )
        return jax.tree.map(
            lambda leaf, names: _placed(leaf, mesh, self.spec(names, leaf.shape, mesh)), specs, axes,
            is_leaf=lambda v: isinstance(v, jax.ShapeDtypeStruct),
        )  # fmt: skip

    def place_state(self, specs: tuple, mesh: AnyMesh) -> tuple:
        """ShapeDtypeStructs of the state -> the same with their shardings: pages and scales [M,Hkv,...] by KV head, and
        by token where they say so themselves."""
        target = dict(self.table).get("kv_heads")

        def one(entry: object, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            split = PartitionSpec(None, target) if isinstance(entry, PagedKV) and target else PartitionSpec()
            return _placed(leaf, mesh, split)

        def placed(entry: object) -> object:
            if isinstance(entry, SplitKV):
                return jax.tree.map(lambda leaf, cut: _placed(leaf, mesh, cut), entry, entry.partition())
            return jax.tree.map(partial(one, entry), entry)

        return tuple(placed(entry) for entry in specs)


def _placed(leaf: jax.ShapeDtypeStruct, mesh: AnyMesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


TENSOR = Plan(
    "tensor",
    (
        ("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor"), ("expert_mlp", "tensor"),
        ("vocab", "tensor"),
    ),
)  # fmt: skip
GROUPED = Plan(
    "tensor",
    (
        ("heads", ("kv", "rep")), ("kv_heads", "kv"), ("mlp", ("kv", "rep")), ("expert_mlp", ("kv", "rep")),
        ("vocab", ("kv", "rep")),
    ),
)  # fmt: skip
"""Tensor parallelism over more devices than KV heads: `rep` devices share the query heads of one KV head, and each
keeps that head's keys and values."""
SHARED = Plan(GROUPED.name, (*GROUPED.table, ("page_tokens", "rep")))
"""The same, and each of the `rep` devices keeps some tokens of every page (decode context parallelism)."""


def whole_experts(plan: Plan) -> Plan:
    """The same with the experts of mixtures split, rather than the features inside them."""
    return Plan(
        plan.name.replace("tensor", "expert"),
        tuple(("experts" if name == "expert_mlp" else name, axes) for name, axes in plan.table),
    )
