"""Stacked decoders equal separate layers, and spans of layers add up, stacked or not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenloom.attention.batch import Shape, make_batch, rectangle
from tokenloom.attention.caches.recurrent import Stateless
from tokenloom.attention.caches.uncached import Uncached
from tokenloom.model.checkpoint import abstract, random_params
from tokenloom.model.config import AttentionConfig
from tokenloom.model.layers import Numerics
from tokenloom.model.stacked import abstract_stacked, period_of, stack
from tokenloom.model.state import Capacity, make_state
from tokenloom.tests.shapes import VOCAB, hybrid, llama, windowed

PAGE = 8


def deeper(config, times):
    return replace(config, blocks=config.blocks * times)


CASES = {"llama": deeper(llama(), 2), "windowed": windowed(), "hybrid": deeper(hybrid(), 2)}


def test_periods():
    assert [period_of(CASES[name]) for name in ("llama", "windowed", "hybrid")] == [1, 2, 2]


def chunk(tokens: np.ndarray, length: int):
    """A prompt chunk of one row that reaches `length`, in pages 1.. in order."""
    return make_batch(
        Shape(0, 1, 1, len(tokens)), PAGE, tokens=jnp.asarray(tokens), lengths=jnp.array([length]),
        page_table=jnp.arange(1, 7)[None], query_starts=jnp.array([0, len(tokens)]), seats=jnp.array([0]),
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_stacked_equals_separate(name):
    config, numerics = CASES[name], Numerics()
    period = period_of(config)
    params = random_params(config, numerics, 0)
    capacity = Capacity(8, PAGE, 1)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 40).astype(np.int32)

    def run(graphdef, params, state):
        model = nnx.merge(graphdef, params)
        outs = []
        for start, stop in ((0, 24), (24, 40)):
            batch = chunk(tokens[start:stop], stop)
            x, state = model.run(model.embed(batch.tokens, batch), state, batch, range(model.num_layers))
            outs.append(x)
        return jnp.concatenate(outs)

    plain = jax.jit(lambda p: run(abstract(config, numerics)[0], p, make_state(config, capacity)))(params)
    graphdef, specs = abstract_stacked(config, numerics, period)
    stacked = stack(params, period)
    assert jax.tree.map(lambda a: a.shape, stacked) == jax.tree.map(lambda a: a.shape, specs)
    got = jax.jit(lambda p: run(graphdef, p, make_state(config, capacity, period)))(stacked)
    np.testing.assert_allclose(got, plain, atol=2e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_spans_add_up(stacked):
    config, numerics = CASES["hybrid"], Numerics()
    params, period = random_params(config, numerics, 0), period_of(config) if stacked else None
    graphdef = abstract_stacked(config, numerics, period)[0] if period else abstract(config, numerics)[0]
    params = stack(params, period) if period else params
    kinds = [Uncached() if isinstance(b.mixer, AttentionConfig) else Stateless() for b in config.blocks]
    batch = rectangle(jnp.arange(12).reshape(1, 12))

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        state = tuple(kinds[:period])
        x = model.embed(batch.tokens, batch)
        whole, _ = model.run(x, state, batch, range(4))
        outs = []
        for cut in (1, 2):
            part, carried = model.run(x, state, batch, range(cut))
            outs.append(model.run(part, carried, batch, range(cut, 4))[0])
        return whole, outs

    whole, parts = run(params)
    for part in parts:
        np.testing.assert_allclose(part, whole, atol=2e-5)
