"""Experts whole on their devices (GShard, Lepikhin et al. 2020, arXiv 2006.16668): a mixture under `shard_map`.

XLA left to itself does not keep a ragged product over groups on the devices that hold the groups; so each device is
told what it multiplies. Every device of a group has all of the group's tokens (attention's sum left them there),
multiplies those rows that chose its own experts, and one sum over devices adds the parts. Nothing is sent to where an
expert is, no capacity is set and no row is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

Mix = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array], jax.Array]
"""(x [T,E], weights [T,k], experts i32[T,k], matrices, the first expert whose matrices are here) -> [T,E]."""


@dataclass(frozen=True)
class ExpertSplit:
    """Experts split over the mesh axes `axes`, the first of them slowest: device r has experts r*X/n to (r+1)*X/n.

    `tokens`: the mesh axis over which a spread batch has its tokens; they stay where they are.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]
    tokens: str | None = None

    @property
    def devices(self) -> int:
        """Over how many devices the experts are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    def run(
        self, mix: Mix, x: jax.Array, weights: jax.Array, experts: jax.Array, matrices: Any, spread: bool
    ) -> jax.Array:
        """The sum over devices of `mix`, each with its own part of the matrices, whose first axis is the expert.

        `spread`: the rows of x, weights and experts are split over `tokens`, and so is the result.
        """

        def here(x: jax.Array, weights: jax.Array, experts: jax.Array, matrices: Any) -> jax.Array:
            own = jax.tree.leaves(matrices)[0].shape[0]
            first = lax.axis_index(self.axes) * own
            return lax.psum(mix(x, weights, experts, matrices, first), self.axes)

        rows, own = PartitionSpec(self.tokens if spread else None), PartitionSpec(self.axes)
        return jax.shard_map(
            here, mesh=self.mesh, in_specs=(rows, rows, rows, own), out_specs=rows, check_vma=False
        )(x, weights, experts, matrices)
