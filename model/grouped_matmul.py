"""grouped_matmul: rows sorted by group, each multiplied with its group's matrix (the experts of a mixture).

Two back ends, chosen by the target platform:

- "loop" (CPU): tiles of rows in order of group, visited by a loop whose length follows the rows that exist, so
  an idle group costs nothing and its matrix is not read. `ragged_dot` there computes every group.
- "ragged" (GPU, TPU, and wherever gradients are wanted): `jax.lax.ragged_dot_general`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .config import QuantConfig
from .quantised import Parts, dequantise, quantised_product

# Contract x's features with the matrices' last axis; x's rows are ragged, w's first axis is the group.
_RAGGED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def backend_for(platform: str) -> str:
    """The back end for a target platform: "cpu" loops, "gpu" and "tpu" use the compiler's ragged product."""
    known = {"cpu": "loop", "gpu": "ragged", "cuda": "ragged", "rocm": "ragged", "tpu": "ragged"}
    if platform not in known:
        raise ValueError(f"platform {platform!r} is not known to grouped_matmul; known: {', '.join(known)}")
    return known[platform]


def grouped_matmul(
    x: jax.Array, w: jax.Array | Parts, sizes: jax.Array, platform: str, stored: QuantConfig | None = None
) -> jax.Array:
    """x [N,in], w [X,out,in], sizes i32[X] -> y [N,out] in x's dtype; w may be the parts of a quantised weight that is
    `stored` so.

    The first sizes[0] rows belong to group 0, the next sizes[1] to group 1, and so on; rows from sum(sizes) on
    belong to no group and give zero.
    """
    if backend_for(platform) == "loop":
        return _loop(x, w, sizes, platform, stored)
    if isinstance(w, dict):
        assert stored is not None
        w = dequantise(w, stored, x.dtype)
    return _ragged(x, w, sizes)


def _ragged(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    y = lax.ragged_dot_general(x, w.astype(x.dtype), sizes, _RAGGED).astype(x.dtype)
    live = jnp.arange(x.shape[0], dtype=jnp.int32) < sizes.sum()
    return jnp.where(live[:, None], y, jnp.zeros((), y.dtype))


def _product(rows: jax.Array, w: jax.Array | Parts, platform: str, stored: QuantConfig | None) -> jax.Array:
    """rows [n,in] with one group's matrix [out,in] -> [n,out]."""
    if isinstance(w, dict):
        assert stored is not None
        return quantised_product(rows, w, stored, platform)
    return lax.dot_general(rows, w.astype(rows.dtype), (((1,), (1,)), ((), ()))).astype(rows.dtype)


def _tile(rows: int, groups: int) -> int:
    """Rows a tile. Single rows read a group's matrix in place, taller tiles copy it once; measured crossings."""
    mean = rows / groups
    if mean <= 4:
        return 1
    return 16 if mean < 32 else 64


def _loop(
    x: jax.Array, w: jax.Array | Parts, sizes: jax.Array, platform: str, stored: QuantConfig | None
) -> jax.Array:
    N, (X, outputs) = x.shape[0], (w["codes"] if isinstance(w, dict) else w).shape[:2]
    tile = _tile(N, X)
    starts = jnp.cumsum(sizes) - sizes
    tiles = (sizes + tile - 1) // tile
    ends = jnp.cumsum(tiles)
    # One tile of slack, so that the last tile may run over the end.
    padded = jnp.pad(x, ((0, tile), (0, 0)))

    def visit(index, y):
        group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), X - 1)
        at = starts[group] + (index - (ends[group] - tiles[group])) * tile
        rows = lax.dynamic_slice_in_dim(padded, at, tile)
        matrix = jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, group, keepdims=False), w)
        got = _product(rows, matrix, platform, stored)
        # What runs over belongs to the next group, which is written later, or to no group.
        return lax.dynamic_update_slice_in_dim(y, got, at, 0)

    y = lax.fori_loop(0, ends[-1], visit, jnp.zeros((N + tile, outputs), x.dtype))[:N]
    live = jnp.arange(N, dtype=jnp.int32) < sizes.sum()
    return jnp.where(live[:, None], y, jnp.zeros((), y.dtype))
