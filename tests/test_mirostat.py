"""Mirostat: its equations, step by step in float64, and the surprise that it steers to."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom.serve.sampling.mirostat import Mirostat, highest, zipf_count, zipf_exponent
from tokenloom.serve.sampling.params import SamplingParams
from tokenloom.serve.sampling.sampler import Sampler

N, V = 4, 1000


@cache
def programs(surprise="full"):
    sampler = Sampler(V, N, (Mirostat(surprise),))
    return sampler, jax.jit(sampler.admit), jax.jit(sampler.sample)


def run(params, z, steps, surprise="full"):
    """(tokens [steps,N], mu [steps+1,N]) of N requests with seeds of their own on logits [V] or [steps,V]."""
    sampler, admit, sample = programs(surprise)
    state = sampler.init()
    for seat in range(N):
        state = admit(state, seat, sampler.row(params, prompt_ids=[1], seed=seat))
    tokens, seats, live = [], jnp.arange(N), jnp.ones(N, bool)
    mu = [np.asarray(sampler.carry(state, seats))[:, 0]]
    for i, row in enumerate(np.broadcast_to(z, (steps, V)).astype(np.float32)):
        sampled, state = sample(state, jnp.tile(row, (N, 1)), seats, jnp.full(N, 1 + i), live)
        tokens.append(np.asarray(sampled.token))
        mu.append(np.asarray(sampled.carry)[:, 0])
    return np.stack(tokens), np.stack(mu)


def log2_softmax(z):
    z = np.asarray(z, np.float64)
    return (z - np.log(np.exp(z - z.max()).sum()) - z.max()) / np.log(2)


def zipf(exponent):
    return -exponent * np.log(np.arange(1, V + 1))


def paper_count(p, mu, top=100):
    """k of version 1, as the paper writes it, in float64."""
    p = np.sort(p)[::-1][:top]
    i = np.arange(1, len(p))
    t, b = np.log((i + 1) / i), np.log(p[:-1] / p[1:])
    s = (t * b).sum() / (t * t).sum()
    e = s - 1
    return int(np.clip(np.round((e * 2**mu / (1 - float(V) ** -e)) ** (1 / s)), 1, V))


@pytest.mark.parametrize("version", [1, 2])
def test_every_step_is_the_papers_equation(version):
    z = np.random.RandomState(version).randn(60, V) * 3
    params = SamplingParams(mirostat_mode=version, mirostat_tau=3.0, mirostat_eta=0.6)
    tokens, mu = run(params, z, 60)
    assert (mu[0] == 6.0).all()
    for i in range(60):
        surprise = -log2_softmax(z[i])
        order = np.argsort(surprise, kind="stable")
        for row, token in enumerate(tokens[i]):
            now = float(mu[i, row])
            if version == 1:
                kept = order[: paper_count(2.0**-surprise, now) + 1]  # + 1: rounding at the edge
            else:
                kept = np.flatnonzero(surprise <= now + 1e-4) if surprise.min() <= now else order[:1]
            assert token in kept
            expected = np.clip(now - 0.6 * (surprise[token] - 3.0), 0.0, highest(V))
            assert abs(mu[i + 1, row] - expected) < 1e-3
    assert len(np.unique(tokens)) > 20


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [2.0, 3.5])
def test_mean_surprise_is_the_target_on_a_zipf_source(version, tau):
    z = zipf(1.4)
    params = SamplingParams(mirostat_mode=version, mirostat_tau=tau, mirostat_eta=0.5)
    tokens, _ = run(params, z, 400)
    assert abs(-log2_softmax(z)[tokens[50:]].mean() - tau) < 0.1


def test_the_exponent_of_a_zipf_source_is_recovered():
    exponents = np.array([0.6, 1.0, 1.4, 2.5])
    logp = jax.nn.log_softmax(jnp.asarray(np.stack([zipf(s) for s in exponents]), jnp.float32))
    np.testing.assert_allclose(zipf_exponent(logp, 100), exponents, atol=1e-3)
    mu = jnp.asarray([3.0, 5.0, 2.0, 1.0])
    expected = [paper_count(np.exp(np.float64(row)), m) for row, m in zip(logp, mu) if m != 5.0]
    counts = np.asarray(zipf_count(logp, mu, 100))
    np.testing.assert_array_equal(counts[[0, 2, 3]], expected)
    assert abs(counts[1] - 2**5 / np.log(V)) <= 1  # the limit at exponent 1


def test_degenerate_rows_keep_a_token():
    """One legal token, equal tokens, and a mu that keeps nothing."""
    one, flat = np.where(np.arange(V) == 7, 0.0, -np.inf), np.zeros(V)
    for version in (1, 2):
        params = SamplingParams(mirostat_mode=version, mirostat_tau=3.0, mirostat_eta=1.0)
        tokens, mu = run(params, one, 12)
        assert (tokens == 7).all() and mu[-1].max() == np.float32(highest(V)), "bounded"
        tokens, mu = run(params, flat, 12)
        assert np.isfinite(mu).all() and ((tokens >= 0) & (tokens < V)).all()
    low = SamplingParams(mirostat_mode=2, mirostat_tau=0.5, mirostat_eta=0.0)
    tokens, _ = run(low, flat - 3.0 * (np.arange(V) < 5), 3)
    assert (tokens == 5).all(), "nothing is as likely as 2^-1: the lowest of the most likely tokens"


def test_without_feedback_version_2_is_a_fixed_cut():
    z = zipf(1.0)
    tokens, mu = run(SamplingParams(mirostat_mode=2, mirostat_tau=3.5, mirostat_eta=0.0), z, 200)
    legal = np.flatnonzero(-log2_softmax(z) <= 7.0)
    assert (mu == 7.0).all() and set(tokens.ravel()) == set(legal)


def test_surprise_may_be_measured_on_what_is_kept():
    z = zipf(1.0)
    params = SamplingParams(mirostat_mode=2, mirostat_tau=2.5, mirostat_eta=0.4)
    tokens, mu = run(params, z, 30, "kept")
    logp = log2_softmax(z)
    for i in range(30):
        for row, token in enumerate(tokens[i]):
            kept = -logp <= mu[i, row] + 1e-5
            surprise = np.log2((2.0 ** logp[kept]).sum()) - logp[token]
            assert abs(mu[i + 1, row] - (mu[i, row] - 0.4 * (surprise - 2.5))) < 2e-3
