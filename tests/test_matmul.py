"""Products with stored bfloat16 weights err little more than float32's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom import LLM
from tokenloom.model import matmul as forms
from tokenloom.tests.engines import ROOMY, greedy, prompts
from tokenloom.tests.shapes import llama


def _error(form, x, w) -> float:
    """Largest error against float64, as a share of the summed sizes of the terms."""
    exact = x.astype(np.float64) @ np.asarray(w, np.float64).T
    size = np.abs(x.astype(np.float64)) @ np.abs(np.asarray(w, np.float64)).T
    return (np.abs(np.asarray(jax.jit(form)(x, w), np.float64) - exact) / size).max()


@pytest.mark.parametrize("shape", [(1, 96), (7, 96), (2, 3, 96), (300, 96)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_products_are_those_of_float64(shape, dtype, spread):
    draw = np.random.default_rng(0)
    x = (draw.standard_normal(shape) * spread ** draw.random(shape)).astype(np.float32)
    w = jnp.asarray(draw.standard_normal((40, 96), np.float32)).astype(dtype)
    error = _error(lambda x, w: forms.matmul(x, w, "cpu"), x, w)
    assert error < (96 * 2.0**-24 if dtype == "float32" else 2.0**-17)


@pytest.mark.parametrize("form", [forms.fused_product, forms._reduced], ids=lambda form: form.__name__)
def test_both_spellings_of_one_row(form):
    draw = np.random.default_rng(1)
    x = draw.standard_normal((1, 96)).astype(np.float32)
    w = jnp.asarray(draw.standard_normal((40, 96), np.float32)).astype(jnp.bfloat16)
    assert _error(form, x, w) < 96 * 2.0**-24


def test_one_bfloat16_part_would_not_do():
    """The control of the bound above."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((7, 96)).astype(np.float32)
    w = jnp.asarray(draw.standard_normal((40, 96), np.float32)).astype(jnp.bfloat16)
    assert _error(lambda x, w: forms.weights_first(x.astype(jnp.bfloat16), w).T, x, w) > 2.0**-14


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
            assert abs(x[token].logprob - y[token].logprob) <= 1e-4
