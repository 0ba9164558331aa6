"""Shared parts: parameters that carry their logical axes, linear layers, norms, embeddings, activations.

Weights are stored [out, in], as checkpoints have them. Logical axes name each dimension ("embed", "heads",
"kv_heads", "mlp", "vocab", "experts", "expert_mlp", "layers" or None); `sharding/plan.py` maps them to mesh axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from .config import NormConfig, QuantConfig
from .expert_parallel import ExpertSplit
from .matmul import matmul
from .quantised import QuantisedWeight

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclass(frozen=True)
class Numerics:
    """How a model is stored and computed: parameter dtype, activation dtype, and the
    platform that it is compiled for ("cpu", "gpu", "tpu"): the target's, never that of the machine at hand.
    `weights` is how linear layers are stored where that is not in `param_dtype`; the config says it for each part.
    `experts` is the devices that each have some of a mixture's experts, whole; None: whoever computes has all."""

    param_dtype: jnp.dtype = jnp.dtype("float32")
    dtype: jnp.dtype = jnp.dtype("float32")
    platform: str = "cpu"
    weights: QuantConfig | None = None
    experts: ExpertSplit | None = None


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], numerics: Numerics, scale: float
) -> nnx.Param:
    """A weight: normal with deviation `scale` (0: zeros; negative: the constant -scale)."""
    dtype = numerics.param_dtype
    if scale > 0:
        value = (jax.random.normal(rngs.params(), shape, jnp.float32) * scale).astype(dtype)
    else:
        value = jnp.full(shape, -scale, dtype)
    return nnx.Param(value, axes=axes)


def matrix(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], numerics: Numerics, scale: float
) -> nnx.Param | QuantisedWeight:
    """The weight of a product, [..., out, in], stored as `numerics` says: normal, or zeros where it is quantised."""
    if numerics.weights is None:
        return param(rngs, shape, axes, numerics, scale)
    return QuantisedWeight(shape, axes, numerics.weights, numerics.platform)


def times(x: jax.Array, weight: nnx.Param | QuantisedWeight, platform: str) -> jax.Array:
    """x [..., in] @ weight.T -> [..., out]."""
    if isinstance(weight, QuantisedWeight):
        return weight.product(x)
    return matmul(x, weight[...], platform)


class Linear(nnx.Module):
    """y = x @ weight.T + bias, weight [out, in]; x [..., in]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        *,
        bias: bool = False,
        numerics: Numerics,
        rngs: nnx.Rngs,
        scale: float | None = None,
    ):
        self.platform = numerics.platform
        self.weight = matrix(rngs, (outputs, inputs), axes, numerics, scale or inputs**-0.5)
        self.bias = param(rngs, (outputs,), (axes[0],), numerics, 0.0) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = times(x, self.weight, self.platform)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm over the last axis, computed in float32."""

    def __init__(self, size: int, config: NormConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        self.config = config
        start = -(1.0 - config.offset)
        self.weight = param(rngs, (size,), (None,), numerics, start) if config.scale else None
        self.bias = param(rngs, (size,), (None,), numerics, 0.0) if config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x.astype(jnp.float32)
        if self.config.kind == "layer":
            h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.config.eps)
        if self.weight is not None:
            h = h * (self.weight[...].astype(jnp.float32) + self.config.offset)
        if self.bias is not None:
            h = h + self.bias[...].astype(jnp.float32)
        return h.astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a table [V, E]; `attend` is the tied output head."""

    def __init__(
        self, rows: int, size: int, *, numerics: Numerics, rngs: nnx.Rngs, axes: tuple[str | None, str | None]
    ):
        self.numerics = numerics
        self.weight = matrix(rngs, (rows, size), axes, numerics, 0.02)

    def __call__(self, index: jax.Array) -> jax.Array:
        if isinstance(self.weight, QuantisedWeight):
            return self.weight.rows(index, self.numerics.dtype)
        return self.weight[...][index].astype(self.numerics.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        return times(x, self.weight, self.numerics.platform)
