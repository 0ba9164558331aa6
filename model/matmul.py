"""x @ w.T for weights stored [out, in], in a form that the target's compiler turns into fast code.

XLA's CPU compiler maps equal products onto very different code, and the form decides by large factors
(`docs/performance.md`):

- For a few rows the library copies its second operand into its own layout before it multiplies: the weights must
  stand first, or they are read, written and read again.
- A float32 product with bfloat16 weights that are converted first runs on a naive loop, 5 to 10 times slower than
  the product of two bfloat16 operands, a library call on CPUs with bfloat16 instructions. So float32 activations
  are split into two bfloat16 parts, which hold 16 of float32's 24 bits: an error of about 2^-17 of the terms,
  where the weights themselves were rounded to 2^-9.
- One row needs neither: converted weights are multiplied and summed in one fused loop that reads half the bytes.
  Which of two spellings becomes that loop depends on the compiler, so it is tried out (`fused_is_faster`).
"""

from __future__ import annotations

import time
from functools import cache

import jax
import jax.numpy as jnp

PARTS = 2
WEIGHTS_FIRST = 128
"""Up to so many rows the weights are the first operand on CPU; for more the arithmetic hides the copy."""
SHARED_LOOP = 1 << 20
"""From about so many weights on the compiler shares a fused product's loop between threads."""


def matmul(x: jax.Array, w: jax.Array, platform: str) -> jax.Array:
    """x [..., in], w [out, in] -> [..., out] in x's dtype, accumulated in float32."""
    rows = x.size // x.shape[-1]
    flat, shape = x.reshape(rows, -1), (*x.shape[:-1], w.shape[0])
    if platform == "cpu" and x.dtype == jnp.float32 and w.dtype == jnp.bfloat16:
        return (_one_row(flat, w) if rows == 1 else _split(flat, w)).reshape(shape)
    w = w.astype(x.dtype)
    if platform == "cpu" and 1 < rows <= WEIGHTS_FIRST:
        return _weights_first(flat, w).T.reshape(shape)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, contract).astype(x.dtype)


def _weights_first(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [N,in], w [out,in] of one dtype -> f32[out,N]: the caller's transposition is cheap."""
    contract = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(w, x, contract, preferred_element_type=jnp.float32)
    # Without the barrier the compiler swaps the operands back to spare the transposition.
    return jax.lax.optimization_barrier(y)


def _split(x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of float32 x with bfloat16 w as one bfloat16 product over the parts of x, summed in float32.

    The first part is x rounded, each further one what is left, rounded.
    """
    parts, rest = [], x
    for _ in range(PARTS):
        part = rest.astype(jnp.bfloat16)
        parts.append(part)
        rest = rest - part.astype(jnp.float32)
    y = _weights_first(jnp.concatenate(parts), w)
    return y.reshape(w.shape[0], PARTS, x.shape[0]).sum(1).T


def _one_row(x: jax.Array, w: jax.Array) -> jax.Array:
    """x f32[1,in], w bf16[out,in] -> f32[1,out]."""
    large = w.size >= SHARED_LOOP
    return _fused(x, w) if large and fused_is_faster() else _reduced(x, w)


def _fused(x: jax.Array, w: jax.Array) -> jax.Array:
    # The barriers keep neighbours out of the loop, which would compute them once a column.
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(x) @ w.astype(jnp.float32).T)


def _reduced(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier((w.astype(jnp.float32) * x).sum(-1))[None]


@cache
def fused_is_faster() -> bool:
    """Whether this compiler makes the fused loop of `_fused`: both spellings timed on 16 MB of weights."""
    with jax.ensure_compile_time_eval():
        device = jax.devices("cpu")[0]
        x = jax.device_put(jnp.ones((1, 2048), jnp.float32), device)
        w = jax.device_put(jnp.ones((4096, 2048), jnp.bfloat16), device)

        def best(form) -> float:
            run, times = jax.jit(form), []
            run(x, w).block_until_ready()
            for _ in range(5):
                start = time.perf_counter()
                run(x, w).block_until_ready()
                times.append(time.perf_counter() - start)
            return min(times)

        return best(_fused) < best(_reduced)
