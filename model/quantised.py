"""Weights stored in few bits: one container for every format, and the products that use it.

A weight [out, in] is kept as codes with scales, and where a format has them zero points:

- "int8": codes i8[out, in], scales f32[out]; w = codes * scales (symmetric, a scale an output channel).
- "fp8": codes float8_e4m3fn[out, in], scales f32[out]; w = codes * scales.
- "int4": two codes of 0..15 a byte, u8[out, in/2]; scales bf16[out, groups] and zero points i8[out, groups] of
  groups of inputs; w = (codes - zeros) * scales. Byte j of a group of G holds code j (low) and code j + G/2 (high),
  so a slice of whole groups is a slice of the bytes and tensor parallelism may cut the inputs.

Experts have a leading axis more. Codes and scales carry the logical axes of the weight that they stand for.

With `activations="int8"` a row of inputs is rounded to 8 bits with a scale of its own, max |x| / 127 (dynamic, per
token: ZeroQuant, arXiv 2206.01861), and the product is of integers, exact in 32 bits (8 bits by 8 bits over up to
2^17 inputs). Otherwise weights are widened inside the product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from .config import QuantConfig
from .matmul import fused_product, integer_product, weights_first

CODES = {
    "int8": jnp.dtype(jnp.int8),
    "fp8": jnp.dtype(jnp.float8_e4m3fn),
    "int4": jnp.dtype(jnp.uint8),
}
LARGEST = {"int8": 127.0, "fp8": 448.0}
FOUR_BITS = 15

Parts = dict[str, jax.Array]
"""A quantised weight's arrays by name: "codes", "scales", and "zeros" where the format has them."""


def part_shapes(shape: tuple[int, ...], config: QuantConfig) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
    """(shape, dtype) of each part of a weight [..., out, in]; ValueError where groups do not divide the inputs."""
    *lead, inputs = shape
    codes = CODES[config.format]
    if config.group_size is None:
        return {"codes": (shape, codes), "scales": (tuple(lead), jnp.dtype("float32"))}
    if inputs % config.group_size:
        raise ValueError(
            f"groups of {config.group_size} do not divide a weight's {inputs} inputs; choose a group_size that does"
        )
    groups = (*lead, inputs // config.group_size)
    return {
        "codes": ((*lead, inputs // 2), codes),
        "scales": (groups, jnp.dtype("bfloat16")),
        "zeros": (groups, jnp.dtype("int8")),
    }


def quantise(weight: jax.Array, config: QuantConfig) -> Parts:
    """The parts of a weight [..., out, in]: rounded to nearest on the range of each channel or group."""
    w = weight.astype(jnp.float32)
    if config.group_size is not None:
        return _quantise_groups(w, config)
    largest = LARGEST[config.format]
    scales = jnp.abs(w).max(-1) / largest
    scales = jnp.where(scales > 0, scales, 1.0)
    codes = w / scales[..., None]
    if config.format == "int8":
        codes = jnp.round(codes)
    return {"codes": jnp.clip(codes, -largest, largest).astype(CODES[config.format]), "scales": scales}


def _quantise_groups(w: jax.Array, config: QuantConfig) -> Parts:
    part_shapes(w.shape, config)
    grouped = w.reshape(*w.shape[:-1], -1, config.group_size)
    low, high = jnp.minimum(grouped.min(-1), 0.0), jnp.maximum(grouped.max(-1), 0.0)
    # The scale is rounded as it is stored before codes are chosen with it.
    scales = ((high - low) / FOUR_BITS).astype(jnp.bfloat16)
    scales = jnp.where(scales > 0, scales, jnp.ones((), jnp.bfloat16))
    step = scales.astype(jnp.float32)
    zeros = jnp.clip(jnp.round(-low / step), 0, FOUR_BITS)
    codes = jnp.clip(jnp.round(grouped / step[..., None]) + zeros[..., None], 0, FOUR_BITS)
    return {"codes": pack(codes.astype(jnp.uint8)), "scales": scales, "zeros": zeros.astype(jnp.int8)}


def pack(codes: jax.Array) -> jax.Array:
    """Codes 0..15 u8[..., groups, G] -> bytes u8[..., groups * G/2]."""
    half = codes.shape[-1] // 2
    packed = codes[..., :half] | (codes[..., half:] << 4)
    return packed.reshape(*packed.shape[:-2], -1)


def unpack(packed: jax.Array, group_size: int) -> jax.Array:
    """The inverse of `pack`: -> i8[..., groups, group_size]."""
    grouped = packed.reshape(*packed.shape[:-1], -1, group_size // 2)
    return jnp.concatenate([grouped & 15, grouped >> 4], -1).astype(jnp.int8)


def dequantise(parts: Parts, config: QuantConfig, dtype: jnp.dtype = jnp.dtype("float32")) -> jax.Array:
    """The weight [..., out, in] that the parts stand for."""
    codes, scales = parts["codes"], parts["scales"].astype(dtype)
    if config.group_size is None:
        return codes.astype(dtype) * scales[..., None]
    shifted = unpack(codes, config.group_size).astype(dtype) - parts["zeros"][..., None].astype(dtype)
    wide = shifted * scales[..., None]
    return wide.reshape(*wide.shape[:-2], -1)


def quantise_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [N, in] -> (whole numbers in -127..127 as f32[N, in], the step of each row f32[N, 1])."""
    x = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-30)
    return jnp.round(x * (127.0 / largest)), largest / 127.0


class QuantisedWeight(nnx.Module):
    """The stored parts of a weight [..., out, in] with these logical axes."""

    def __init__(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...], config: QuantConfig, platform: str
    ):
        self.config, self.platform = config, platform
        named = {"codes": axes, "scales": axes if config.group_size else axes[:-1], "zeros": axes}
        made = {
            name: nnx.Param(jnp.zeros(size, dtype), axes=named[name])
            for name, (size, dtype) in part_shapes(shape, config).items()
        }
        self.codes, self.scales, self.zeros = made["codes"], made["scales"], made.get("zeros")

    def parts(self) -> Parts:
        """The arrays."""
        found = {"codes": self.codes[...], "scales": self.scales[...]}
        return found if self.zeros is None else {**found, "zeros": self.zeros[...]}

    def rows(self, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Chosen rows of the weight, index i32[...] -> [..., in]."""
        return dequantise({name: part[index] for name, part in self.parts().items()}, self.config, dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> x @ w.T [..., out] in x's dtype."""
        return quantised_product(x, self.parts(), self.config, self.platform)


def quantised_product(x: jax.Array, parts: Parts, config: QuantConfig, platform: str) -> jax.Array:
    """x [..., in] times the transposed weight [out, in] that the parts stand for -> [..., out] in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    if config.activations == "int8":
        whole, step = quantise_rows(flat)
        y = integer_product(whole, parts["codes"], platform) * (step * parts["scales"])
    elif platform == "cpu":
        y = _widened_on_cpu(flat, parts, config)
    elif config.group_size is not None:
        y = jax.lax.dot_general(flat, dequantise(parts, config, flat.dtype), (((1,), (1,)), ((), ())))
    else:
        codes = parts["codes"].astype(flat.dtype)
        y = jax.lax.dot_general(flat, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        y = y * parts["scales"]
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _widened_on_cpu(x: jax.Array, parts: Parts, config: QuantConfig) -> jax.Array:
    """x [N, in] -> f32[N, out]. Scales of channels follow the product, those of groups cannot."""
    grouped = config.group_size is not None
    w = dequantise(parts, config) if grouped else parts["codes"].astype(jnp.float32)
    x = x.astype(jnp.float32)
    y = fused_product(x, w) if x.shape[0] == 1 else weights_first(x, w).T
    return y if grouped else y * parts["scales"]
