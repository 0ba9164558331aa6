"""The container of quantised weights: what it holds, and its products, against references a number at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom.model.config import QuantConfig
from tokenloom.model.quantised import dequantise, quantise, quantised_product


def reference(weight: np.ndarray, config: QuantConfig) -> np.ndarray:
    """The rounded weight, computed a number at a time in float64."""
    found = np.zeros(weight.shape)
    for row, values in enumerate(weight.astype(np.float64)):
        if config.format != "int4":
            scale = np.abs(values).max() / {"int8": 127, "fp8": 448}[config.format]
            codes = values / scale
            if config.format == "int8":
                codes = np.round(codes)
            else:
                codes = codes.astype(np.float32).astype(jnp.float8_e4m3fn).astype(np.float64)
            found[row] = codes * scale
            continue
        for start in range(0, len(values), config.group_size):
            part = values[start : start + config.group_size]
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            scale = float(np.float32((high - low) / 15).astype(jnp.bfloat16))
            zero = np.clip(np.round(-low / scale), 0, 15)
            codes = np.clip(np.round(part / scale) + zero, 0, 15)
            found[row, start : start + config.group_size] = (codes - zero) * scale
    return found


FORMATS = [
    QuantConfig("int8"),
    QuantConfig("int8", activations="int8"),
    QuantConfig("fp8"),
    QuantConfig("int4", 8),
]


@pytest.mark.parametrize("config", FORMATS, ids=str)
def test_the_container_holds_the_reference_rounding(config):
    weight = np.random.default_rng(3).standard_normal((6, 32)).astype(np.float32)
    weight[4] = 0.0
    weight[5] = np.abs(weight[5])
    held = np.asarray(dequantise(quantise(jnp.asarray(weight), config), config))
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.nan_to_num(reference(weight, config))
    # A value within float32's rounding of the middle of two codes may go either way; these draws have none.
    np.testing.assert_allclose(held, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("rows", (1, 2, 5, 130))
@pytest.mark.parametrize("platform", ("cpu", "tpu"))
@pytest.mark.parametrize("config", FORMATS, ids=str)
def test_products_equal_products_with_the_dequantised_weight(config, platform, rows):
    """On both platforms' forms, for one row, a few and many; rounded inputs are rounded by the reference too."""
    draw = np.random.default_rng(rows)
    weight, x = draw.standard_normal((24, 64)).astype(np.float32), draw.standard_normal((rows, 64))
    x[-1, 7], x[0, :3] = 30.0, 0.0
    parts = quantise(jnp.asarray(weight), config)
    found = jax.jit(lambda x: quantised_product(x, parts, config, platform))(jnp.asarray(x, jnp.float32))
    if config.activations:
        step = (np.abs(x).max(-1, keepdims=True) / 127).astype(np.float32)
        x = np.round(x / step) * step
    expected = x @ np.asarray(dequantise(parts, config), np.float64).T
    np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-5, atol=2e-5)


def test_a_row_without_content_or_with_nan_keeps_to_itself():
    config = QuantConfig("int8", activations="int8")
    parts = quantise(jnp.asarray(np.random.default_rng(0).standard_normal((8, 16)), jnp.float32), config)
    x = jnp.ones((3, 16)).at[0].set(0.0).at[1, 4].set(jnp.nan)
    found = np.asarray(quantised_product(x, parts, config, "cpu"))
    assert (found[0] == 0).all() and np.isnan(found[1]).all() and np.isfinite(found[2]).all()
