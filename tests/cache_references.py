"""Caches by brute force, in float64: what each policy shows to each token of a text, as masks over full attention."""

from __future__ import annotations

from functools import singledispatch

import numpy as np
from tokenloom.attention.caches.double_sparsity import DoubleSparsity, middle
from tokenloom.attention.caches.gear import Int4KV
from tokenloom.attention.caches.h2o import H2O
from tokenloom.attention.caches.streaming import StreamingLLM
from tokenloom.attention.caches.tidal_decode import TidalDecode
from tokenloom.tests.cache_cases import CONFIG, DIM, Text

GROUP = CONFIG.heads // CONFIG.kv_heads


def turned(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [T,H,D] as complex pairs (i, i + D/2), rotated by positions [T]."""
    half = DIM // 2
    angles = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def row(q: np.ndarray, k: np.ndarray, v: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One token's q [Hq,D] over k, v [S,Hkv,D] where kept bool[Hkv,S]: (out [Hq,D], p [Hq,S])."""
    k, v, mask = (np.repeat(x, GROUP, axis) for x, axis in ((k, 1), (v, 1), (kept, 0)))
    scores = np.einsum("hd,shd->hs", q, k) * CONFIG.scale
    p = softmax(np.where(mask, scores, -np.inf))
    return np.einsum("hs,shd->hd", p, v), p


@singledispatch
def expected(policy, one: Text, prompt: int) -> np.ndarray:
    """out [T,Hq,D] of a text whose first `prompt` tokens are its prompt."""
    raise NotImplementedError(policy)


def wide(one: Text) -> tuple[np.ndarray, ...]:
    """q, k and v in float64, rotated q and k, and the places."""
    q, k, v = (x.astype(np.float64) for x in one)
    places = np.arange(len(q))
    return q, k, v, turned(q, places), turned(k, places), places


@expected.register
def _(policy: StreamingLLM, one: Text, prompt: int) -> np.ndarray:
    q, k, v, *_ = wide(one)
    out = []
    for t in range(len(q)):
        kept = np.array([p for p in range(t + 1) if p < policy.sinks or p > t - policy.window])
        keys = turned(k[kept], np.arange(len(kept)))
        query = turned(q[t : t + 1], np.array([len(kept) - 1]))[0]
        out.append(row(query, keys, v[kept], np.ones((CONFIG.kv_heads, len(kept)), bool))[0])
    return np.stack(out)


@expected.register
def _(policy: DoubleSparsity, one: Text, prompt: int) -> np.ndarray:
    return _best(one, prompt, policy.tokens, list(middle(DIM, policy.channels)))


@expected.register
def _(policy: TidalDecode, one: Text, prompt: int) -> np.ndarray:
    return _best(one, prompt, policy.tokens, list(range(DIM)))


def _best(one: Text, prompt: int, tokens: int, label: list[int]) -> np.ndarray:
    """Behind the prompt, each KV head sees the `tokens` best by these channels."""
    _, _, v, q, k, places = wide(one)
    out = []
    for t in range(len(q)):
        kept = np.tile(places <= t, (CONFIG.kv_heads, 1))
        if t >= prompt:
            for head in range(CONFIG.kv_heads):
                mine = q[t, head * GROUP : (head + 1) * GROUP][:, label] @ k[: t + 1, head][:, label].T
                score = mine.max(0)
                score[t] = np.inf
                kept[head] = np.isin(places, np.argsort(-score, kind="stable")[:tokens])
        out.append(row(q[t], k, v, kept)[0])
    return np.stack(out)


@expected.register
def _(policy: Int4KV, one: Text, prompt: int) -> np.ndarray:
    _, _, v, q, k, places = wide(one)
    out, size, codec = [], policy.block, policy.codec

    def coded(x: np.ndarray) -> np.ndarray:
        """Vectors [V,L] as they come back."""
        return np.asarray(codec.decode(codec.encode(x.astype(np.float32)), x.shape[-1]), np.float64)

    far_k, far_v = k.copy(), v.copy()
    for start in range(0, len(q) - size + 1, size):
        for head in range(CONFIG.kv_heads):
            page = slice(start, start + size)
            far_k[page, head], far_v[page, head] = coded(k[page, head].T).T, coded(v[page, head])
    for t in range(len(q)):
        far = (places < t // size * size)[:, None, None]
        kept = np.tile(places <= t, (CONFIG.kv_heads, 1))
        out.append(row(q[t], np.where(far, far_k, k), np.where(far, far_v, v), kept)[0])
    return np.stack(out)


@expected.register
def _(policy: H2O, one: Text, prompt: int) -> np.ndarray:
    _, _, v, q, k, places = wide(one)
    kept, sums, out = np.zeros((CONFIG.kv_heads, len(q)), bool), np.zeros((CONFIG.kv_heads, len(q))), []
    for t in range(len(q)):
        kept[:, t] = True
        got, p = row(q[t], k, v, kept)
        out.append(got)
        sums += p.reshape(CONFIG.kv_heads, GROUP, -1).sum(1)
        if t < prompt - 1:
            continue
        for head in range(CONFIG.kv_heads):
            old = np.flatnonzero(kept[head] & (places <= t - policy.recent))
            room = policy.heavy if kept[head].sum() > policy.heavy + policy.recent else len(old)
            order = old[np.argsort(-sums[head, old], kind="stable")]
            kept[head, order[room:]] = False
    return np.stack(out)
