"""Paged KV (PagedAttention: Kwon et al. 2023, arXiv 2309.06180): a pool of pages, tables on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from ...pallas_kernels.attention.spec import page_shapes, token_axis
from ..batch import NULL_PAGE, Batch
from ..blockwise import Blockwise
from ..ops import AttentionSpec, Backend, Layout, PagedView, Tree, attention
from ..rotary import Rotate, unrotated
from .policy import Abilities, CachePolicy, Capacity, Heads

QUANTISED = ("int8", "float8_e4m3fn")


def encode(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """x [T,H,D] -> (codes [T,H,D], scales f32[T,H]) with x ~ codes * scale: symmetric, one scale a token and head."""
    wide = x.astype(jnp.float32)
    largest = jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else float(jnp.finfo(dtype).max)
    scales = jnp.abs(wide).max(-1) / largest
    codes = wide / jnp.maximum(scales, 1e-30)[..., None]
    return (jnp.round(codes) if jnp.issubdtype(dtype, jnp.integer) else codes).astype(dtype), scales


def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The inverse of `encode`, in float32."""
    return codes.astype(jnp.float32) * scales[..., None]


def draft_tree(batch: Batch, ancestors: jax.Array, spec: AttentionSpec) -> Tree:
    """The draft trees of a batch's rectangular rows, as the attention op takes them."""
    B, n = batch.shape.B, batch.shape.q
    depths = batch.positions[: B * n].reshape(B, n) - batch.starts[:B, None]
    return Tree.of(ancestors, depths, spec.window)


@dataclass(frozen=True)
class Pages(CachePolicy):
    """Every key and value in pages (PagedAttention): the cache of an engine that was given none."""

    @property
    def abilities(self) -> Abilities:
        return Abilities(
            may_share_prefix=True, can_roll_back=True, exact=True, quantises=True, shards=True, splits=True
        )

    def create(self, heads: Heads, layer: int, capacity: Capacity, layers: int | None = None) -> PagedKV:
        del layer
        return PagedKV.of(heads, capacity, layers)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "k_scales", "v_scales", "base"],
    meta_fields=["backends", "layers", "layout"],
)
@dataclass(frozen=True)
class PagedKV:
    """One layer's pages as `PagedView` describes them: k, v (None when paired), scales (None unless quantised).

    Layers that run under one scan share arrays [layers*M, ...]: layer l uses pages l*M.. of them, and `base` is
    its offset while it runs. None means no offset.
    """

    k: jax.Array
    v: jax.Array | None
    k_scales: jax.Array | None = None
    v_scales: jax.Array | None = None
    base: jax.Array | None = None
    backends: tuple[Backend, ...] = (Blockwise(),)
    layers: int = 1
    layout: Layout = "transposed"

    @staticmethod
    def of(heads: Heads, capacity: Capacity, layers: int | None = None) -> PagedKV:
        """Empty pages for attention layers with these heads."""
        return PagedKV.empty(
            capacity.num_pages, capacity.page_size, heads.kv_heads, heads.head_dim, capacity.stored,
            capacity.backends, layers or 1,
        )  # fmt: skip

    @staticmethod
    def empty(
        pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: jnp.dtype,
        backends: tuple[Backend, ...] = (Blockwise(),), layers: int = 1,
    ) -> PagedKV:  # fmt: skip
        """Zeroed pages for `layers` layers that share arrays, lying as the first back end wants them."""
        dtype, M = jnp.dtype(dtype), layers * pages
        layout = backends[0].layout(head_dim)
        shapes = page_shapes(layout, M, kv_heads, page_size, head_dim)
        k, v = (None if shape is None else jnp.zeros(shape, dtype) for shape in shapes)
        scaled = dtype.name in QUANTISED
        scales = [jnp.zeros((M, kv_heads, page_size), jnp.float32) if scaled else None for _ in range(2)]
        return PagedKV(k, v, *scales, backends=backends, layers=layers, layout=layout)  # type: ignore[arg-type]

    def layer(self, index: jax.Array) -> PagedKV:
        """One layer of several that share these arrays."""
        return replace(self, base=index * (self.k.shape[0] // self.layers))

    def put(self, index: jax.Array, new: PagedKV) -> PagedKV:
        """What `layer(index)` became."""
        del index
        return replace(new, base=None)

    def write(self, k: jax.Array, v: jax.Array, batch: Batch) -> PagedKV:
        """k and v [T,Hkv,D] to the pages and slots that the batch names, in place where the array is donated."""
        base = jnp.int32(0) if self.base is None else self.base
        at = ((batch.pages + base)[:, None], jnp.arange(k.shape[1], dtype=jnp.int32)[None, :])
        slots = batch.slots[:, None]
        new = self
        if self.k_scales is not None and self.v_scales is not None:
            (k, k_scale), (v, v_scale) = encode(k, self.k.dtype), encode(v, self.k.dtype)
            new = replace(
                new,
                k_scales=self.k_scales.at[*at, slots].set(k_scale, mode="promise_in_bounds"),
                v_scales=self.v_scales.at[*at, slots].set(v_scale, mode="promise_in_bounds"),
            )
        if self.layout == "padded":
            k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, self.k.shape[3] - x.shape[2]))) for x in (k, v))
        if self.v is None:
            k = jnp.concatenate([k, v], -1)
        else:
            new = replace(new, v=self.v.at[*at, slots].set(v.astype(self.v.dtype), mode="promise_in_bounds"))
        k_at = (*at, slice(None), slots) if self.layout == "transposed" else (*at, slots)
        return replace(new, k=self.k.at[k_at].set(k.astype(self.k.dtype), mode="promise_in_bounds"))

    def view(self, batch: Batch) -> PagedView:
        table = batch.page_table + (jnp.int32(0) if self.base is None else self.base)
        return PagedView(self.k, self.v, table, batch.lengths, self.k_scales, self.v_scales, self.layout)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec,
        rotate: Rotate = unrotated,
    ) -> tuple[jax.Array, PagedKV]:  # fmt: skip
        """q [T,Hq,D], k and v [T,Hkv,D]: writes rotated keys and values to their pages, then attends."""
        q, k = rotate(q, batch.positions), rotate(k, batch.positions)
        new, B, n = self.write(k, v, batch), batch.shape.B, batch.shape.q
        parts = []
        if B:
            rect = q[: B * n].reshape(B, n, *q.shape[1:])
            tree = None if batch.ancestors is None else draft_tree(batch, batch.ancestors, spec)
            out, _ = attention(rect, new.view(batch).rows(0, B), spec, self.backends, tree=tree)
            parts.append(out.reshape(B * n, *q.shape[1:]))
        if batch.shape.R:
            parts.append(new.prompt(q[B * n :], batch, spec)[0])
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], new

    def prompt(self, q: jax.Array, batch: Batch, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
        """The prompt part, q [C,Hq,D], rotated, over pages that are written: (out [C,Hq,D], lse f32[C,Hq])."""
        B, R = batch.shape.B, batch.shape.R
        view = self.view(batch).rows(B, B + R)
        return attention(q, view, spec, self.backends, query_starts=batch.query_starts)

    @property
    def page_size(self) -> int:
        return self.k.shape[token_axis(self.layout)]

    def commit(self, batch: Batch, path: jax.Array) -> PagedKV:
        """Of draft trees (the rectangular part) keep the slots path i32[B,T], in that order, behind each other; what
        lies behind them is overwritten by the next tokens. All layers that share these arrays at once."""
        B, T = path.shape
        first = batch.starts[:B, None]
        targets = first + jnp.arange(T, dtype=jnp.int32)

        def places(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
            width = batch.page_table.shape[1]
            inside = (positions < width * self.page_size) & (batch.lengths[:B, None] > 0)
            at = jnp.minimum(positions // self.page_size, width - 1)
            page = jnp.where(inside, jnp.take_along_axis(batch.page_table[:B], at, 1), NULL_PAGE)
            offsets = jnp.arange(self.layers, dtype=jnp.int32) * (self.k.shape[0] // self.layers)
            return (page.reshape(-1) + offsets[:, None]).reshape(-1), jnp.tile(
                (positions % self.page_size).reshape(-1), self.layers
            )

        (source, source_slot), (target, target_slot) = places(first + path), places(targets)

        def move(array: jax.Array | None, transposed: bool = False) -> jax.Array | None:
            if array is None:
                return None
            here = (slice(None), slice(None)) if transposed else (slice(None),)
            return array.at[target, *here, target_slot].set(array[source, *here, source_slot])

        return replace(
            self, k=move(self.k, self.layout == "transposed"), v=move(self.v),
            k_scales=move(self.k_scales), v_scales=move(self.v_scales),
        )  # fmt: skip
