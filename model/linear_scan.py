"""ssd: the selective state space recurrence of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), in two forms.

For each head h (heads share B and C in groups), with state S [P,N]:

    S_t = exp(dt_t * A) * S_{t-1} + dt_t * x_t B_t^T        y_t = S_t C_t

A token with dt = 0 leaves the state alone: decay one, input zero. Everything is computed in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def ssd_step(
    x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token: x [H,P], dt [H], A [H] (negative), B and C [G,N], state [H,P,N] -> (y [H,P], state)."""
    share = x.shape[0] // B.shape[0]
    B, C = jnp.repeat(B, share, axis=0), jnp.repeat(C, share, axis=0)
    state = jnp.exp(dt * A)[:, None, None] * state + (dt[:, None] * x)[:, :, None] * B[:, None, :]
    return (state * C[:, None, :]).sum(-1), state


def ssd(
    x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, initial: jax.Array, chunk: int = 64
) -> tuple[jax.Array, jax.Array]:
    """L tokens in chunks: x [L,H,P], dt [L,H], A [H], B and C [L,G,N], initial [H,P,N] -> (y [L,H,P], final).

    Inside a chunk the recurrence is a product with a lower triangular matrix of decays (section 6 of the
    paper); between chunks the state is carried. Any chunk gives the same answer, up to rounding.
    """
    L = x.shape[0]
    step = min(chunk, L)
    count = -(-L // step)

    def blocks(a):
        padded = jnp.pad(a, ((0, count * step - L),) + ((0, 0),) * (a.ndim - 1))
        return padded.reshape(count, step, *a.shape[1:])

    if count == 1:
        return _chunk(x, dt, A, B, C, initial)

    def carry(state, parts):
        x, dt, B, C = parts
        y, state = _chunk(x, dt, A, B, C, state)
        return state, y

    final, y = lax.scan(carry, initial, (blocks(x), blocks(dt), blocks(B), blocks(C)))
    return y.reshape(count * step, *x.shape[1:])[:L], final


def _chunk(
    x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One chunk of `ssd`, as matrix products; g is the group, k the head in it."""
    step, heads, dim = x.shape
    groups, size = B.shape[1], B.shape[2]
    share = heads // groups
    inputs = (dt[..., None] * x).reshape(step, groups, share, dim)
    state = state.reshape(groups, share, dim, size)
    steps = (dt * A).T.reshape(groups, share, step)
    # Sums over s+1..t are taken directly, not as differences of one long sum: those lose the small decays.
    index = jnp.arange(step)
    after = jnp.where(index[:, None] > index[None, :], steps[..., :, None], 0.0)
    sums = jnp.cumsum(after, axis=-2)
    decay = jnp.where(index[:, None] >= index[None, :], jnp.exp(sums), 0.0)  # [g,k,t,s]
    since = jnp.exp(jnp.cumsum(steps, -1))  # decay of the incoming state at each token [g,k,t]

    scores = jnp.einsum("tgn,sgn->gts", C, B)
    y = jnp.einsum("gkts,sgkp->tgkp", scores[:, None] * decay, inputs)
    y = y + jnp.einsum("tgn,gkpn,gkt->tgkp", C, state, since)
    state = since[..., -1, None, None] * state + jnp.einsum(
        "gks,sgkp,sgn->gkpn", decay[..., -1, :], inputs, B
    )
    return y.reshape(step, heads, dim), state.reshape(heads, dim, size)
