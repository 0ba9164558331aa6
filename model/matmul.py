"""x @ w.T for weights stored [out, in], in the form that the target's compiler turns into fast code.

XLA's CPU compiler maps equal products onto very different code; the form decides by large factors and
changes with the compiler's version (`docs/performance.md`). `Forms` names the form for each case; the CPU
back end picks it with a probe, other targets use the plain product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax

Form = Literal["plain", "left"]


@dataclass(frozen=True)
class Forms:
    """Which form to use: `rows` for x with several rows, `single` for one row, of weights held in x's dtype."""

    rows: Form = "plain"
    single: Form = "plain"


def matmul(x: jax.Array, w: jax.Array, forms: Forms) -> jax.Array:
    """x [..., in], w [out, in] -> [..., out] in x's dtype.

    "plain" contracts both last axes. "left" writes (w @ x.T).T, which XLA's CPU library call prefers.
    """
    rows = x.size // x.shape[-1]
    if w.dtype != x.dtype:
        w = w.astype(x.dtype)
    if (forms.single if rows == 1 else forms.rows) == "left" and x.ndim == 2:
        return (w @ x.T).T
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ()))).astype(x.dtype)
