"""Paged KV whose pages are shared by several devices, token by token: contexts longer than one device holds.

Of a page of ps tokens device r of N keeps tokens r*ps/N up to (r+1)*ps/N, so tables, the allocator and the prefix
cache know nothing of it, and every device has 1/N of every text. A decode step meets a text on all devices at once
and merges the results (flash-decoding over devices); prompts take one of the `attention.forms`.

Devices that share a text may share the weights too: those that would all keep the one KV head that their query heads
have in common (decode context parallelism). Then each has all tokens of a step and a part of the group's query heads:
queries are gathered, every device meets all of them with its keys, and the results are scattered over heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ...pallas_kernels.attention.spec import token_axis
from ..batch import NULL_PAGE, Batch, Shape
from ..flat import flat
from ..ops import AttentionSpec, PagedView, attention, merge
from ..rotary import Rotate, unrotated
from ..sequence import Part, all_queries, merged, ring, scattered, token_ring
from ..spread import order, pieces, plain, prompt_marks, prompt_part
from .paged import PagedKV, decode, encode
from .policy import Abilities, CachePolicy, Capacity, Heads

Axes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Split:
    """Axes of a mesh: `axis` cuts pages and prompt tokens, `heads` and `kv_heads` cut heads (None: whole). Where `axis`
    is among those of `heads`, it cuts queries by head and never by token."""

    mesh: Mesh | AbstractMesh
    axis: str = "seq"
    heads: Axes = None
    kv_heads: Axes = None

    @property
    def devices(self) -> int:
        return self.mesh.shape[self.axis]

    @property
    def by_heads(self) -> bool:
        """Whether the devices that share a text have the query heads of one KV head in parts."""
        return isinstance(self.heads, tuple) and self.axis in self.heads


@dataclass(frozen=True)
class SplitPages(CachePolicy):
    """Every key and value in pages, each page cut into equal parts for the devices of one mesh axis."""

    split: Split

    @property
    def abilities(self) -> Abilities:
        return Abilities(may_share_prefix=True, exact=True, quantises=True, shards=True, splits=True)

    def create(self, heads: Heads, layer: int, capacity: Capacity, layers: int | None = None) -> SplitKV:
        del layer
        if capacity.page_size % self.split.devices:
            raise ValueError(
                f"page_size={capacity.page_size} is not cut evenly over {self.split.devices} devices of axis "
                f"{self.split.axis!r}; make it a multiple of {self.split.devices}"
            )
        return SplitKV(PagedKV.of(heads, capacity, layers), self.split)


@partial(jax.tree_util.register_dataclass, data_fields=["pages"], meta_fields=["split"])
@dataclass(frozen=True)
class SplitKV:
    """One layer's pages, with the axis of a page's tokens cut over devices."""

    pages: PagedKV
    split: Split

    def layer(self, index: jax.Array) -> SplitKV:
        return replace(self, pages=self.pages.layer(index))

    def put(self, index: jax.Array, new: SplitKV) -> SplitKV:
        return replace(self, pages=self.pages.put(index, new.pages))

    @property
    def page_size(self) -> int:
        return self.pages.page_size

    @property
    def layers(self) -> int:
        """How many layers share these arrays."""
        return self.pages.layers

    def partition(self) -> SplitKV:
        """How each array is cut, as PartitionSpecs in this shape."""
        heads, axis, pages = self.split.kv_heads, self.split.axis, self.pages
        rows, scales = PartitionSpec(None, heads, axis), PartitionSpec(None, heads, axis)
        keys = PartitionSpec(None, heads, None, axis) if token_axis(pages.layout) == 3 else rows
        return replace(
            self,
            pages=replace(
                pages,
                k=keys,
                v=None if pages.v is None else rows,
                k_scales=None if pages.k_scales is None else scales,
                v_scales=None if pages.v_scales is None else scales,
                base=None if pages.base is None else PartitionSpec(),
            ),
        )

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec,
        rotate: Rotate = unrotated,
    ) -> tuple[jax.Array, SplitKV]:  # fmt: skip
        """q [T,Hq,D], k and v [T,Hkv,D] of a batch in plain order, or spread over the devices (not `by_heads`)."""
        assert batch.spread is None or not self.split.by_heads
        split, run = self.split, _whole if batch.spread is None else _spread
        q, k = rotate(q, batch.positions), rotate(k, batch.positions)
        tokens = None if batch.spread is None else split.axis
        queries, keys = PartitionSpec(tokens, split.heads), PartitionSpec(tokens, split.kv_heads)
        pages = self.partition().pages
        out, new = jax.shard_map(
            lambda pages, q, k, v, batch: run(_Here(pages, split, spec), q, k, v, batch),
            mesh=split.mesh,
            in_specs=(pages, queries, keys, keys, jax.tree.map(lambda _: PartitionSpec(), batch)),
            out_specs=(queries, pages),
            check_vma=False,
        )(self.pages, q, k, v, batch)
        return out, replace(self, pages=new)


@dataclass(frozen=True)
class _Here:
    """One device's part of the pages, inside `shard_map`."""

    pages: PagedKV
    split: Split
    spec: AttentionSpec

    @property
    def first(self) -> jax.Array:
        """The first token of each page that lies here."""
        return lax.axis_index(self.split.axis) * self.pages.page_size

    def write(self, k: jax.Array, v: jax.Array, batch: Batch, at: jax.Array, slots: jax.Array) -> _Here:
        """k and v [n,Hkv,D] of any tokens to pages `at` and slots i32[n], as far as those lie here."""
        inside = slots - self.first
        mine = (inside >= 0) & (inside < self.pages.page_size)
        local = replace(
            batch,
            pages=jnp.where(mine, at, NULL_PAGE),
            slots=jnp.where(mine, inside, 0),
        )
        return replace(self, pages=self.pages.write(k, v, local))

    def view(self, batch: Batch) -> PagedView:
        return replace(self.pages.view(batch), parts=self.split.devices, first=self.first)

    def stored(self, x: jax.Array) -> jax.Array:
        """x [n,Hkv,D] as it will be read from pages: what is met on its way must be the same numbers."""
        if self.pages.k_scales is None:
            return x.astype(self.pages.k.dtype).astype(x.dtype)
        return decode(*encode(x, self.pages.k.dtype)).astype(x.dtype)

    def merged(self, part: Part) -> jax.Array:
        """Parts of the same queries [...,Hq,D] on all devices -> out: on every device, or `by_heads` its share."""
        together = scattered if self.split.by_heads else merged
        return together(part, self.split.axis)[0]

    def rows(self, q: jax.Array, batch: Batch) -> jax.Array:
        """The rectangular part, q [B*n,Hq,D] on every device -> out as `merged` leaves it."""
        B, n = batch.shape.B, batch.shape.q
        view = self.view(batch).rows(0, B)
        found = attention(q.reshape(B, n, *q.shape[1:]), view, self.spec, self.pages.backends)
        out = self.merged(found)
        return out.reshape(B * n, *out.shape[2:]).astype(q.dtype)

    def prompt(self, q: jax.Array, batch: Batch) -> Part:
        """The prompt part in plain order, q [C,Hq,D], over what lies here."""
        B, R = batch.shape.B, batch.shape.R
        view = self.view(batch).rows(B, B + R)
        return attention(q, view, self.spec, self.pages.backends, query_starts=batch.query_starts)

    def met(self, q: jax.Array, owner: jax.Array, batch: Batch, before: bool) -> Part:
        """Queries [C/N,Hq,D] of device `owner` over what lies here; `before`: only over what earlier steps stored."""
        B, R = batch.shape.B, batch.shape.R
        view = self.view(batch).rows(B, B + R)
        lengths = view.lengths
        if before:
            view = replace(view, lengths=batch.starts[B:])
        half, parts = q.shape[0] // 2, []
        for place, piece in enumerate(pieces(owner, self.split.devices)):
            here = batch.query_starts - piece * half
            behind = jnp.maximum(here[1:] - half, 0)
            chunk = q[place * half : (place + 1) * half]
            parts.append(
                attention(
                    chunk, view, self.spec, self.pages.backends, query_starts=jnp.clip(here, 0, half),
                    ends=lengths - behind,
                )
            )  # fmt: skip
        out, lse = (jnp.concatenate(both) for both in zip(*parts))
        return out.astype(jnp.float32), lse


def _whole(here: _Here, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch) -> tuple[jax.Array, PagedKV]:
    """All tokens on every device, in plain order; q [T,Hq,D] and the result with the device's own query heads."""
    if here.split.by_heads:
        q = lax.all_gather(q, here.split.axis, axis=1, tiled=True)
    here, rect = here.write(k, v, batch, batch.pages, batch.slots), batch.shape.B * batch.shape.q
    parts = []
    if rect:
        parts.append(here.rows(q[:rect], batch))
    if batch.shape.R:
        parts.append(here.merged(here.prompt(q[rect:], batch)).astype(q.dtype))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0], here.pages


def _spread(here: _Here, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch) -> tuple[jax.Array, PagedKV]:
    """Tokens spread over the devices: rows in equal parts, and two pieces of the prompt part each."""
    assert batch.spread is not None
    axis, devices = here.split.axis, here.split.devices
    rect, outs = batch.shape.B * batch.shape.q // devices, []
    if rect:
        whole = partial(lax.all_gather, axis_name=axis, tiled=True)
        at, slots = (x.reshape(devices, -1)[:, :rect].reshape(-1) for x in (batch.pages, batch.slots))
        here = here.write(whole(k[:rect]), whole(v[:rect]), batch, at, slots)
        rows = here.rows(whole(q[:rect]), batch)
        outs.append(lax.dynamic_slice_in_dim(rows, lax.axis_index(axis) * rect, rect))
    k, v = here.stored(k[rect:]), here.stored(v[rect:])
    run = _by_ring if batch.spread.form == "ring" else _by_queries
    out, here = run(here, q[rect:], k, v, batch)
    outs.append(out.astype(q.dtype))
    return jnp.concatenate(outs) if len(outs) > 1 else outs[0], here.pages


def _by_ring(here: _Here, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch) -> tuple[jax.Array, _Here]:
    """The step's keys travel and are stored as they pass; what was stored before is met by travelling queries."""
    axis, devices = here.split.axis, here.split.devices
    marks, at, slots = prompt_marks(batch), prompt_part(batch, batch.pages), prompt_part(batch, batch.slots)
    mine = jax.tree.map(lambda x: x[lax.axis_index(axis)], marks)
    written = here

    def meet(kv: jax.Array, owner: jax.Array) -> Part:
        nonlocal written
        written = written.write(kv[0], kv[1], batch, at[owner], slots[owner])
        return flat(q, kv[0], kv[1], mine, jax.tree.map(lambda x: x[owner], marks), here.spec)

    fresh = ring(jnp.stack([k, v]), meet, axis, devices)

    def before() -> Part:
        return token_ring(q, lambda q, owner: written.met(q, owner, batch, before=True), axis, devices)

    def nothing() -> Part:
        return jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)

    found = lax.cond((batch.starts[batch.shape.B :] > 0).any(), before, nothing)
    return merge(fresh, found)[0], written


def _by_queries(
    here: _Here, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch
) -> tuple[jax.Array, _Here]:
    """The step's keys are gathered and stored, then queries meet all stored keys where those lie."""
    assert batch.spread is not None
    axis, devices, C = here.split.axis, here.split.devices, batch.shape.C
    k, v = lax.all_gather(jnp.stack([k, v]), axis, axis=1, tiled=True)
    at, slots = (prompt_part(batch, x).reshape(-1) for x in (batch.pages, batch.slots))
    here = here.write(k, v, batch, at, slots)
    if batch.spread.form == "token_ring":
        return token_ring(q, lambda q, owner: here.met(q, owner, batch, before=False), axis, devices)[0], here
    prompt = Shape(0, 0, batch.shape.R, C)

    def meet(q: jax.Array) -> Part:
        out, lse = here.prompt(plain(q, prompt, devices), batch)
        places = order(prompt, devices)
        return out[places], lse[places]

    return all_queries(q, meet, axis)[0], here
