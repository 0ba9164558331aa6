"""x @ w.T for weights stored [out, in], in a form that the target's compiler turns into fast code.

XLA's CPU compiler maps equal products onto very different code, and the form decides by large factors
(`docs/performance.md`): a float32 product with bfloat16 weights that are converted first runs on a naive loop,
5 to 10 times slower than the product of two bfloat16 operands, which is a library call on CPUs with bfloat16
instructions. So float32 activations are split into three bfloat16 parts, which hold all of float32's 24 bits.
For a few rows the library copies its second operand into its own layout before it multiplies: the weights must
stand first, or they are read, written and read again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

PARTS = 3
WEIGHTS_FIRST = 128
"""Up to so many rows the weights are the first operand on CPU; for more the arithmetic hides the copy."""


def matmul(x: jax.Array, w: jax.Array, platform: str) -> jax.Array:
    """x [..., in], w [out, in] -> [..., out] in x's dtype, accumulated in float32."""
    if x.dtype == jnp.float32 and w.dtype == jnp.bfloat16:
        return _split(x, w)
    w = w.astype(x.dtype)
    rows = x.size // x.shape[-1]
    if platform == "cpu" and 1 < rows <= WEIGHTS_FIRST:
        y = jax.lax.dot_general(w, x.reshape(rows, -1), (((1,), (1,)), ((), ())))
        # Without the barrier the compiler swaps the operands back to spare the transposition.
        return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], w.shape[0])
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, contract).astype(x.dtype)


def _split(x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of float32 x with bfloat16 w as one bfloat16 product over the parts of x, summed in float32.

    The first part is x rounded, each further one what is left, rounded; the error against float64 is that of a
    float32 product.
    """
    rows, parts = x.reshape(-1, x.shape[-1]), []
    rest = rows
    for _ in range(PARTS):
        part = rest.astype(jnp.bfloat16)
        parts.append(part)
        rest = rest - part.astype(jnp.float32)
    contract = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(jnp.concatenate(parts), w, contract, preferred_element_type=jnp.float32)
    return y.reshape(PARTS, *x.shape[:-1], w.shape[0]).sum(0)
