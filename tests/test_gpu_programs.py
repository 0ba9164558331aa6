"""The programs of an 8B model lowered for an H200 that is not here: attention is the Triton kernels' in each."""

import re

import jax
import jax.numpy as jnp
import pytest
from tokenloom.attention.backends import backends
from tokenloom.attention.batch import Shape, descriptor_size
from tokenloom.model.config import llama_config
from tokenloom.model.layers import Numerics
from tokenloom.model.stacked import abstract_stacked, period_of
from tokenloom.model.state import Capacity, state_spec
from tokenloom.pallas_kernels.chips import GPUS
from tokenloom.pallas_kernels.lowering import lower_for_gpu
from tokenloom.serve.programs import backbone

SEATS, LENGTH, PAGE = 64, 4096, 64


@pytest.mark.parametrize("kv_dtype", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    "shape, kernels",
    [(Shape(SEATS, 1, 0, 0), 2), (Shape(0, 1, 8, 512), 1), (Shape(SEATS, 1, 8, 512), 3)],
    ids=str,
)
def test_programs_lower_with_kernels(shape, kernels, kv_dtype):
    """A layer under the scan: decode is a kernel over segments and one that merges them, prefill is one."""
    config = llama_config(
        layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocab=128256, max_position=LENGTH
    )
    dtype, width = jnp.dtype("bfloat16"), LENGTH // PAGE
    period = period_of(config)
    graphdef, params = abstract_stacked(config, Numerics(dtype, dtype, platform="gpu"), period)
    capacity = Capacity(
        SEATS * width + 1, PAGE, SEATS, dtype, backends(GPUS["H200"]),
        kv_dtype=None if kv_dtype is None else jnp.dtype(kv_dtype),
    )  # fmt: skip

    def ints(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count,), jnp.int32)

    run = backbone(graphdef, shape, width, PAGE, 512)
    state = state_spec(config, capacity, period)
    lowered = lower_for_gpu(
        run, params, state, ints(SEATS + 1), ints(SEATS + 1), ints(descriptor_size(shape, width))
    )
    assert len(re.findall(r"custom_call @[^(]*triton", lowered.as_text())) == kernels
