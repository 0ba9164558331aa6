"""Experts whole on their devices (GShard, Lepikhin et al. 2020, arXiv 2006.16668): a mixture under `shard_map`.

XLA left to itself does not keep a ragged product over groups on the devices that hold the groups; so each device is
told what it multiplies. No capacity is set and no row is dropped, in either form:

- *sum*. Every device of a group has all of the group's tokens (attention's sum left them there), multiplies those rows
  that chose its own experts, and one sum over devices adds the parts.
- *exchange*. Each device has some of the tokens (`attention/weave.py`) and sends every row to where its expert is, and
  what the expert says comes back: an all-to-all each way, of k/n of the bytes that gathering tokens and scattering sums
  would send (k experts a token, n devices). A device's room is for the worst case, every row its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


def swap(rows: jax.Array, counts: jax.Array, room: int, axes: tuple[str, ...], platform: str) -> jax.Array:
    """Inside `shard_map` over n devices on `axes`: rows [M,E], sorted by where they go, -> [room,E], those that came,
    sorted by where they came from, and zeros. counts i32[n,n]: how many rows each device sends (first) to each."""
    me, n = lax.axis_index(axes), counts.shape[0]
    goes, comes = counts[me], counts[:, me]
    begins, lands = jnp.cumsum(goes) - goes, (jnp.cumsum(counts, 0) - counts)[me]
    out = jnp.zeros((room, *rows.shape[1:]), rows.dtype)
    if platform != "cpu":
        return lax.ragged_all_to_all(rows, out, begins, goes, lands, comes, axis_name=axes)
    # XLA has no ragged exchange for CPUs: blocks of the largest size go there, and what they lack is dropped.
    places = jnp.arange(rows.shape[0], dtype=jnp.int32)
    blocks = rows.at[begins[:, None] + places].get(mode="fill", fill_value=0)
    blocks = lax.all_to_all(blocks, axes, 0, 0)
    starts = jnp.cumsum(comes) - comes
    where = jnp.where(places < comes[:, None], starts[:, None] + places, room)
    return out.at[where.reshape(-1)].set(blocks.reshape(n * rows.shape[0], *rows.shape[1:]), mode="drop")


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

    def exchange(
        self, mix: Mix, x: jax.Array, weights: jax.Array, experts: jax.Array, matrices: Any, platform: str
    ) -> jax.Array:
        """As `run`, but x, weights, experts and the result are split by rows over the experts' devices."""
        n = self.devices

        def here(x: jax.Array, weights: jax.Array, experts: jax.Array, matrices: Any) -> jax.Array:
            (t, k), own = experts.shape, jax.tree.leaves(matrices)[0].shape[0]
            chosen = experts.reshape(-1)
            order = jnp.argsort(chosen, stable=True)  # those that chose no expert lie last, and stay
            bounds = jnp.arange(n + 1, dtype=jnp.int32) * own
            counts = jnp.diff(jnp.searchsorted(chosen[order], bounds).astype(jnp.int32))
            counts = lax.all_gather(counts, self.axes)
            room, me = n * t * min(k, own), lax.axis_index(self.axes)
            there = partial(swap, axes=self.axes, platform=platform)
            rows = there(x[order // k], counts, room)
            # Numbered from 1: the zeros behind are none's.
            whose = there(chosen[order][:, None] + 1, counts, room) - 1
            whose = jnp.where(whose < 0, n * own, whose)
            said = mix(rows, jnp.ones((room, 1), weights.dtype), whose, matrices, me * own)
            back = there(said, counts.T, t * k)[jnp.argsort(order)].reshape(t, k, -1)
            return (back * weights[..., None].astype(back.dtype)).sum(1)

        split = PartitionSpec(self.axes)
        return jax.shard_map(here, mesh=self.mesh, in_specs=(split,) * 4, out_specs=split, check_vma=False)(
            x, weights, experts, matrices
        )
