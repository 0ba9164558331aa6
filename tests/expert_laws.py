"""Laws of experts that are whole on their devices, for a process that has several.

`python -m tokenloom.tests.expert_laws layer` and `... engine CASE...` print a line for each case that held; anything
else is an error. `tests/test_expert_parallel.py` runs them on devices that the CPU pretends to have.
"""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenloom import LLM, Int4, Int8
from tokenloom.attention.batch import Batch, rectangle
from tokenloom.attention.forms import Spread
from tokenloom.model.channels.moe import MoE
from tokenloom.model.config import MLPConfig, MoEConfig, QuantConfig, llama_config
from tokenloom.model.expert_parallel import ExpertSplit
from tokenloom.model.layers import Numerics
from tokenloom.tests.engines import check_against_whole, engine, greedy, prompts, same_tokens
from tokenloom.tests.shapes import ALL, LENGTH, VOCAB

HIDDEN, EXPERTS, TOKENS = 16, 6, 24
TRANSFORMS = {"": [], "int8": [Int8(activations=None)], "int4": [Int4(group_size=32)]}


def sixths():
    """Six experts of which a token uses four, six query heads of three KV heads; the first block is dense."""
    base = llama_config(
        layers=2, hidden=96, heads=6, kv_heads=3, intermediate=96, vocab=VOCAB, max_position=LENGTH
    )
    first, second = base.blocks
    return replace(base, blocks=(first, replace(second, channel=MoEConfig(EXPERTS, 4, 64))))


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


def owned(llm: LLM, size: int) -> None:
    """Every device has its experts and no others, whole."""
    found = 0
    for index, block in enumerate(llm.config.blocks):
        if isinstance(block.channel, MLPConfig):
            continue
        weights = llm.engine.programs.params["blocks"][index]["channel"]
        for leaf in jax.tree.leaves([part for name, part in weights.items() if name != "router"]):
            whole, share = np.asarray(leaf), EXPERTS // size
            for shard in leaf.addressable_shards:
                first = shard.device.id % size * share
                assert shard.data.shape == (share, *leaf.shape[1:])
                np.testing.assert_array_equal(np.asarray(shard.data), whole[first : first + share])
            found += 1
    assert found >= 3


def runs(shape: str, tensor: int, sequence: int, format: str) -> None:
    """An engine with experts on their devices generates what the plain model says, after a swap of weights too."""
    asked = dict(
        max_num_seqs=2 if sequence == 1 else 1, max_num_batched_tokens=32, page_size=16, max_model_len=64,
        progress=False, transforms=TRANSFORMS[format],
    )  # fmt: skip
    llm = LLM.from_config(
        ALL[shape](), 0, strict=True, tensor_parallel_size=tensor, sequence_parallel_size=sequence,
        sequence_parallel_form=None if sequence == 1 else "gather", enable_expert_parallel=True, **asked,
    )  # fmt: skip
    if sequence > 1:
        programs = llm.engine.programs
        assert programs.spreading is not None
        assert programs.spreading.over(programs.plan.shape(0, programs.plan.chunks[-1])) is not None
    owned(llm, tensor)
    outputs = llm.generate(prompts(4, 5, longest=45), greedy(8))
    if format:
        alone = LLM.from_config(ALL[shape](), 0, **asked)
        for output, wanted in zip(outputs, alone.generate(prompts(4, 5, longest=45), greedy(8))):
            same_tokens(output, wanted)
        alone.close()
    else:
        llm.update_weights(jax.tree.map(np.asarray, engine(shape).engine.programs.params))
        owned(llm, tensor)
        for output in (*outputs, *llm.generate(prompts(1, 6, longest=45), greedy(6))):
            check_against_whole(shape, output)
    llm.close()
    print("equal", shape, tensor, sequence, format)


if __name__ == "__main__":
    ALL["sixths"] = sixths
    if sys.argv[1] == "layer":
        layer()
    else:
        for case in sys.argv[2:]:
            shape, tensor, sequence, format = case.split(",")
            runs(shape, int(tensor), int(sequence), format)
