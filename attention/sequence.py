"""Attention whose keys and values lie on several devices: what travels, and how parts come together.

All functions run inside `shard_map` over mesh axis `axis` of N devices, on shards. `Meet` stands for the attention of
some queries to the keys at hand, as (out, lse).

- `ring` (Liu et al. 2023, arXiv 2310.01889): keys and values travel, queries stay. With the zigzag order of
  `attention.spread` every device has the same work at every hop.
- `token_ring` (arXiv 2412.20501): keys and values stay, queries travel one way, and results the other way home.
- `all_queries`: every device meets all queries with its own keys; one all-gather before, one reduce-scatter behind.
- `merged`: the same where all devices have the queries already (decode).
- `scattered`: the same, and each device keeps a share of the heads: half the bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .ops import merge

Part = tuple[jax.Array, jax.Array]
"""(out f32[n,Hq,D], lse f32[n,Hq]) of queries over some of their keys."""
Meet = Callable[[jax.Array, jax.Array], Part]
"""(q [n,Hq,D], whose they are i32[]) -> their part over the keys of this device."""


def ring(kv: jax.Array, meet: Callable[[jax.Array, jax.Array], Part], axis: str, devices: int) -> Part:
    """Keys and values of all devices pass by, one array at a time: `meet(kv, owner)` -> this device's queries over
    what `owner` i32[] brought.

    Each transfer starts before what is at hand is met, and there are N-1 of them.
    """
    here, found = lax.axis_index(axis), None
    around = [(i, (i + 1) % devices) for i in range(devices)]
    for hop in range(devices):
        coming = kv if hop == devices - 1 else lax.ppermute(kv, axis, around)
        part = meet(kv, (here - hop) % devices)
        # Else the compiler may do all transfers first and then meet what came.
        kv, part = lax.optimization_barrier((coming, part))
        found = part if found is None else merge(found, part)
    assert found is not None
    return found


def token_ring(q: jax.Array, meet: Meet, axis: str, devices: int) -> Part:
    """q [n,Hq,D] of this device over the keys of all. At hop s a device meets the queries of the one s places ahead,
    while the next queries come and the results of hop s-1 go home; only the last results are waited for."""
    here, home = lax.axis_index(axis), None
    back = [(i, (i - 1) % devices) for i in range(devices)]
    own = leaving = None
    for hop in range(devices):
        coming = q if hop == devices - 1 else lax.ppermute(q, axis, back)
        if leaving is not None:
            home = _send(leaving, axis, devices, hop - 1)
        part = meet(q, (here + hop) % devices)
        q, part, home = lax.optimization_barrier((coming, part, home))
        if hop == 0:
            own = part
        else:
            leaving = part
        if home is not None and own is not None:
            own, home = merge(own, home), None
    assert own is not None
    return own if leaving is None else merge(own, _send(leaving, axis, devices, devices - 1))


def _send(part: Part, axis: str, devices: int, hops: int) -> Part:
    """Results to the owner of their queries, `hops` places ahead; out and lse travel as one array."""
    out, lse = part
    packed = jnp.concatenate([out, lse[..., None]], -1)
    packed = lax.ppermute(packed, axis, [(i, (i + hops) % devices) for i in range(devices)])
    return packed[..., :-1], packed[..., -1]


def all_queries(q: jax.Array, meet: Callable[[jax.Array], Part], axis: str) -> Part:
    """q [n,Hq,D] of this device over the keys of all: `meet(q of all [N*n,Hq,D])`, and each gets its own back."""
    out, lse = meet(lax.all_gather(q, axis, tiled=True))
    weight, top = _weight(lse, axis)
    total = lax.psum_scatter(weight, axis, tiled=True)
    summed = lax.psum_scatter(out.astype(jnp.float32) * weight[..., None], axis, tiled=True)
    n = q.shape[0]
    return _finished(summed, total, lax.dynamic_slice_in_dim(top, lax.axis_index(axis) * n, n))


def merged(part: Part, axis: str) -> Part:
    """The same queries on every device, each over its own keys: the whole result, on every device."""
    out, lse = part
    weight, top = _weight(lse, axis)
    summed = lax.psum(out.astype(jnp.float32) * weight[..., None], axis)
    return _finished(summed, lax.psum(weight, axis), top)


def scattered(part: Part, axis: str) -> Part:
    """As `merged`, but each device gets its share of the heads, in order: (out f32[...,Hq/N,D], lse f32[...,Hq/N]).

    Only lse is gathered; outs are weighed by it where they are made, and meet in one reduce-scatter over heads.
    """
    out, lse = part
    found = lax.all_gather(lse, axis)
    top = jnp.max(found, 0)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    total = jnp.exp(found - top).sum(0)
    weight = jnp.exp(lse - top) / jnp.maximum(total, 1e-30)
    heads = out.ndim - 2
    summed = lax.psum_scatter(
        out.astype(jnp.float32) * weight[..., None], axis, scatter_dimension=heads, tiled=True
    )
    whole, share = _lse(total, top), summed.shape[heads]
    return summed, lax.dynamic_slice_in_dim(whole, lax.axis_index(axis) * share, share, heads)


def _weight(lse: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """(each device's share of the softmax, unnormalised, and the largest lse), f32 [..., Hq] both."""
    top = lax.pmax(lse, axis)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    return jnp.exp(lse - top), top


def _finished(summed: jax.Array, total: jax.Array, top: jax.Array) -> Part:
    return summed / jnp.maximum(total, 1e-30)[..., None], _lse(total, top)


def _lse(total: jax.Array, top: jax.Array) -> jax.Array:
    return jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)
