"""Laws of the mixture of experts: dropless, row by row, equal on both back ends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenloom.attention.batch import Batch, rectangle
from tokenloom.model.channels.moe import MoE, route
from tokenloom.model.config import MoEConfig
from tokenloom.model.grouped_matmul import grouped_matmul
from tokenloom.model.layers import Numerics

E, X, WIDTH, K = 8, 6, 5, 2
PLATFORMS = ("cpu", "gpu")


def batch_of(tokens: int, valid: np.ndarray | None = None) -> Batch:
    batch = rectangle(jnp.zeros((1, tokens), jnp.int32))
    return batch if valid is None else dataclasses.replace(batch, valid=jnp.asarray(valid))


def mixture(platform: str = "cpu", normalise: bool = True) -> MoE:
    config = MoEConfig(X, K, WIDTH, "silu", normalise)
    return MoE(config, E, numerics=Numerics(platform=platform), rngs=nnx.Rngs(0))


def run(moe: MoE, x: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    graph, params = nnx.split(moe)
    call = jax.jit(lambda params, x, batch: nnx.merge(graph, params)(x, batch))
    return np.asarray(call(params, jnp.asarray(x, jnp.float32), batch_of(len(x), valid)))


def reference(moe: MoE, x: np.ndarray) -> np.ndarray:
    """Every expert for every token, in float64, weighted by the router."""
    x = x.astype(np.float64)
    router, gate, up, down = (
        np.asarray(p[...], np.float64) for p in (moe.router.weight, moe.gate, moe.up, moe.down)
    )
    logits = x @ router.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    kept = np.where(p >= np.sort(p, -1)[:, -K][:, None], p, 0.0)
    if moe.config.normalise:
        kept /= kept.sum(-1, keepdims=True)
    g = np.einsum("te,xie->txi", x, gate)
    h = g / (1 + np.exp(-g)) * np.einsum("te,xie->txi", x, up)
    return np.einsum("txi,xei,tx->te", h, down, kept)


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, E)).astype(np.float32)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("n", [1, 3, 100])
def test_equals_the_dense_reference(platform, normalise, n):
    moe, x = mixture(platform, normalise), tokens(n)
    np.testing.assert_allclose(run(moe, x), reference(moe, x), atol=2e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_permutation_of_tokens_permutes_the_output(platform):
    moe, x = mixture(platform), tokens(40)
    order = np.random.default_rng(1).permutation(40)
    np.testing.assert_allclose(run(moe, x[order]), run(moe, x)[order], atol=1e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_token_to_the_same_experts(platform):
    """The router sees only feature 0, which is 1: experts 4 and 2 get all rows, the others none."""
    moe, x = mixture(platform), tokens(50)
    x[:, 0] = 1.0
    scores = np.zeros((X, E), np.float32)
    scores[:, 0] = [0, 0, 3, 0, 4, 0]
    moe.router.weight[...] = jnp.asarray(scores)
    _, chosen = route(jnp.asarray(x @ scores.T), K, True)
    assert np.unique(np.asarray(chosen)).tolist() == [2, 4]
    np.testing.assert_allclose(run(moe, x), reference(moe, x), atol=2e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_padding_is_without_influence(platform):
    """What padding tokens hold, even nan, changes no valid token, and they reach no expert."""
    moe, x = mixture(platform), tokens(24)
    valid = np.arange(24) % 3 != 1
    clean = run(moe, x, valid)
    np.testing.assert_allclose(clean[valid], reference(moe, x)[valid], atol=2e-6)
    assert not clean[~valid].any()
    dirty = x.copy()
    dirty[~valid] = np.nan
    np.testing.assert_array_equal(run(moe, dirty, valid)[valid], clean[valid])


def test_an_idle_expert_is_not_read():
    """On the loop back end a matrix of nan does no harm where no row goes."""
    x, w = tokens(9), np.random.default_rng(2).standard_normal((X, WIDTH, E)).astype(np.float32)
    sizes = np.array([0, 4, 0, 0, 3, 0], np.int32)
    w[sizes == 0] = np.nan
    y = np.asarray(grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes), "cpu"))
    expected = np.concatenate([x[:4] @ w[1].T, x[4:7] @ w[4].T, np.zeros((2, WIDTH))])
    np.testing.assert_allclose(y, expected, atol=2e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    "sizes", [[0, 0, 0], [1, 0, 0], [0, 0, 20], [17, 1, 2], [70, 0, 130], [64, 128, 16], [16, 16, 16]]
)
def test_grouped_matmul_at_the_edges_of_tiles(platform, sizes):
    """All tile heights (1, 16 and 64 rows), groups that fill tiles and that do not, rows of no group."""
    rng = np.random.default_rng(3)
    for spare in (1, 5):
        x = rng.standard_normal((sum(sizes) + spare, E)).astype(np.float32)
        w = rng.standard_normal((3, WIDTH, E)).astype(np.float32)
        y = grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes, jnp.int32), platform)
        groups = np.repeat(np.arange(3), sizes)
        expected = np.zeros((len(x), WIDTH))
        expected[: len(groups)] = np.einsum("ne,noe->no", x[: len(groups)].astype(np.float64), w[groups])
        np.testing.assert_allclose(np.asarray(y), expected, atol=2e-5)


def test_refusals_name_both_sides():
    with pytest.raises(ValueError, match=r"platform 'abacus'.*known: cpu"):
        grouped_matmul(jnp.ones((1, 2)), jnp.ones((1, 2, 2)), jnp.ones((1,), jnp.int32), "abacus")
    with pytest.raises(ValueError, match=r"7 of 6 experts.*top_k"):
        MoE(MoEConfig(6, 7, WIDTH), E, numerics=Numerics(), rngs=nnx.Rngs(0))
