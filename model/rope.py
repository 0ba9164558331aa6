"""Rotary positions (Su et al. 2021, arXiv 2104.09864) and their scalings."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from .config import RopeConfig


def frequencies(config: RopeConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies f64[dim/2] and the factor on cos and sin, for `config`'s scaling."""
    dim, theta = config.dim, config.theta
    given = dict(config.parameters)
    exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
    plain = theta**-exponent
    length = config.length or config.max_position

    def number(name: str, default: float | None = None) -> float:
        value = given.get(name, default)
        if not isinstance(value, (int, float)):
            raise ValueError(
                f"rope scaling {config.scaling!r} needs the number {name!r}; the checkpoint gives {value!r}"
            )
        return float(value)

    if config.scaling is None:
        return plain, 1.0
    if config.scaling == "linear":
        return plain / number("factor"), 1.0
    if config.scaling == "dynamic":
        # NTK-aware scaling: the base grows with the length beyond max_position.
        original = number("original_max_position_embeddings", config.max_position)
        factor, length = number("factor"), max(length, original)
        base = theta * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
        return base**-exponent, 1.0
    if config.scaling == "llama3":
        factor, original = number("factor"), number("original_max_position_embeddings")
        low, high = number("low_freq_factor"), number("high_freq_factor")
        turns = original * plain / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return plain * ((1 - smooth) / factor + smooth), 1.0
    if config.scaling == "yarn":
        return _yarn(config, plain, number, given)
    if config.scaling == "longrope":
        original = number("original_max_position_embeddings", config.max_position)
        factors = given.get("long_factor" if length > original else "short_factor")
        if not isinstance(factors, (list, tuple)) or len(factors) != dim // 2:
            raise ValueError(
                f"longrope needs {dim // 2} short and long factors; the checkpoint gives {factors!r}"
            )
        scale = given.get("attention_factor")
        if scale is None:
            ratio = number("factor", config.max_position / original)
            scale = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
        return plain / np.asarray(factors, np.float64), float(scale)  # type: ignore[arg-type]
    raise ValueError(
        f"rope scaling {config.scaling!r} is not known; known: linear, dynamic, yarn, llama3, longrope"
    )


def _yarn(config: RopeConfig, plain: np.ndarray, number, given: dict) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), section 3.2 and equation 22."""
    dim, theta = config.dim, config.theta
    original = number("original_max_position_embeddings", config.max_position)
    factor = number("factor", config.max_position / original)
    fast, slow = number("beta_fast", 32.0), number("beta_slow", 1.0)

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequency = plain / factor * ramp + plain * (1 - ramp)

    def temperature(scale: float, m: float = 1.0) -> float:
        return 0.1 * m * math.log(scale) + 1.0 if scale > 1 else 1.0

    scale = given.get("attention_factor")
    if scale is None:
        m, m_all = given.get("mscale"), given.get("mscale_all_dim")
        scale = temperature(factor, m) / temperature(factor, m_all) if m and m_all else temperature(factor)
    return frequency, float(scale)


def rotate(x: jax.Array, positions: jax.Array, config: RopeConfig) -> jax.Array:
    """Rotate the first `config.dim` features of x [T,H,D] by positions i32[T]; the rest passes through."""
    inverse, scale = frequencies(config)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inverse, jnp.float32)[None, :]
    cos, sin = (jnp.cos(angles) * scale)[:, None, :], (jnp.sin(angles) * scale)[:, None, :]
    half = config.dim // 2
    turned = x[..., : config.dim].astype(jnp.float32)
    a, b = turned[..., :half], turned[..., half:]
    parts = [(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)]
    if config.dim < x.shape[-1]:
        parts.append(x[..., config.dim :])
    return jnp.concatenate(parts, -1)
