"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a gated state space mixer with a short convolution."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...attention.batch import Batch
from ..config import Mamba2Config
from ..layers import Linear, Numerics, param
from ..linear_scan import ssd, ssd_step


class Conv(nnx.Module):
    """The parameters of a causal convolution, one filter a channel: weight [channels, width], newest last."""

    def __init__(self, channels: int, width: int, *, bias: bool, numerics: Numerics, rngs: nnx.Rngs):
        self.weight = param(rngs, (channels, width), (None, None), numerics, width**-0.5)
        self.bias = param(rngs, (channels,), (None,), numerics, 0.0) if bias else None

    def __call__(self, window: jax.Array) -> jax.Array:
        """window f32[width-1+n, channels], with the inputs before the first token -> f32[n, channels]."""
        weight = self.weight[...].astype(jnp.float32)
        width = weight.shape[1]
        n = window.shape[0] - width + 1
        y = sum(window[tap : tap + n] * weight[:, tap] for tap in range(width))
        return jnp.asarray(y) if self.bias is None else y + self.bias[...].astype(jnp.float32)


class GatedNorm(nnx.Module):
    """RMSNorm of y * silu(z) over each of `groups` parts of the last axis, in float32."""

    def __init__(self, size: int, groups: int, eps: float, *, numerics: Numerics, rngs: nnx.Rngs):
        self.groups, self.eps = groups, eps
        self.weight = param(rngs, (size,), (None,), numerics, -1.0)

    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        h = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
        parts = h.reshape(h.shape[0], self.groups, -1)
        parts = parts * jax.lax.rsqrt(jnp.square(parts).mean(-1, keepdims=True) + self.eps)
        return parts.reshape(h.shape) * self.weight[...].astype(jnp.float32)


class Mamba2(nnx.Module):
    """x [T,E] -> [T,E]. What a row remembers lies in the state (`attention.caches.recurrent`), by seat."""

    def __init__(self, config: Mamba2Config, hidden: int, *, numerics: Numerics, rngs: nnx.Rngs):
        if config.heads % config.groups:
            raise ValueError(
                f"{config.heads} heads cannot share {config.groups} groups evenly; fix the config"
            )
        self.config, self.dtype = config, numerics.dtype
        c = config
        kinds: dict[str, Any] = dict(numerics=numerics, rngs=rngs)
        outputs = c.inner + c.conv_dim + c.heads
        self.in_proj = Linear(hidden, outputs, (None, "embed"), bias=c.proj_bias, **kinds)
        self.conv = Conv(c.conv_dim, c.conv, bias=c.conv_bias, **kinds)
        # Rates 1..heads, and time steps from 1/1000 to 1/10 (the inverse of softplus of them).
        steps = jnp.exp(jnp.linspace(jnp.log(1e-3), jnp.log(1e-1), c.heads))
        self.A_log = self._per_head(jnp.log(jnp.arange(1, c.heads + 1, dtype=jnp.float32)), numerics)
        self.D = self._per_head(jnp.ones((c.heads,)), numerics)
        self.dt_bias = self._per_head(steps + jnp.log(-jnp.expm1(-steps)), numerics)
        self.norm = GatedNorm(c.inner, c.groups, c.norm_eps, **kinds)
        self.out_proj = Linear(c.inner, hidden, ("embed", None), bias=c.proj_bias, **kinds)

    @staticmethod
    def _per_head(value: jax.Array, numerics: Numerics) -> nnx.Param:
        return nnx.Param(value.astype(numerics.param_dtype), axes=(None,))

    def zero(self) -> tuple[jax.Array, jax.Array]:
        """What one row remembers before its first token: (conv [width-1,conv_dim], ssm f32[heads,head_dim,state])."""
        c = self.config
        conv = jnp.zeros((c.conv - 1, c.conv_dim), self.dtype)
        return conv, jnp.zeros((c.heads, c.head_dim, c.state), jnp.float32)

    def __call__(self, x: jax.Array, batch: Batch, state):
        c = self.config
        z, inputs = jnp.split(self.in_proj(x), [c.inner], axis=-1)
        with jax.named_scope("ssd"):
            y, state = state.run(self._advance, inputs, self.zero(), batch)
        return self.out_proj(self.norm(y, z).astype(x.dtype)), state

    def _advance(self, carry, inputs: jax.Array, live: jax.Array | None):
        """One row: inputs [n, conv_dim+heads] are x, B, C and dt before the convolution -> y f32[n, inner]."""
        c, n = self.config, inputs.shape[0]
        taps, ssm = carry
        if live is not None:
            inputs = jnp.where(live[:, None], inputs, 0)
        mixed, dt = jnp.split(inputs, [c.conv_dim], axis=-1)
        window = jnp.concatenate([taps, mixed.astype(taps.dtype)])
        count = n if live is None else live.sum(dtype=jnp.int32)
        taps = jax.lax.dynamic_slice_in_dim(window, count, c.conv - 1)
        mixed = jax.nn.silu(self.conv(window.astype(jnp.float32)))
        x, B, C = jnp.split(mixed, [c.inner, c.inner + c.groups * c.state], axis=-1)
        x = x.reshape(n, c.heads, c.head_dim)
        B, C = B.reshape(n, c.groups, c.state), C.reshape(n, c.groups, c.state)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        dt = jnp.clip(dt, *c.time_step_limit)
        if live is not None:
            dt = jnp.where(live[:, None], dt, 0.0)
        A = -jnp.exp(self.A_log[...].astype(jnp.float32))
        if n == 1:
            y, ssm = ssd_step(x[0], dt[0], A, B[0], C[0], ssm)
            y = y[None]
        else:
            y, ssm = ssd(x, dt, A, B, C, ssm, c.chunk)
        y = y + self.D[...].astype(jnp.float32)[:, None] * x
        return (taps, ssm), y.reshape(n, c.inner)
