"""Feed-forward layers: gated (Shazeer 2020, arXiv 2002.05202) and plain."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...attention.batch import Batch
from ..config import MLPConfig
from ..layers import ACTIVATIONS, Linear, Numerics


class MLP(nnx.Module):
    """x [T,E] -> [T,E]; no memory between tokens."""

    def __init__(self, config: MLPConfig, hidden: int, *, numerics: Numerics, rngs: nnx.Rngs):
        self.config = config
        size, bias = config.intermediate, config.bias
        self.up = Linear(hidden, size, ("mlp", "embed"), bias=bias, numerics=numerics, rngs=rngs)
        gate = config.gated
        make: dict[str, Any] = dict(bias=bias, numerics=numerics, rngs=rngs)
        self.gate = Linear(hidden, size, ("mlp", "embed"), **make) if gate else None
        self.down = Linear(size, hidden, ("embed", "mlp"), bias=bias, numerics=numerics, rngs=rngs)
        # A negative threshold keeps every gate.
        start = jnp.full((1,), -1.0, jnp.float32)
        self.threshold = nnx.Param(start, axes=(None,)) if config.thresholded else None

    def takes_apart(self, batch: Batch) -> bool:
        """Whether x comes as tokens lie between mixers: never, every device has a part of each feature."""
        del batch
        return False

    def gates(self, x: jax.Array) -> jax.Array:
        """act(gate(x)) [T,I], with those that the threshold cuts off set to zero."""
        assert self.gate is not None
        gates = ACTIVATIONS[self.config.activation](self.gate(x))
        if self.threshold is None:
            return gates
        return jnp.where(jnp.abs(gates) > self.threshold[...], gates, jnp.zeros((), gates.dtype))

    def __call__(self, x: jax.Array, batch: Batch) -> jax.Array:
        del batch
        if self.gate is None:
            return self.down(ACTIVATIONS[self.config.activation](self.up(x)))
        return self.down(self.gates(x) * self.up(x))
