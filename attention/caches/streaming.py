"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): a few first tokens and a window, in a fixed memory.

Every token sees the first `sinks` tokens and the last `window` (itself included). Keys are kept as they come and
rotated when they are read, at their place in this selection, so distances never exceed sinks + window and a text may
grow without end. What a token sees is a rule about positions, so it does not depend on chunks, on the batch or on who
recomputes it. Deviation from the released code: a prompt follows the same rule, where that code runs the first prompt
densely and trims the cache afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from ..batch import Batch
from ..ops import NEG_INF, AttentionSpec
from ..rotary import Rotate, unrotated
from .policy import Abilities, CachePolicy, Capacity, Heads
from .seats import BySeat, live_seats, prompt_blocks, rectangular, zeros


@dataclass(frozen=True)
class StreamingLLM(CachePolicy):
    """Sinks and window, in tokens; the paper: 4 sinks, windows of 508 to 2,044."""

    sinks: int = 4
    window: int = 1020

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ValueError(f"{self!r} needs at least 0 sinks and a window of 1: a token sees itself")

    @property
    def abilities(self) -> Abilities:
        return Abilities(pages="none")

    def longest(self, length: int) -> int:
        return min(length, self.sinks + self.window)

    def create(self, heads: Heads, layer: int, capacity: Capacity, layers: int | None = None) -> StreamingKV:
        del layer
        shape = (capacity.seats + 1, self.sinks + self.window, heads.kv_heads, heads.head_dim)
        k, v = (zeros(shape, capacity.stored, layers) for _ in range(2))
        return StreamingKV(k, v, self.sinks)


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=["sinks"])
@dataclass(frozen=True)
class StreamingKV(BySeat):
    """One layer: raw keys and values [seats+1,K,Hkv,D]. Token p < sinks is in place p, later ones in
    sinks + (p - sinks) mod window: a ring."""

    k: jax.Array
    v: jax.Array
    sinks: int

    @property
    def window(self) -> int:
        return self.k.shape[1] - self.sinks

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec,
        rotate: Rotate = unrotated,
    ) -> tuple[jax.Array, StreamingKV]:  # fmt: skip
        """q [T,Hq,D], k and v [T,Hkv,D], raw. One token a rectangular row."""
        B, new, parts = rectangular(batch, self, spec), self, []
        look = partial(self._look, spec=spec, rotate=rotate)
        if B:
            seats, start = live_seats(batch, self.k.shape[0]), batch.positions[:B]
            mine = q[:B, None], k[:B, None], v[:B, None]
            parts.append(jax.vmap(look)(self.k[seats], self.v[seats], *mine, start)[:, 0])
            at = self._places(start)
            new = replace(new, k=_set(new.k, (seats, at), k[:B]), v=_set(new.v, (seats, at), v[:B]))
        if batch.shape.R:

            def advance(carry, inputs, live):
                q, k, v, positions = inputs
                out = look(carry[0], carry[1], q, k, v, positions[0])
                end = positions[0] + live.sum()
                kept = live & ((positions < self.sinks) | (positions >= end - self.window))
                at = jnp.where(kept, self._places(positions), self.k.shape[1])
                return (_set(carry[0], (at,), k), _set(carry[1], (at,), v)), out

            inputs = q[B:], k[B:], v[B:], batch.positions[B:]
            out, held = prompt_blocks(advance, (new.k, new.v), inputs, batch)
            new = replace(new, k=held[0], v=held[1])
            parts.append(out)
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], new

    def _places(self, positions: jax.Array) -> jax.Array:
        ring = self.sinks + (positions - self.sinks) % self.window
        return jnp.where(positions < self.sinks, positions, ring)

    def _look(
        self, keys: jax.Array, values: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array,
        spec: AttentionSpec, rotate: Rotate,
    ) -> jax.Array:  # fmt: skip
        """One row: keys and values [K,Hkv,D] of `start` tokens, and n tokens q, k, v behind them -> out [n,Hq,D].

        Sinks meet queries at the places of both in the selection. Between the window and the queries only distances
        count, so they are numbered from the oldest key that the first query may see.
        """
        S, R, n = self.sinks, self.window, q.shape[0]
        keys, values = keys.astype(k.dtype), values.astype(v.dtype)
        text, first = start + jnp.arange(n, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32)
        ago = (start - 1 - S - jnp.arange(R, dtype=jnp.int32)) % R
        at = jnp.concatenate([start - 1 - ago, text])  # text positions of the ring, then of the new tokens
        base = jnp.maximum(start - R, 0)
        ring = rotate(jnp.concatenate([keys[S:], k]), jnp.maximum(at - base, 0))
        parts, seen = [_scores(rotate(q, text - base), ring, spec)], [at >= S]
        known, all_values = [at], [jnp.concatenate([values[S:], v])]
        if S:
            fresh, came = jnp.clip(first - start, 0, n - 1), (first >= start)[:, None, None]
            sinks = rotate(jnp.where(came, k[fresh], keys[:S]), first)
            parts.append(_scores(rotate(q, jnp.minimum(text, S + R - 1)), sinks, spec))
            known.append(first)
            seen.append(first >= 0)
            all_values.append(jnp.where(came, v[fresh], values[:S]))
        position = jnp.concatenate(known)[None, :]
        allowed = jnp.concatenate(seen)[None, :] & (position <= text[:, None])
        allowed &= (position < S) | (position > text[:, None] - R)
        if spec.window is not None:
            allowed &= position > text[:, None] - spec.window
        weights = jax.nn.softmax(jnp.where(allowed, jnp.concatenate(parts, -1), NEG_INF), -1)
        held = jnp.where(
            allowed.any(0)[:, None, None], jnp.concatenate(all_values), 0
        )  # never another text's NaN
        out = jnp.einsum("hgns,shd->nhgd", weights, held.astype(jnp.float32))
        return out.reshape(q.shape).astype(q.dtype)


def _scores(q: jax.Array, k: jax.Array, spec: AttentionSpec) -> jax.Array:
    """q [n,Hq,D], k [S,Hkv,D] -> scaled and capped scores f32[Hkv,G,n,S]."""
    n, heads, dim = q.shape
    grouped = q.reshape(n, k.shape[1], heads // k.shape[1], dim).astype(jnp.float32)
    return spec.capped(jnp.einsum("nhgd,shd->hgns", grouped, k.astype(jnp.float32)) * spec.scale)


def _set(held: jax.Array, at: tuple[jax.Array, ...], new: jax.Array) -> jax.Array:
    return held.at[at].set(new.astype(held.dtype), mode="drop")
