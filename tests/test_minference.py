"""MInference: what each shape reads is full attention under a mask, which is counted out here by hand."""

from functools import cache

import numpy as np
import pytest
from tokenloom.attention.batch import Shape
from tokenloom.attention.caches.minference import AShape, BlockSparse, MInference, VerticalSlash
from tokenloom.attention.sparse_prompt import diagonals
from tokenloom.tests.cache_cases import CONFIG, Layer, dense_outputs, text
from tokenloom.tests.cache_references import softmax, wide

LENGTH, PROMPT, WIDTH = 420, 415, 7
SHAPE = Shape(1, 1, 2, 448)
SMALL = {"a": AShape(64, 70), "vertical slash": VerticalSlash(40, 101), "block sparse": BlockSparse(2)}
ROOMY = {"a": AShape(0, 512), "vertical slash": VerticalSlash(30, 512), "block sparse": BlockSparse(WIDTH)}
MIXED = (SMALL["a"], SMALL["vertical slash"], SMALL["vertical slash"], SMALL["block sparse"])


@cache
def layer(policy):
    return Layer(policy, layers=(0,), page=64, width=WIDTH, shape=SHAPE)


@cache
def alone(policy, seed):
    return layer(policy).serve(0, text(LENGTH, seed), PROMPT)


def covered(back: np.ndarray) -> np.ndarray:
    """Keys in blocks that diagonals at distances `back` cross: bool[PROMPT,PROMPT], block by block."""
    seen = np.zeros((PROMPT, PROMPT), bool)
    for start in range(0, PROMPT, 64):
        for distance in back:
            for edge in (start - distance, start - distance + 63):
                if edge >= 0:
                    seen[start : start + 64, edge // 64 * 64 : edge // 64 * 64 + 64] = True
    return seen


def masks(pattern, one) -> np.ndarray:
    """bool[Hq,PROMPT,PROMPT] by the paper's rules, widened to blocks."""
    _, _, _, q, k, places = (x[:PROMPT] for x in wide(one))
    k = np.repeat(k, CONFIG.heads // CONFIG.kv_heads, 1)
    causal = places[None, :] <= places[:, None]
    found = []
    for head in range(CONFIG.heads):
        seen = covered(np.arange(1))  # a block reads itself
        if isinstance(pattern, AShape):
            seen |= covered(np.arange(pattern.local)) | (places // 64 * 64 < pattern.first)
        elif isinstance(pattern, VerticalSlash):
            scores = np.where(causal, q[:, head] @ k[:, head].T * CONFIG.scale, -np.inf)[-64:]
            p = softmax(scores)
            columns, back = p.sum(0), np.zeros(PROMPT)
            for row, query in enumerate(places[-64:]):
                for key in range(query + 1):
                    back[query - key] += p[row, key]
            columns[:30], back[:100] = np.inf, np.inf
            seen |= covered(np.argsort(-back, kind="stable")[: pattern.slash])
            seen |= np.isin(places, np.argsort(-columns, kind="stable")[: pattern.vertical])
        else:
            parts = [slice(start, min(start + 64, PROMPT)) for start in range(0, PROMPT, 64)]
            for index, part in enumerate(parts):
                near = [q[part, head].mean(0) @ k[other, head].mean(0) for other in parts[: index + 1]]
                for other in np.argsort(-np.array(near), kind="stable")[: pattern.blocks]:
                    seen[part, parts[other]] = True
        found.append(seen & causal)
    return np.stack(found)


def full(one, seen: np.ndarray) -> np.ndarray:
    """Full attention of the prompt under masks bool[Hq,PROMPT,PROMPT]."""
    _, _, v, q, k, _ = (x[:PROMPT] for x in wide(one))
    k, v = (np.repeat(x, CONFIG.heads // CONFIG.kv_heads, 1) for x in (k, v))
    p = softmax(np.where(seen, np.einsum("qhd,khd->hqk", q, k) * CONFIG.scale, -np.inf))
    return np.einsum("hqk,khd->qhd", p, v)


@pytest.mark.parametrize("name", list(SMALL))
def test_what_is_read_is_the_mask(name):
    """Of every shape, with heads that read different keys; generations behind it are dense."""
    got = alone(MInference(SMALL[name]), 1)
    seen = masks(SMALL[name], text(LENGTH, 1))
    assert seen.sum() < 0.98 * len(seen) * np.tri(PROMPT).sum()
    np.testing.assert_allclose(got[:PROMPT], full(text(LENGTH, 1), seen), atol=1e-4)
    np.testing.assert_allclose(got[PROMPT:], dense_outputs(text(LENGTH, 1))[PROMPT:], atol=1e-5)


@pytest.mark.parametrize("name", list(ROOMY))
def test_room_for_all_is_dense(name):
    np.testing.assert_allclose(alone(MInference(ROOMY[name]), 1), dense_outputs(text(LENGTH, 1)), atol=1e-5)


def test_a_pattern_a_head_in_company_and_cut_prompts_are_dense():
    policy = MInference(heads=(MIXED,))
    one, short = text(LENGTH, 1), text(30, 2)
    expected = np.stack([alone(MInference(kind), 1)[:, head] for head, kind in enumerate(MIXED)], 1)
    np.testing.assert_allclose(alone(policy, 1), expected, atol=1e-5)
    both = layer(policy).run({1: short, 2: one}, {}, {1: (0, 30), 2: (0, PROMPT)}, final=(1, 2))
    np.testing.assert_allclose(both[2], expected[:PROMPT], atol=1e-5)
    np.testing.assert_allclose(both[1], dense_outputs(short), atol=1e-5)
    np.testing.assert_allclose(layer(policy).serve(3, one, PROMPT, 200), dense_outputs(one), atol=1e-5)


def test_diagonals_are_sums_along_diagonals():
    p, lengths = np.random.default_rng(0).random((2, 3, 5, 12)), np.array([12, 3])
    expected = np.zeros((2, 3, 12))
    for row, length in enumerate(lengths):
        for query in range(max(0, length - 5), length):
            for key in range(query + 1):
                expected[row, :, query - key] += p[row, :, query - (length - 5), key]
    np.testing.assert_allclose(diagonals(p, lengths), expected, rtol=1e-5)
