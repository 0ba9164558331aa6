"""Mirostat: truncation steered so that the mean surprise of the sampled tokens stays at a target (Basu et al.
2020, arXiv 2007.14966), version 2 and version 1 of its authors.

It stands behind the temperature and replaces top-k, top-p and min-p. With p the softmax of a row over the V
tokens of the vocabulary, S(x) = -log2 p(x) the surprise of a token (bits), and mu the row's state:

    version 2   keep the tokens with S <= mu, and the most likely one where there is none
    version 1   keep the k most likely tokens; k makes a Zipf distribution, fitted to the top of the row, reach mu
    both        sample x from what is kept; mu <- mu - eta (S(x) - tau), beginning with mu = 2 tau

mu does not follow from a request's tokens (their probabilities are not kept), so it is `carried`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log2
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from .params import SamplingParams
from .processors import Context, Known, Row, Stage, State, place
from .truncation import keep_top_k

LN2 = log(2.0)
FLATTEST = 1e-3  # the smallest Zipf exponent that a fit gives: its inverse is needed


@dataclass(frozen=True)
class Mirostat:
    """State: mode i32[S+1] (0: off), and mu, tau, eta f32[S+1]. The kept logits leave as log-probabilities of the
    distribution that `surprise` measures, so `update` reads S(x) off them.

    surprise  "full": p is the softmax of the whole row, as in the paper; "kept": renormalised over the kept
              tokens, as llama.cpp measures version 2. top: most likely tokens that version 1 fits.
    """

    surprise: Literal["full", "kept"] = "full"
    top: int = 100
    stage: Stage = Stage.TRUNCATE
    carried: tuple[str, ...] = ("mu",)

    def init(self, seats: int, vocab: int) -> State:
        zeros = jnp.zeros((seats + 1,), jnp.float32)
        return {"mode": jnp.zeros((seats + 1,), jnp.int32), "mu": zeros, "tau": zeros, "eta": zeros}

    def row(self, params: SamplingParams, known: Known, vocab: int) -> Row:
        mode = 0 if params.greedy else params.mirostat_mode
        tau, eta = (params.mirostat_tau, params.mirostat_eta) if mode else (0.0, 0.0)
        numbers = {"mu": min(2 * tau, highest(vocab)), "tau": tau, "eta": eta}
        return {
            "mode": np.array(mode, np.int32),
            **{name: np.array(value, np.float32) for name, value in numbers.items()},
        }

    def admit(self, state: State, seat: jax.Array, row: Row) -> State:
        return place(state, seat, row)

    def wanted(self, state: State, seats: jax.Array, ctx: Context) -> jax.Array:
        return state["mode"][seats] > 0

    def apply(self, state: State, seats: jax.Array, logits: jax.Array, ctx: Context) -> jax.Array:
        mode, mu = state["mode"][seats], state["mu"][seats]
        logp = jax.nn.log_softmax(logits, axis=-1)
        fits, cuts = mode == 1, mode == 2
        small = logp >= -(mu * LN2)[:, None]
        none = cuts & ~small.any(-1)
        k = jax.lax.cond(
            (ctx.live & fits).any(),
            lambda: jnp.where(fits, zipf_count(logp, mu, self.top), 0),
            lambda: jnp.zeros(mode.shape, jnp.int32),
        )
        k = jnp.where(none, 1, k)
        z = jnp.where((cuts & ~none)[:, None] & ~small, -jnp.inf, logp)
        z = jax.lax.cond((ctx.live & (k > 0)).any(), keep_top_k, lambda z, _: z, z, k)
        if self.surprise == "kept":
            z = jax.nn.log_softmax(z, axis=-1)
        return jnp.where((mode > 0)[:, None], z, logits)

    def update(
        self, state: State, seats: jax.Array, tokens: jax.Array, keep: jax.Array, logits: jax.Array
    ) -> State:
        mode, mu, tau, eta = (state[name][seats] for name in ("mode", "mu", "tau", "eta"))
        surprise = -jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0] / LN2
        # One legal token has no surprise, whatever mu: without a bound mu would grow for as long as that lasts.
        moved = jnp.clip(mu - eta * (surprise - tau), 0.0, highest(logits.shape[1]))
        mu = jnp.where(keep & (mode > 0) & jnp.isfinite(surprise), moved, mu)
        return {**state, "mu": state["mu"].at[seats].set(mu)}


def highest(vocab: int) -> float:
    """The largest mu (bits): twice the surprise of a uniform distribution, where nothing is cut any more."""
    return 2 * log2(vocab) if vocab > 1 else 0.0


def zipf_count(logp: jax.Array, mu: jax.Array, top: int) -> jax.Array:
    """i32[N]: how many tokens of log-probabilities [N,V] version 1 keeps at mu f32[N] (equation 9 of the paper).

    With s the exponent and e = s - 1: k = (e 2^mu / (1 - V^-e))^(1/s), whose limit for e = 0 is
    (2^mu / ln V)^(1/s); rounded, and between 1 and V.
    """
    s, V = zipf_exponent(logp, top), logp.shape[1]
    e, ln_v = s - 1, log(max(V, 2))
    singular = jnp.abs(e) < 1e-6
    safe = jnp.where(singular, 1.0, e)
    factor = jnp.where(singular, 1 / ln_v, safe / -jnp.expm1(-safe * ln_v))
    ln_k = (jnp.log(factor) + mu * LN2) / s
    return jnp.round(jnp.exp(jnp.clip(ln_k, 0.0, log(V)))).astype(jnp.int32).clip(1, V)


def zipf_exponent(logp: jax.Array, top: int) -> jax.Array:
    """f32[N]: the exponent of p_i ~ i^-s that fits the `top` most likely tokens of a row [N,V] best, in the
    least squares of neighbours: b_i = ln(p_i / p_i+1) against t_i = ln((i + 1) / i)."""
    best, _ = jax.lax.top_k(logp, min(top, logp.shape[1]))
    i = jnp.arange(1, best.shape[1], dtype=jnp.float32)
    t = jnp.log((i + 1) / i)
    legal = jnp.isfinite(best[:, 1:])
    b = jnp.where(legal, best[:, :-1] - best[:, 1:], 0.0)
    squares = jnp.where(legal, t * t, 0.0).sum(-1)
    return jnp.maximum((t * b).sum(-1) / jnp.where(squares > 0, squares, 1.0), FLATTEST)
