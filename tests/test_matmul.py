"""Products with stored bfloat16 weights are as exact as float32's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom import LLM
from tokenloom.model.matmul import matmul
from tokenloom.tests.engines import ROOMY, greedy, prompts
from tokenloom.tests.shapes import llama


@pytest.mark.parametrize("shape", [(1, 96), (7, 96), (2, 3, 96)], ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_split_products_err_like_float32(shape, spread):
    draw = np.random.default_rng(0)
    x = (draw.standard_normal(shape) * spread ** draw.random(shape)).astype(np.float32)
    w = jnp.asarray(draw.standard_normal((40, 96), np.float32)).astype(jnp.bfloat16)
    exact = x.astype(np.float64) @ np.asarray(w, np.float64).T
    size = np.abs(x.astype(np.float64)) @ np.abs(np.asarray(w, np.float64)).T
    error = np.abs(np.asarray(jax.jit(matmul, static_argnums=2)(x, w, "cpu"), np.float64) - exact) / size
    assert error.max() < 96 * 2.0**-24
    rounded = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64) @ np.asarray(w, np.float64).T
    assert (np.abs(rounded - exact) / size).max() > 2.0**-12, "the control: one part is not enough"


def test_a_model_stored_in_bfloat16_computes_in_float32():
    """The same weights held in float32 give the same log-probabilities."""
    stored = LLM.from_config(llama(), 0, dtype="bfloat16", progress=False, **ROOMY)
    wide = LLM.from_config(llama(), 0, progress=False, **ROOMY)
    assert jax.tree.leaves(stored.engine.programs.params)[0].dtype == jnp.bfloat16
    wide.engine.programs.params = jax.tree.map(lambda a: a.astype(jnp.float32), stored.engine.programs.params)
    for a, b in zip(stored.generate(prompts(4, 1), greedy()), wide.generate(prompts(4, 1), greedy())):
        a, b = a.outputs[0], b.outputs[0]
        for token, x, y in zip(a.token_ids, a.logprobs, b.logprobs):
            if token not in y:
                break
            assert abs(x[token].logprob - y[token].logprob) <= 2e-5
