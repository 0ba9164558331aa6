"""Feed-forward layers: gated (Shazeer 2020, arXiv 2002.05202) and plain."""

from __future__ import annotations

from typing import Any

import jax
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

    def __call__(self, x: jax.Array, batch: Batch) -> jax.Array:
        del batch
        act = ACTIVATIONS[self.config.activation]
        h = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(h)
