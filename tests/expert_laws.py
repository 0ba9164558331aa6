"""A layer with experts that are whole on their devices, for a process that has several.

`python -m tokenloom.tests.expert_laws` prints a line for each case that held; anything else is an error.
`tests/test_expert_parallel.py` runs it on devices that the CPU pretends to have.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenloom.attention.batch import Batch, rectangle
from tokenloom.attention.forms import Spread
from tokenloom.model.channels.moe import MoE
from tokenloom.model.config import MoEConfig, QuantConfig
from tokenloom.model.expert_parallel import ExpertSplit
from tokenloom.model.layers import Numerics

HIDDEN, EXPERTS, TOKENS = 16, 6, 24


def drawn(draw: np.random.Generator, moe: MoE, layers: int) -> dict:
    """Parameters of so many stacked layers like this one."""

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.dtype in (jnp.int8, jnp.uint8):
            low, high = (0, 16) if leaf.dtype == jnp.uint8 else (-7, 8)
            return jnp.asarray(draw.integers(low, high, (layers, *leaf.shape)), leaf.dtype)
        small = 4 if moe.stored is None else 64
        return jnp.asarray(draw.standard_normal((layers, *leaf.shape)) / small, leaf.dtype)

    return jax.tree.map(one, nnx.to_pure_dict(nnx.state(moe)))


def scanned(moe: MoE, params: dict, x: jax.Array, batch: Batch) -> jax.Array:
    """x through the layers one after the other, under a scan."""
    graph = nnx.graphdef(moe)

    @jax.jit
    def run(params, x, batch):
        return jax.lax.scan(lambda x, one: (x + nnx.merge(graph, one)(x, batch), None), x, params)[0]

    return run(params, x, batch)


def layer() -> None:
    """Layers under a scan, their experts over 2, 3 and 6 devices, also of two axes, give what whole ones give, whatever
    padding holds, with tokens spread over a third axis or whole, on both back ends of the product."""
    draw, devices = np.random.default_rng(0), np.array(jax.devices())
    x, valid = draw.standard_normal((TOKENS, HIDDEN)).astype(np.float32), draw.random(TOKENS) < 0.8
    x[~valid] = np.nan
    batch = replace(rectangle(jnp.zeros((1, TOKENS), jnp.int32)), valid=jnp.asarray(valid))
    meshes = [
        (Mesh(devices[:2], ("tensor",)), ("tensor",), None),
        (Mesh(devices[:6].reshape(3, 2), ("kv", "rep")), ("kv", "rep"), None),
        (Mesh(devices[:6].reshape(2, 3), ("seq", "tensor")), ("tensor",), None),
        (Mesh(devices[:6].reshape(2, 3), ("seq", "tensor")), ("tensor",), "seq"),
    ]
    formats = [(None, 2), (QuantConfig("int8"), 4), (QuantConfig("int4", group_size=4), 4)]
    for stored, top_k in formats:
        for platform in ("cpu", "gpu"):
            numerics, config = Numerics(platform=platform, weights=stored), MoEConfig(EXPERTS, top_k, 8)
            whole = MoE(config, HIDDEN, numerics=numerics, rngs=nnx.Rngs(0))
            params = drawn(draw, whole, layers=2)
            expected = np.asarray(scanned(whole, params, jnp.asarray(x), batch))[valid]
            for mesh, axes, tokens in meshes:
                split = ExpertSplit(mesh, axes, tokens)
                parted = MoE(config, HIDDEN, numerics=replace(numerics, experts=split), rngs=nnx.Rngs(0))
                own = NamedSharding(mesh, PartitionSpec(None, axes))
                placed = {
                    name: part if name == "router" else jax.device_put(part, own)
                    for name, part in params.items()
                }
                there = batch if tokens is None else replace(batch, spread=Spread(2, "ring"))
                got = scanned(parted, placed, jnp.asarray(x), there)
                np.testing.assert_allclose(np.asarray(got)[valid], expected, atol=2e-5, rtol=2e-5)
                if tokens is not None:
                    assert {one.data.shape for one in got.addressable_shards} == {(TOKENS // 2, HIDDEN)}
                print("equal", stored and stored.format, platform, dict(mesh.shape), tokens)


if __name__ == "__main__":
    layer()
