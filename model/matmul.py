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
- 8-bit integers are a library call too when both sides are i8 and the weights stand first. One row of them goes
  through the fused loop in float32, where sums of up to 2^24 are exact.
"""

from __future__ import annotations

import time
from functools import cache

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

PARTS = 2
WEIGHTS_FIRST = 128
"""Up to so many rows the weights are the first operand on CPU; for more the arithmetic hides the copy."""
SHARED_LOOP = 1 << 20
"""From about so many weights on the compiler shares a fused product's loop between threads."""
TRIES = 12


def matmul(x: jax.Array, w: jax.Array, platform: str) -> jax.Array:
    """x [..., in], w [out, in] -> [..., out] in x's dtype, accumulated in float32."""
    rows = x.size // x.shape[-1]
    flat, shape = x.reshape(rows, -1), (*x.shape[:-1], w.shape[0])
    if platform == "cpu" and x.dtype == jnp.float32 and w.dtype == jnp.bfloat16:
        return (_one_row(flat, w) if rows == 1 else _split(flat, w)).reshape(shape)
    w = w.astype(x.dtype)
    if platform == "cpu" and 1 < rows <= WEIGHTS_FIRST:
        return weights_first(flat, w).T.reshape(shape)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, contract).astype(x.dtype)


def weights_first(x: jax.Array, w: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """x [N,in], w [out,in] of one dtype -> [out,N] summed in `dtype`: the caller's transposition is cheap."""
    contract = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(w, x, contract, preferred_element_type=dtype)
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
    y = weights_first(jnp.concatenate(parts), w)
    return y.reshape(w.shape[0], PARTS, x.shape[0]).sum(1).T


def _one_row(x: jax.Array, w: jax.Array) -> jax.Array:
    """x f32[1,in], w bf16[out,in] -> f32[1,out]."""
    large = w.size >= SHARED_LOOP
    return fused_product(x, w) if large and fused_is_faster("bfloat16") else _reduced(x, w)


def fused_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x f32[1,in], w [out,in] of any dtype -> f32[1,out], widened while it is read."""
    # The conditional, which holds anyway, keeps neighbours out of the loop, which would compute them once a column:
    # the compiler looks through barriers here.
    return jax.lax.cond(
        jnp.isnan(x).any(),
        lambda x, w: jnp.full((1, w.shape[0]), jnp.nan, jnp.float32),
        lambda x, w: x @ w.astype(jnp.float32).T,
        x,
        w,
    )


def _reduced(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier((w.astype(jnp.float32) * x).sum(-1))[None]


def integer_product(x: jax.Array, codes: jax.Array, platform: str) -> jax.Array:
    """x f32[N,in] and codes i8[out,in], whole numbers of 8 bits -> x @ codes.T as f32[N,out]."""
    rows = x.shape[0]
    if platform != "cpu" or rows > WEIGHTS_FIRST:
        contract = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(x.astype(jnp.int8), codes, contract, preferred_element_type=jnp.int32)
        return y.astype(jnp.float32)
    return fused_product(x, codes) if rows == 1 and fused_is_faster("int8") else _integers(x, codes)


def _integers(x: jax.Array, codes: jax.Array) -> jax.Array:
    """The product of a few rows as a library call on CPU, which takes two or more."""
    rows = x.shape[0]
    padded = jnp.pad(x, ((0, 1 if rows == 1 else 0), (0, 0))).astype(jnp.int8)
    return weights_first(padded, codes, jnp.int32).T[:rows].astype(jnp.float32)


def try_forms(params: object) -> None:
    """Try out, now, what depends on the compiler for these weights: while programs compile in threads, times mean
    nothing."""
    for dtype in {leaf.dtype.name for leaf in jax.tree.leaves(params)} & {"bfloat16", "int8"}:
        fused_is_faster(dtype)


@cache
def fused_is_faster(dtype: str = "bfloat16") -> bool:
    """Whether this compiler makes one loop of `fused_product` for weights of a dtype ("bfloat16", "int8"): timed on
    8 million of them beside the other form for one row. Several processes must compile one program, so there no
    clock decides."""
    if jax.process_count() > 1:
        return False
    with jax.ensure_compile_time_eval():
        device = jax.devices("cpu")[0]
        x = jax.device_put(jnp.ones((1, 2048), jnp.float32), device)
        w = jax.device_put(jnp.ones((4096, 2048), dtype), device)

        def once(run) -> float:
            start = time.perf_counter()
            run(x, w).block_until_ready()
            return time.perf_counter() - start

        fused, other = jax.jit(fused_product), jax.jit(_integers if dtype == "int8" else _reduced)
        # In turn, so that what else the machine does meets both; the first of each compiles.
        times = [(once(fused), once(other)) for _ in range(1 + TRIES)][1:]
        return min(a for a, _ in times) < min(b for _, b in times)
