"""Blocks of keys or values as codes: quantised in groups, with outliers kept and the error's low-rank part (GEAR).

X ~ D + L + S (Kang et al. 2024, arXiv 2403.05527, equation 2): D is the quantised backbone, S the few largest and
smallest entries of each vector, kept as they are and replaced by the vector's mean before quantising, L = A B^T the
leading part of what quantising lost, by power iteration. Keys are quantised along tokens (a vector is a channel of
the block), values along channels (a vector is a token), in groups of at most `group` numbers, with a scale and a
zero each. Without outliers and rank it is plain grouped quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

HALF = jnp.float16


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero", "values", "places", "a", "b"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Codes:
    """Blocks of V vectors of L numbers: codes u8[...,V,L*bits/8]; scale and zero f16[...,V,L/group]; outliers' values
    f16[...,V,2c] and places i16[...,V,2c]; factors a f16[...,V,r] and b f16[...,L,r]. None where there are none."""

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array
    values: jax.Array | None
    places: jax.Array | None
    a: jax.Array | None
    b: jax.Array | None

    def at(self, where: jax.Array) -> Codes:
        """Blocks `where` i32[W] of [M,...]."""
        return jax.tree.map(lambda x: x.at[where].get(mode="promise_in_bounds"), self)

    def put(self, where: jax.Array, new: Codes) -> Codes:
        """These blocks [M,...] with those at `where` i32[W] replaced."""
        return jax.tree.map(lambda x, y: x.at[where].set(y, mode="promise_in_bounds"), self, new)


@dataclass(frozen=True)
class Codec:
    """`bits` a number (2, 4 or 8), `outliers`: their share of each vector, `rank` of the error's factors, found by
    `loops` rounds of power iteration."""

    bits: int = 4
    group: int = 64
    outliers: float = 0.0
    rank: int = 0
    loops: int = 3

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8) or self.group < 1 or not 0 <= self.outliers < 1 or self.rank < 0:
            raise ValueError(
                f"{self!r} needs 2, 4 or 8 bits, groups of at least 1, outliers in [0, 1), rank >= 0"
            )

    def groups(self, length: int) -> int:
        """How many groups vectors of `length` numbers have. ValueError where they cannot be packed."""
        size = min(self.group, length)
        if length % size or length * self.bits % 8:
            raise ValueError(
                f"vectors of {length} numbers do not divide into groups of {size} and whole bytes of {self.bits} bits; "
                f"choose a group that divides {length}, or 8 bits"
            )
        return length // size

    def empty(self, blocks: tuple[int, ...], vectors: int, length: int) -> Codes:
        """Zeroed codes [*blocks,...] of blocks of `vectors` of `length` numbers. ValueError as `groups`."""
        self.groups(length)
        spec = jax.eval_shape(self.encode, jax.ShapeDtypeStruct((*blocks, vectors, length), jnp.float32))
        return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), spec)

    def encode(self, x: jax.Array) -> Codes:
        """x f32[...,V,L] -> codes."""
        x = x.astype(jnp.float32)
        plain, values, places = self._split(x)
        groups = plain.reshape(*x.shape[:-1], self.groups(x.shape[-1]), -1)
        low, high, levels = groups.min(-1), groups.max(-1), 2**self.bits - 1
        scale = jnp.where(high > low, (high - low) / levels, 1.0).astype(HALF)
        zero = low.astype(HALF)
        steps = (groups - _wide(zero)[..., None]) / jnp.maximum(_wide(scale), 1e-7)[..., None]
        numbers = jnp.clip(jnp.round(steps), 0, levels).astype(jnp.uint8).reshape(x.shape)
        codes = Codes(_pack(numbers, self.bits), scale, zero, values, places, None, None)
        if not self.rank:
            return codes
        a, b = _factors(plain - self._backbone(codes, x.shape[-1]), self.rank, self.loops)
        return Codes(codes.codes, scale, zero, values, places, a.astype(HALF), b.astype(HALF))

    def decode(self, codes: Codes, length: int) -> jax.Array:
        """Codes of vectors of `length` numbers -> x f32[...,V,L]."""
        x = self._backbone(codes, length)
        if codes.a is not None and codes.b is not None:
            x = x + jnp.einsum("...vr,...lr->...vl", _wide(codes.a), _wide(codes.b))
        if codes.values is None or codes.places is None:
            return x
        return jnp.put_along_axis(x, codes.places.astype(jnp.int32), _wide(codes.values), -1, inplace=False)

    def _split(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """(x with its outliers replaced by their vectors' means, their values, their places)."""
        if not self.outliers:
            return x, None, None
        count = max(1, round(self.outliers / 2 * x.shape[-1]))
        places = jnp.concatenate([lax.top_k(x, count)[1], lax.top_k(-x, count)[1]], -1)
        values = jnp.take_along_axis(x, places, -1)
        mean = jnp.broadcast_to(x.mean(-1, keepdims=True), places.shape)
        plain = jnp.put_along_axis(x, places, mean, -1, inplace=False)
        return plain, values.astype(HALF), places.astype(jnp.int16)

    def _backbone(self, codes: Codes, length: int) -> jax.Array:
        numbers = _unpack(codes.codes, self.bits).astype(jnp.float32)
        groups = numbers.reshape(*codes.scale.shape, -1)
        return (groups * _wide(codes.scale)[..., None] + _wide(codes.zero)[..., None]).reshape(
            *codes.scale.shape[:-1], length
        )


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _pack(numbers: jax.Array, bits: int) -> jax.Array:
    """u8[...,L] below 2**bits -> u8[...,L*bits/8]: the first number of a byte is its lowest bits."""
    per = 8 // bits
    parts = numbers.reshape(*numbers.shape[:-1], -1, per)
    shifts = jnp.arange(per, dtype=jnp.uint8) * bits
    return (parts << shifts).sum(-1, dtype=jnp.uint8)


def _unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The inverse of `_pack`."""
    shifts = jnp.arange(8 // bits, dtype=jnp.uint8) * bits
    parts = (packed[..., None] >> shifts) & jnp.uint8(2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1)


def _factors(error: jax.Array, rank: int, loops: int) -> tuple[jax.Array, jax.Array]:
    """error f32[...,V,L] ~ a b^T, a [...,V,r], b [...,L,r], by subspace iteration.

    Orthonormal in every round, where GEAR's code is in the last one only: there all columns turn to the first singular
    vector, and many rounds lose what few had found.
    """
    b = jax.random.uniform(jax.random.key(0), (error.shape[-1], rank))
    b = jnp.broadcast_to(b, (*error.shape[:-2], *b.shape))
    a = jnp.zeros((*error.shape[:-1], rank))
    for _ in range(loops):
        a = _orthonormal(jnp.einsum("...vl,...lr->...vr", error, _orthonormal(b)))
        b = jnp.einsum("...vl,...vr->...lr", error, a)
    return a, b


def _orthonormal(x: jax.Array) -> jax.Array:
    """Columns of x [...,N,r] made orthonormal one after the other (Gram-Schmidt, twice); those that vanish are 0."""
    columns: list[jax.Array] = []
    for index in range(x.shape[-1]):
        column = x[..., index]
        size = jnp.linalg.norm(column, axis=-1, keepdims=True)
        for _ in range(2):
            for other in columns:
                column = column - (column * other).sum(-1, keepdims=True) * other
        norm = jnp.linalg.norm(column, axis=-1, keepdims=True)
        columns.append(jnp.where(norm > 1e-6 * size, column / jnp.maximum(norm, 1e-30), 0.0))
    return jnp.stack(columns, -1)


@partial(
    jax.tree_util.register_dataclass, data_fields=["k", "v", "table", "lengths"],
    meta_fields=["codec", "head_dim", "page_size"],
)  # fmt: skip
@dataclass(frozen=True)
class CodedView:
    """Pages of codes as `attention.pages.Queries` meets them: blocks [M,Hkv,...] of keys (V = D, L = page_size) and
    of values (V = page_size, L = D); table i32[rows,P], lengths i32[rows]."""

    k: Codes
    v: Codes
    table: jax.Array
    lengths: jax.Array
    codec: Codec
    head_dim: int
    page_size: int
    k_scales = v_scales = None

    @property
    def dtype(self) -> jnp.dtype:
        return self.k.codes.dtype

    @property
    def kv_heads(self) -> int:
        return self.k.codes.shape[1]

    @property
    def span(self) -> int:
        """Tokens of a text that a page stands for."""
        return self.page_size

    def places(self, page: jax.Array) -> jax.Array:
        """Text positions i32[...,ps] of the pages at places i32[...] of a table."""
        return page[..., None] * self.page_size + jnp.arange(self.page_size, dtype=jnp.int32)

    def read(self, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pages `where` i32[W]: keys f32[W,Hkv,D,ps] and values f32[W,Hkv,ps,D]."""
        k = self.codec.decode(self.k.at(where), self.page_size)
        return k, self.codec.decode(self.v.at(where), self.head_dim)
