"""How a mixer hands rotary positions to what it remembers: keys come raw, and are rotated by whoever reads them."""

from __future__ import annotations

from collections.abc import Callable

import jax

# (x [T,H,D], positions i32[T]) -> x [T,H,D], turned to these positions; the identity where a model has no rope.
Rotate = Callable[[jax.Array, jax.Array], jax.Array]


def unrotated(x: jax.Array, positions: jax.Array) -> jax.Array:
    """No rotation: x as it is."""
    del positions
    return x
