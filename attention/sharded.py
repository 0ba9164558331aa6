"""Attention back ends on a mesh: each device attends with its own heads.

XLA cannot partition a kernel by itself, so every call is wrapped in `shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from .ops import AttentionSpec, Backend, Layout, PagedView, Tree


@dataclass(frozen=True)
class Sharded:
    """`backend` on `mesh`, query and KV heads (pages [M,Hkv,...]) split over mesh axis `axis`.

    `rep`: a second mesh axis, over which the query heads of each KV head are split further and its pages repeated.
    """

    backend: Backend
    mesh: Mesh | AbstractMesh
    axis: str
    rep: str | None = None

    def layout(self, head_dim: int) -> Layout:
        return self.backend.layout(head_dim)

    def rows(
        self, q: jax.Array, view: PagedView, spec: AttentionSpec, tree: Tree | None = None
    ) -> tuple[jax.Array, jax.Array]:
        def run(q: jax.Array, view: PagedView, tree: Tree | None) -> tuple[jax.Array, jax.Array]:
            return self.backend.rows(q, view, spec, tree)

        return self._split(run, 2, q, view, tree)

    def prompt(
        self, q: jax.Array, view: PagedView, query_starts: jax.Array, spec: AttentionSpec,
        ends: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        def run(q: jax.Array, view: PagedView, rows: tuple) -> tuple[jax.Array, jax.Array]:
            starts, ends = rows
            return self.backend.prompt(q, view, starts, spec, ends)

        return self._split(run, 1, q, view, (query_starts, ends))

    def _split(
        self,
        run: Callable[..., tuple[jax.Array, jax.Array]],
        before: int,
        q: jax.Array,
        view: PagedView,
        rest: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """`run` under shard_map; q has `before` dimensions before its heads, and `rest` is whole everywhere."""
        devices = self.mesh.shape[self.axis]
        if view.kv_heads % devices:
            raise NotImplementedError(
                f"{view.kv_heads} KV heads do not split over {devices} devices of axis {self.axis!r}"
            )
        if self.rep is not None and view.kv_heads != devices:
            raise NotImplementedError(
                f"KV heads are repeated over axis {self.rep!r} only where each device of {self.axis!r} has one of "
                f"them; there are {view.kv_heads} on {devices}"
            )
        heads = PartitionSpec(*(None,) * before, self.axis if self.rep is None else (self.axis, self.rep))
        # Pages and scales have their heads second; tables and lengths are whole.
        paged = jax.tree.map(
            lambda x: PartitionSpec(None, self.axis) if x.ndim > 2 else PartitionSpec(), view
        )
        whole = jax.tree.map(lambda _: PartitionSpec(), rest)
        return jax.shard_map(
            run, mesh=self.mesh, in_specs=(heads, paged, whole), out_specs=(heads, heads), check_vma=False
        )(q, view, rest)
