"""The programs compiled for a TPU slice that is not here (libtpu needs no TPU): 8B shapes on v5e:2x4, 64 x 4,096.

Contract: the KV pages are updated in place (aliased bytes = state bytes), and temporaries stay under 3 % of the
arguments in decode and, with the kernels, in a prefill of 512; 6 % there with the plain twin.
"""

import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenloom.attention.batch import Shape, descriptor_size
from tokenloom.attention.blockwise import Blockwise
from tokenloom.attention.sharded import Sharded
from tokenloom.model.config import llama_config
from tokenloom.model.layers import Numerics
from tokenloom.model.stacked import abstract_stacked, period_of
from tokenloom.model.state import Capacity, state_spec
from tokenloom.pallas_kernels.attention.tpu import TpuKernels
from tokenloom.pallas_kernels.chips import Chip
from tokenloom.serve.programs import backbone
from tokenloom.sharding.plan import TENSOR, Plan

pytestmark = pytest.mark.tpu_topology
SEATS, LENGTH, PAGE = 64, 4096, 128


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (the dev extra brings it)")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    return Mesh(np.array(devices).reshape(8), ("tensor",))


DECODE, PREFILL = Shape(SEATS, 1, 0, 0), Shape(0, 1, 8, 512)


@pytest.mark.parametrize(
    "shape, kernels, limit",
    [(DECODE, False, 0.03), (PREFILL, False, 0.06), (DECODE, True, 0.03), (PREFILL, True, 0.03)],
    ids=str,
)
def test_pages_are_updated_in_place(mesh, shape, kernels, limit):
    config = llama_config(
        layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocab=128256, max_position=LENGTH
    )
    dtype, width = jnp.dtype("bfloat16"), LENGTH // PAGE
    period = period_of(config)
    graphdef, specs = abstract_stacked(config, Numerics(dtype, dtype, platform="tpu"), period)
    params = TENSOR.place_params(graphdef, specs, mesh)
    chip = Chip.of(mesh.devices.flat[0])
    assert chip.name == "v5e"
    backend = Sharded(TpuKernels(chip), mesh, "tensor") if kernels else Blockwise(lie="rows")
    capacity = Capacity(SEATS * width + 1, PAGE, SEATS, dtype, backends=(backend,))
    state = TENSOR.place_state(state_spec(config, capacity, period), mesh)

    def ints(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

    run = backbone(graphdef, shape, width, PAGE, 512)
    arguments = (params, state, ints(SEATS + 1), ints(SEATS + 1), ints(descriptor_size(shape, width)))
    compiled = jax.jit(run, donate_argnums=(1,)).lower(*arguments).compile()
    assert ("paged_attention" in compiled.as_text()) == kernels
    memory = compiled.memory_analysis()
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) // 8
    print(
        f"{shape}, {'kernels' if kernels else 'twin'}: arguments {memory.argument_size_in_bytes / 1e9:.2f} GB, "
        f"temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB"
    )
    assert memory.alias_size_in_bytes == state_bytes
    assert memory.temp_size_in_bytes <= limit * memory.argument_size_in_bytes


def test_plans_refuse_what_cannot_be():
    devices = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    with pytest.raises(ValueError, match=r"unknown logical axes \['head'\]"):
        Plan("typo", (("head", "tensor"),))
    both = Plan("both", (("heads", "tensor"), ("embed", "tensor")))
    with pytest.raises(ValueError, match="maps two dimensions"):
        both.spec(("heads", "embed"), (8, 8), devices)
