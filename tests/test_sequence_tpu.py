"""Texts split over the chips of TPU slices that are not here: what the compiled, scheduled programs say."""

import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenloom.attention.backends import backends
from tokenloom.attention.batch import Shape, descriptor_size
from tokenloom.attention.caches.paged import Pages
from tokenloom.attention.flat import Marks, flat
from tokenloom.attention.ops import AttentionSpec
from tokenloom.attention.sequence import ring, token_ring
from tokenloom.model.config import llama_config
from tokenloom.model.layers import Numerics
from tokenloom.model.stacked import abstract_stacked, period_of
from tokenloom.model.state import Capacity, make_state
from tokenloom.pallas_kernels.chips import Chip
from tokenloom.serve.planner.schedule import collectives
from tokenloom.serve.programs import backbone
from tokenloom.sharding.placement import Placement
from tokenloom.sharding.spreading import Spreading

pytestmark = pytest.mark.tpu_topology
LENGTH, SEATS = 32768, 8


def slice_of(topology):
    """The devices of a slice, to compile for."""
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (the dev extra brings it)")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compiled(topology, form, shape, tensor=1):
    """(the scheduled program, its mesh axes, bytes of the pages of one device) of 8B shapes, texts over all chips, or
    over groups of `tensor`."""
    devices = slice_of(topology)
    config = llama_config(
        layers=4, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocab=32000, max_position=LENGTH
    )
    dtype, period, page = jnp.dtype("bfloat16"), period_of(config), 128 * len(devices) // tensor
    width = LENGTH // page
    place = Placement.over(devices, (tensor, 1), len(devices) // tensor)
    graphdef, specs = abstract_stacked(config, Numerics(dtype, dtype, platform="tpu"), period)
    params = place.plan.place_params(graphdef, specs, place.mesh)
    spreading = Spreading.of(place, config, specs["blocks"], width=2, length=LENGTH, form=form)
    capacity = Capacity(
        SEATS * width + 1, page, SEATS, dtype, backends(Chip.of(devices[0])), width=width, kv_dtype=dtype
    )
    pages = place.plan.place_state(
        jax.eval_shape(lambda: make_state(config, capacity, period, place.cache(Pages()))), place.mesh
    )
    run = backbone(graphdef, shape, width, page, shape.C, spreading)
    ints = [
        jax.ShapeDtypeStruct((n,), jnp.int32, sharding=place.whole)
        for n in (SEATS + 1, SEATS + 1, descriptor_size(shape, width))
    ]
    places = jax.tree.map(lambda spec: spec.sharding, pages)
    program = (
        jax.jit(run, donate_argnums=1, out_shardings=(place.whole, place.whole, places))
        .lower(params, pages, *ints)
        .compile()
    )
    here = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages)) // len(devices)
    return program, dict(place.mesh.shape), here


SOME, CHIPS = PartitionSpec("seq"), {"v5e:2x4": 8, "v5p:2x2x1": 4}


@pytest.mark.parametrize("topology", CHIPS)
@pytest.mark.parametrize("form", ["ring", "token_ring"])
def test_every_hop_is_hidden(topology, form):
    """1,024 tokens a chip, heads of an 8B model: K and V in one permute, or queries one way and results the other;
    something is computed while each of them travels, but for the last results."""
    mesh, chips = Mesh(np.array(slice_of(topology)), ("seq",)), CHIPS[topology]
    spec, tokens = AttentionSpec(0.088), 1024 * chips

    def run(q, kv, rows, positions, lengths):
        marks = Marks(rows, positions, lengths)

        def of(index):
            return jax.tree.map(lambda x: x[index], marks)

        mine = of(jax.lax.axis_index("seq"))
        if form == "ring":
            return ring(kv, lambda kv, at: flat(q, kv[0], kv[1], mine, of(at), spec), "seq", chips)
        return token_ring(q, lambda q, at: flat(q, kv[0], kv[1], of(at), mine, spec), "seq", chips)

    def given(shape, spec, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))

    keys = PartitionSpec(None, "seq")
    split = jax.shard_map(
        run, mesh=mesh, in_specs=(SOME, keys, *(PartitionSpec(),) * 3), out_specs=SOME, check_vma=False
    )
    marks = [given((chips, 1024), PartitionSpec(), "int32")] * 3
    arguments = given((tokens, 32, 128), SOME), given((2, tokens, 8, 128), keys), *marks
    text = jax.jit(split).lower(*arguments).compile().as_text()
    hops = [one for one in collectives(text, {"seq": chips}) if one.kind == "collective-permute"]
    exposed = sum(one.times for one in hops if not one.hidden)
    assert sum(one.times for one in hops) == (chips - 1) * (1 if form == "ring" else 2)
    assert exposed <= (0 if form == "ring" else 1)
    if form == "ring":
        assert {one.bytes for one in hops} == {2 * 1024 * 8 * 128 * 2}


def test_a_prefill_program_hides_every_hop():
    """All of a program's layers: 8,192 tokens over 8 chips, and pages that are updated in place."""
    program, mesh, pages = compiled("v5e:2x4", "ring", Shape(0, 1, 4, 8192))
    keys = 2 * 1024 * 8 * 128 * 2
    hops = [
        one
        for one in collectives(program.as_text(), mesh)
        if one.kind == "collective-permute" and one.bytes == keys
    ]
    assert sum(one.times for one in hops) == 4 * 7 and all(one.hidden for one in hops)
    assert program.memory_analysis().alias_size_in_bytes >= pages


@pytest.mark.parametrize("form", ["ring", "token_ring"])
def test_kernels_meet_the_pages_of_split_texts(form):
    """2,048 tokens over two groups of four chips: both pieces of a device's queries meet stored pages in a kernel, at
    each of the two hops, and K and V, or queries, still travel beside work."""
    program, mesh, _ = compiled("v5e:2x4", form, Shape(0, 1, 4, 2048), tensor=4)
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * 2
    one = 1024 * 128 * 2  # a head's numbers of a device's tokens
    hops = [hop for hop in collectives(text, mesh) if hop.kind == "collective-permute"]
    travelling = [hop for hop in hops if hop.bytes == one * (2 * 2 if form == "ring" else 8)]
    assert sum(hop.times for hop in travelling) == 4 and all(hop.hidden for hop in travelling)


def test_a_decode_step_moves_results_only():
    """Keys and values stay where they are: what crosses links is partial results and what layers of one device are."""
    program, mesh, pages = compiled("v5e:2x4", None, Shape(SEATS, 1, 0, 0))
    found = collectives(program.as_text(), mesh)
    assert program.memory_analysis().alias_size_in_bytes >= pages
    assert max(one.bytes for one in found) <= SEATS * 32 * 129 * 4
