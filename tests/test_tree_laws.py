"""Trees drawn from a draft model, on tables: whatever is drawn and judged, what is emitted has the target's law."""

from dataclasses import replace
from functools import cache
from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare
from tokenloom.serve.drafters.rsd import Beam, Branches, WithoutReplacement
from tokenloom.serve.drafters.spectr import KSequential, Lines, transport
from tokenloom.tests.tables import Drawn, draw

V, DRAWS = 4, 200_000


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """Two models that look at the last token only, f64[V,V] each; both have zeros, at different places."""
    random = np.random.default_rng(3)
    p, q = random.dirichlet(np.ones(V), V), random.dirichlet(np.ones(V), V)
    p[0, 1] = p[2, 3] = q[0, 2] = q[3, 0] = q[3, 1] = q[3, 2] = 0.0
    return p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)


GROWTHS = {
    "spectr": (Lines(3), 2),
    "rsd-c": (Branches((2, 3)), 2),
    "rsd-c-all": (Branches((4, 1)), 2),
    "rsd-s": (Beam(3), 2),
    "rsd-s-one": (Beam(1), 2),
}


@cache
def drawn(name: str) -> Drawn:
    return draw(*GROWTHS[name], *tables(), DRAWS)


def first_three(name: str, verifier) -> np.ndarray:
    """How often each of the V**3 beginnings came, where the target goes on alone behind what was emitted."""
    sampled = drawn(name).judged(verifier).sampled
    token, count = np.asarray(sampled.token).copy(), np.asarray(sampled.count)
    assert count.min() >= 1 and count.max() <= 3
    ends, noise = tables()[0].cumsum(1), np.random.default_rng(1)
    for at in (1, 2):
        own = (noise.random(DRAWS)[:, None] > ends[token[:, at - 1]]).sum(1).clip(max=V - 1)
        token[:, at] = np.where(count > at, token[:, at], own)
    return np.bincount(token @ np.array([V * V, V, 1]), minlength=V**3)


def expected() -> np.ndarray:
    p = tables()[0]
    return np.array([p[0, a] * p[a, b] * p[b, c] for a, b, c in product(range(V), repeat=3)]) * DRAWS


def p_value(found: np.ndarray) -> float:
    """0 where something came that cannot."""
    may = expected() > 1e-6
    return float(chisquare(found[may], expected()[may]).pvalue) if found[~may].sum() == 0 else 0.0


@pytest.mark.parametrize("name", ["spectr", "rsd-c", "rsd-c-all", "rsd-s"])
def test_law_of_the_first_three_tokens(name):
    assert p_value(first_three(name, GROWTHS[name][0].verifier)) > 1e-3


class Wrong:
    """A verifier that believes the drafts were drawn from something flatter: its ratios are wrong."""

    def __init__(self, verifier):
        self.verifier = verifier

    def accept(self, sampler, seated, draft, *rest):
        flat = jnp.sqrt(draft.probs)
        flat /= jnp.maximum(flat.sum(-1, keepdims=True), 1e-9)
        return self.verifier.accept(sampler, seated, replace(draft, probs=flat), *rest)


@pytest.mark.parametrize(
    "name, verifier",
    [
        ("spectr", Wrong(KSequential())),
        ("rsd-s", Wrong(WithoutReplacement(3))),
        ("rsd-s", KSequential()),
        ("spectr", WithoutReplacement(3)),
    ],
)
def test_a_wrong_verifier_is_found_out(name, verifier):
    """Wrong ratios, and each right rule on the other's drafts."""
    assert p_value(first_three(name, verifier)) < 1e-9


def test_siblings_without_replacement_cover_the_target():
    """All tokens are children of the root, so one of them is accepted in every row whose token the draft can draw."""
    accepted = drawn("rsd-c-all").judged(WithoutReplacement(4))
    p, q = tables()
    out = p[0][q[0] == 0].sum()
    alone = float((np.asarray(accepted.sampled.count) == 1).mean())
    assert abs(alone - out) < 5 * np.sqrt(out * (1 - out) / DRAWS)


def test_siblings_of_a_tree_are_distinct_and_possible():
    q = tables()[1]
    for name in ("rsd-c", "rsd-s"):
        tree = drawn(name).tree
        token, parent, valid = (np.asarray(x)[:5000] for x in (tree.token, tree.parent, tree.valid))
        for slot in range(1, token.shape[1]):
            above = np.take_along_axis(token, np.maximum(parent[:, slot : slot + 1], 0), 1)[:, 0]
            assert (q[above, token[:, slot]] > 0)[valid[:, slot]].all()
            for other in range(1, slot):
                siblings = valid[:, slot] & valid[:, other] & (parent[:, slot] == parent[:, other])
                assert not (siblings & (token[:, slot] == token[:, other])).any()


def test_a_beam_draws_whole_lines_without_replacement():
    """The first line of a beam is one draw from all lines; W = 1 is one drawn line."""
    q = tables()[1]
    law = np.array([q[0, a] * q[a, b] for a, b in product(range(V), repeat=2)])
    may = law > 0
    for name in ("rsd-s", "rsd-s-one"):
        tree = drawn(name).tree
        W = GROWTHS[name][0].width
        slot = np.asarray(tree.parent)[:, 1 + W]
        pair = np.stack([np.take_along_axis(np.asarray(tree.token), slot[:, None], 1)[:, 0],
                         np.asarray(tree.token)[:, 1 + W]], 1)  # fmt: skip
        found = np.bincount(pair @ np.array([V, 1]), minlength=V * V)
        assert found[~may].sum() == 0
        assert chisquare(found[may], law[may] * DRAWS).pvalue > 1e-3


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_transport_by_enumeration(count):
    """The law of k-sequential selection, summed over all candidates, is p; it accepts 1 - 1/e of the bound at least."""
    random = np.random.default_rng(count)
    pairs = [(random.dirichlet(np.full(V, a), 2)) for a in (0.2, 1.0, 3.0) for _ in range(10)]
    pairs += [
        np.array([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]]),
        np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]),
        np.full((2, V), 0.25),
    ]
    p, q = (np.array([pair[i] for pair in pairs]) for i in (0, 1))
    rho, rest = transport(jnp.float32(p), jnp.float32(q), jnp.full(len(p), count, jnp.int32))
    rho, rest = np.asarray(rho, np.float64), np.asarray(rest, np.float64)
    assert (rho >= 1).all() and (rho <= count).all()
    take = np.where(q > 0, np.minimum(1.0, p / (rho[:, None] * np.maximum(q, 1e-300))), 0.0)
    law, missed = np.zeros_like(p), np.zeros(len(p))
    for line in product(range(V), repeat=count):
        weight = q[:, line].prod(1)
        for x in line:
            law[:, x] += weight * take[:, x]
            weight = weight * (1 - take[:, x])
        missed += weight
    law += missed[:, None] * rest / rest.sum(1, keepdims=True)
    assert np.abs(law - p).max() < 1e-5
    bound = np.minimum(p, 1 - (1 - q) ** count).sum(1)
    assert (1 - missed >= (1 - (1 - 1 / count) ** count) * bound - 1e-6).all()
