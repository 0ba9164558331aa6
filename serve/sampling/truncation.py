"""Top-k, top-p and min-p without sorting: all three are thresholds on a row, found by bisection.

A bisection keeps a bracket [low, high) of thresholds, as integers in the order of float32, and halves it
until one token, or one group of equal tokens, is left inside: usually after 10 to 20 passes over the row. Where
the edge falls inside a group of equal tokens, those with the lower ids are kept, so the kept set is that of a
stable descending sort.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .inverse import inverse
from .params import SamplingParams
from .processors import Context, Known, Row, Stage, State, place

WIDTH = 16.0
MEANS = 24


@dataclass(frozen=True)
class Truncation:
    """Min-p (Nguyen et al. 2024, arXiv 2407.01082), then top-k (Fan et al. 2018), then top-p over what is left,
    renormalised (Holtzman et al. 2019, arXiv 1904.09751): vLLM's order. Dropped tokens get -inf."""

    stage: Stage = Stage.TRUNCATE
    carried: tuple[str, ...] = ()

    def init(self, seats: int, vocab: int) -> State:
        return {
            "top_k": jnp.zeros((seats + 1,), jnp.int32),
            "top_p": jnp.ones((seats + 1,), jnp.float32),
            "log_min_p": jnp.full((seats + 1,), -jnp.inf, jnp.float32),
        }

    def row(self, params: SamplingParams, known: Known, vocab: int) -> Row:
        off = params.greedy  # the most likely token is kept in any case
        log_min_p = np.log(params.min_p) if params.min_p > 0 and not off else -np.inf
        top_p = max(np.float32(params.top_p), np.finfo(np.float32).tiny)
        top_k = 0 if off or params.top_k >= vocab else max(params.top_k, 0)
        return {
            "top_k": np.array(top_k, np.int32),
            "top_p": np.array(1.0 if off else top_p, np.float32),
            "log_min_p": np.array(log_min_p, np.float32),
        }

    def admit(self, state: State, seat: jax.Array, row: Row) -> State:
        return place(state, seat, row)

    def wanted(self, state: State, seats: jax.Array, ctx: Context) -> jax.Array:
        top_p, log_min_p = state["top_p"][seats], state["log_min_p"][seats]
        return (state["top_k"][seats] > 0) | (top_p < 1.0) | (log_min_p > -jnp.inf)

    def apply(self, state: State, seats: jax.Array, logits: jax.Array, ctx: Context) -> jax.Array:
        top_k, top_p, log_min_p = (state[name][seats] for name in ("top_k", "top_p", "log_min_p"))
        top = logits.max(-1, keepdims=True)
        z = jnp.where(logits - top < log_min_p[:, None], -jnp.inf, logits)
        z = jax.lax.cond((ctx.live & (top_k > 0)).any(), keep_top_k, lambda z, _: z, z, top_k)
        return jax.lax.cond((ctx.live & (top_p < 1.0)).any(), keep_top_p, lambda z, _: z, z, top_p)

    def update(
        self, state: State, seats: jax.Array, tokens: jax.Array, keep: jax.Array, logits: jax.Array
    ) -> State:
        return state


class Edge(NamedTuple):
    """Where a row is cut. All tokens at or above `low` are `upto` many and weigh `mass`; those above the edge are
    `above` many and weigh `mass_above`; if the difference is more than one token, the others equal `low`."""

    low: jax.Array
    upto: jax.Array
    above: jax.Array
    mass: jax.Array
    mass_above: jax.Array


def keep_top_k(z: jax.Array, k: jax.Array) -> jax.Array:
    """z [N,V] with -inf outside the k i32[N] largest logits of a row; k = 0 keeps the row."""
    edge = bisect(z, None, k.astype(jnp.float32), k > 0)
    return cut(z, edge, k - edge.above, k > 0)


def keep_top_p(z: jax.Array, p: jax.Array) -> jax.Array:
    """z [N,V] with -inf outside the fewest largest logits whose share of the softmax reaches p f32[N]."""
    top = z.max(-1, keepdims=True)
    weights = jnp.exp(z - top)
    target = p * weights.sum(-1)
    edge = bisect(z, weights, target, p < 1.0)
    equal = edge.upto - edge.above
    needed = jnp.ceil((target - edge.mass_above) * equal / (edge.mass - edge.mass_above))
    ties = jnp.clip(needed, 1.0, equal)
    return cut(z, edge, ties, p < 1.0)


def bisect(z: jax.Array, weights: jax.Array | None, target: jax.Array, active: jax.Array) -> Edge:
    """The largest threshold at which the tokens z >= threshold still reach `target` [N], for `active` rows.

    What they reach is their number, or their `weights` [N,V] summed. Both fall as the threshold rises, also
    in floating point: a sum in fixed order is monotone in each of its terms. The first threshold is `WIDTH`
    under the largest logit, the next ones are means; after `MEANS` passes they are means of the bits, which
    end after 32 more whatever the logits are.
    """

    def measure(key):
        inside = z >= from_key(key)[:, None]
        count = inside.astype(jnp.float32).sum(-1)  # exact: V < 2**24
        return count, count if weights is None else jnp.where(inside, weights, 0.0).sum(-1)

    def done(low, high, edge):
        enough = edge.mass == target if weights is None else False
        return ~active | (edge.upto - edge.above <= 1) | (high <= low + 1) | enough

    def halve(carry):
        step, (low, high, edge) = carry
        middle = jnp.where(step == 0, to_key(from_key(high) - WIDTH), between(low, high, step < MEANS))
        count, mass = measure(middle)
        reached = mass >= target
        stay = done(low, high, edge)
        new = Edge(
            low=edge.low,
            upto=jnp.where(reached, count, edge.upto),
            above=jnp.where(reached, edge.above, count),
            mass=jnp.where(reached, mass, edge.mass),
            mass_above=jnp.where(reached, edge.mass_above, mass),
        )
        bracket = (jnp.where(reached, middle, low), jnp.where(reached, high, middle), new)
        return step + 1, jax.tree.map(lambda old, new: jnp.where(stay, old, new), (low, high, edge), bracket)

    low = jnp.full(z.shape[:1], to_key(jnp.float32(-jnp.inf)), jnp.int32)
    high = to_key(z.max(-1)) + 1
    upto, mass = measure(low)
    none = jnp.zeros_like(upto)
    start = (jnp.int32(0), (low, high, Edge(none, upto, none, mass, none)))
    _, (low, _, edge) = jax.lax.while_loop(lambda carry: ~done(*carry[1]).all(), halve, start)
    return edge._replace(low=from_key(low))


def between(low: jax.Array, high: jax.Array, by_value: jax.Array) -> jax.Array:
    """A key in [low, high), above low where high > low + 1: of the mean value if asked and finite, else of the
    mean bits."""
    bits = (low & high) + ((low ^ high) >> 1)
    mean = to_key(0.5 * from_key(low) + 0.5 * from_key(high))
    return jnp.where(by_value & (mean > low) & (mean < high), mean, bits)


def cut(z: jax.Array, edge: Edge, ties: jax.Array, active: jax.Array) -> jax.Array:
    """z [N,V], in `active` rows with -inf below the edge and, of the tokens at it, beyond the first `ties` [N]."""
    equal = edge.upto - edge.above
    split = active & (ties < equal)
    at_edge = z == edge.low[:, None]

    def last_kept():
        last, _ = inverse(at_edge.astype(jnp.float32), (ties - 0.5) / equal)
        return jnp.where(split, last, z.shape[1])

    last = jax.lax.cond(split.any(), last_kept, lambda: jnp.full(z.shape[:1], z.shape[1]))
    late = at_edge & (jnp.arange(z.shape[1]) > last[:, None])
    kept = (z >= edge.low[:, None]) & ~late
    return jnp.where(kept | ~active[:, None], z, -jnp.inf)


def to_key(x: jax.Array) -> jax.Array:
    """i32 in the order of float32 x: the bits, with those of negative numbers turned round."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def from_key(key: jax.Array) -> jax.Array:
    """The inverse of `to_key`."""
    return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)
