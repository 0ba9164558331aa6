"""Planning without hardware: facts of models and slices, predictions, schedules; compiling is `test_planner_tpu.py`."""

import json
from dataclasses import replace
from math import prod

import jax
import pytest
import tokenloom
from jax.experimental.pallas import tpu as pltpu
from tokenloom.model.layers import Numerics
from tokenloom.model.stacked import abstract_stacked, period_of
from tokenloom.model.state import page_bytes
from tokenloom.pallas_kernels.chips import TPUS
from tokenloom.serve.build import Build
from tokenloom.serve.cli import main
from tokenloom.serve.planner import models
from tokenloom.serve.planner.floors import backbone_work, predicted_sent
from tokenloom.serve.planner.memory import Case, placed_bytes, tiled_bytes
from tokenloom.serve.planner.schedule import Collective, collectives, device_groups
from tokenloom.sharding.division import Division, divisions
from tokenloom.sharding.topology import GENERATIONS, Topology
from tokenloom.tests.shapes import ALL

# As the publishers' safetensors count them; gemma-3-27b: without its vision tower.
PARAMETERS = {
    "gemma-2-9b": 9_241_705_984, "gemma-3-27b": 27_009_346_304, "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-70b": 70_553_706_496, "llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "mistral-7b-v0.3": 7_248_023_552, "mixtral-8x22b": 140_620_634_112,
    "mixtral-8x7b": 46_702_792_704, "qwen2.5-72b": 72_706_203_648, "qwen2.5-7b": 7_615_616_512,
    "qwen3-235b-a22b": 235_093_634_560, "qwen3-30b-a3b": 30_532_122_624, "qwen3-32b": 32_762_123_264,
    "qwen3-8b": 8_190_735_360,
}  # fmt: skip


def case(model: str, topology: str, division: str, **build) -> Case:
    where = Topology.parse(topology)
    return Case.of(models.find(model)[1], where, Division.parse(division, where.devices), Build(**build))


def test_every_known_model_has_its_published_parameters():
    assert sorted(PARAMETERS) == models.names()
    for name, count in PARAMETERS.items():
        config = models.find(name)[1]
        specs = abstract_stacked(config, Numerics(), period_of(config))[1]
        assert sum(leaf.size for leaf in jax.tree.leaves(specs)) == count, name


@pytest.mark.parametrize(
    "name, jax_name, cloud, chips, devices",
    [
        ("v5litepod-16", "v5e:4x4", "v5e-16", 16, 16),
        ("v5e:4x4", "v5e:4x4", "v5e-16", 16, 16),
        ("V6E-8", "v6e:2x4", "v6e-8", 8, 8),
        ("v4-8", "v4:2x2x1", "v4-8", 4, 4),
        ("v5p-8", "v5p:2x2x1", "v5p-8", 4, 4),
        ("v5p:4x4x8", "v5p:4x4x8", "v5p-256", 128, 128),
        ("tpu7x-8", "tpu7x:2x2x1", "tpu7x-8", 4, 8),
    ],
)
def test_slices_have_two_names(name, jax_name, cloud, chips, devices):
    where = Topology.parse(name)
    assert (where.name, where.cloud, where.chips, where.devices) == (jax_name, cloud, chips, devices)


def test_every_slice_is_found_by_both_names():
    for generation in GENERATIONS:
        found = list(generation.topologies())
        assert [one.chips for one in found] == sorted(one.chips for one in found)
        for one in found:
            assert Topology.parse(one.name) == one == Topology.parse(one.cloud)
            assert str(one) == f"{one.name} ({one.cloud})"


def test_chips_agree_with_jax():
    """Peaks and bandwidth are those of JAX's own table, to what its rounding leaves (v5p's bandwidth there is 2.46e12,
    the documentation's 2.765e12)."""
    for one in GENERATIONS:
        device, cores = next(one.topologies()).device, TPUS[one.kind].cores
        known = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(one.name.removeprefix("tpu")), cores)
        assert device.flops == pytest.approx(cores * known.bf16_ops_per_second, rel=0.01)
        assert device.bandwidth == pytest.approx(cores * known.mem_bw_bytes_per_second, rel=0.13)
        assert 0.9 < device.memory / (cores * known.hbm_capacity_bytes) < 1.01
        assert device.chip.memory == known.vmem_capacity_bytes


@pytest.mark.parametrize(
    "text, reason",
    [
        ("v5e-12", r"no slice 'v5e-12' \(12 chips\); the nearest is v5e:4x4 \(v5e-16\)"),
        ("v5p:2x2", r"the nearest is v5p:2x2x1 \(v5p-8\)"),
        ("v4-7", r"\(3.5 chips\); the nearest is v4:2x2x1"),
        ("h100-8", "not known: give a generation with a shape"),
    ],
)
def test_slices_that_are_not_sold_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        Topology.parse(text)


def test_divisions_by_name():
    assert Division.parse("tensor", 8) == Division.parse("tensor=8", 8) == Division(1, 8)
    assert Division.parse("data=2", 8) == Division.parse("data,tensor=4", 8) == Division(2, 4)
    assert Division.parse("expert=4,data=2", 8) == Division(2, 4, True)
    assert Division.parse("seq=2", 8) == Division.parse("seq,tensor=4", 8) == Division(1, 4, seq=2)
    assert Division.parse("seq", 8).name == "seq=8" and Division.parse("data=2,seq=2", 8) == Division(
        2, 2, seq=2
    )
    for one in divisions(16, True, True):
        assert Division.parse(one.name, 16) == one
    for text, reason in (
        (
            "tensor=3",
            r"covers 1 x 3 of the slice's 16 devices; the nearest that covers all is data=8,tensor=2",
        ),
        (
            "seq=3,tensor=4",
            r"covers 1 x 3 x 4 of the slice's 16 devices; the nearest that covers all is seq=4",
        ),
        ("seqs=2", "is not known: give auto, or factors such as tensor=16"),
        ("tensor=4,expert=4", "name one of the two"),
        ("tensor=4,tensor=4", "not known"),
    ):
        with pytest.raises(ValueError, match=reason):
            Division.parse(text, 16)


@pytest.mark.parametrize("shape", ALL)
@pytest.mark.parametrize("size", [1, 2])
def test_predicted_sizes_are_those_of_arrays(shape, size):
    """For every kind of block: a device's share is cut along divided axes, and the shares of a whole add up."""
    where, config = Topology.parse("v5e:2x2"), ALL[shape]()
    build = Build(max_model_len=64, max_num_seqs=2)
    one = Case.of(config, where, Division(4 // size, size), build, "bfloat16")
    if shape == "windowed" and size == 2:
        assert one.place.kv_shards == one.place.contexts == 2  # two devices share the pages of one KV head
    assert one.kv_bytes == page_bytes(config, 1, one.kv_dtype)
    whole = Case.of(config, where, Division(4, 1), build, "bfloat16")
    for path, leaf in one.leaves.items():
        share = prod(leaf.sharding.shard_shape(leaf.shape))
        assert leaf.size == share * (1 if leaf.sharding.is_fully_replicated else size)
        assert leaf.shape == whole.leaves[path].shape
    assert one.weight_bytes <= whole.weight_bytes
    assert one.memory.needed == sum(
        (one.memory.weights, one.memory.state, one.memory.sampler, one.memory.temporaries)
    )


def test_tiles():
    assert tiled_bytes((17, 1000), 4) == 24 * 1024 * 4 and tiled_bytes((5, 8, 256), 2) == 5 * 8 * 256 * 2
    assert tiled_bytes((3, 1, 128), 4) == 3 * 128 * 4 and tiled_bytes((7, 3, 128), 4) == 8 * 3 * 128 * 4
    assert tiled_bytes((17, 128, 16), 4) == 17 * 128 * 16 * 4 and tiled_bytes((0, 8), 4) == 0
    assert tiled_bytes((3,), 4) == 12
    spec = jax.ShapeDtypeStruct((9, 128), jax.numpy.bfloat16)
    assert placed_bytes({"a": spec}) == 16 * 128 * 2


def test_more_room_holds_more():
    """Wider keys never fit better; as many seats as are said to fit do, and not one more than these."""
    wider = case("llama-3.1-8b", "v5e:2x2", "tensor", max_model_len=2048)
    narrow = case("llama-3.1-8b", "v5e:2x2", "tensor", max_model_len=2048, kv_cache_dtype="int8")
    assert 0 < wider.sequences_that_fit < narrow.sequences_that_fit
    most = wider.sequences_that_fit
    fitting = [
        seats for seats in range(most - 8, most + 2)
        if case("llama-3.1-8b", "v5e:2x2", "tensor", max_model_len=2048, max_num_seqs=seats).fits
    ]  # fmt: skip
    assert fitting == list(range(most - 8, fitting[-1] + 1)) and fitting[-1] <= most


def test_a_plan_in_numbers():
    report = tokenloom.plan("meta-llama/Llama-3.1-70B", "v5e-16", compile=False)
    assert report.fits and report.plan == "tensor=16" and report.slice.name == "v5e:4x4"
    assert report.runs and any("2 hosts: run the same script on each" in note for note in report.notes)
    assert not tokenloom.plan("meta-llama/Llama-3.1-8B", "v5e-16", plan="data=2", compile=False).runs
    assert any("2 devices share the keys and values of each KV head" in note for note in report.notes)
    # 80 layers x 8 KV heads x 128 x 2 x 2 bytes; of them a device has one head of every other part of a page.
    assert report.room.kv_bytes_per_token == 327_680 == 16 * report.room.kv_bytes_per_token_per_device
    # Everything but the K and V projections, which two devices share, is cut into 16.
    shared = 80 * 2 * 1024 * 8192
    split = report.model.parameters - shared
    norms = (2 * 80 + 1) * 8192
    expected = 2 * ((split - norms) / 16 + shared / 8 + norms)
    assert report.memory.weights == pytest.approx(expected, rel=1e-3)
    decode = report.work[0]
    assert decode.binds == "bandwidth" and report.work[2].binds == "compute"
    # The backbone without embedding and head, read once, and 32 x 8,192 tokens of keys and values.
    weights = report.memory.weights - 2 * 2 * 128256 * 8192 / 16
    assert decode.bytes == pytest.approx(weights + 32 * 8192 * 20_480, rel=0.01)
    assert [one.plan for one in report.alternatives if one.fits] == ["tensor=16"]
    assert report.max_num_seqs == 32
    # Copies on request: each text takes twice the bytes, and a step reads them; nothing is sent for that.
    shared = case("llama-3.1-70b", "v5e-16", "tensor", max_num_seqs=16)
    copies = case("llama-3.1-70b", "v5e-16", "tensor", max_num_seqs=16, decode_context_parallel_size=1)
    assert copies.fits and copies.token_bytes == 2 * shared.token_bytes
    less, more = (backbone_work(one, "decode", [8192] * 16, []).bytes for one in (shared, copies))
    assert more - less == pytest.approx(16 * 8192 * 20_480, rel=1e-3)
    assert predicted_sent(shared, 16) - predicted_sent(copies, 16) == 80 * 4 * 16 * (128 * (2 + 4) + 2 * 4)


def test_a_no_comes_with_what_would_fit():
    report = tokenloom.plan("llama-3.1-70b", "v5e:2x4", compile=False)
    assert not report.fits and not report.programs
    assert any("a larger slice: v5e:4x4 (v5e-16)" in line for line in report.advice)
    report = tokenloom.plan("llama-3.1-8b", "v6e-1", max_num_seqs=64, max_model_len=8192, compile=False)
    kinds = [line.split(":")[0] for line in report.advice]
    assert not report.fits and {"fewer sequences", "shorter sequences", "a larger slice"} <= set(kinds)
    # What is advised is true.
    fewer = int(report.advice[0].rsplit("=", 1)[1])
    assert tokenloom.plan("llama-3.1-8b", "v6e-1", max_num_seqs=fewer, max_model_len=8192, compile=False).fits
    shorter = int(report.advice[1].rsplit("=", 1)[1])
    assert tokenloom.plan("llama-3.1-8b", "v6e-1", max_num_seqs=64, max_model_len=shorter, compile=False).fits


def test_what_cannot_be_names_what_can():
    with pytest.raises(
        ValueError,
        match=r"28 query heads with 4 KV heads.*Plans of v5e:2x4 \(v5e-8\) that work: data=2,tensor=4",
    ):
        tokenloom.plan("qwen2.5-7b", "v5e:2x4", plan="tensor=8", compile=False)
    with pytest.raises(ValueError, match=r"the nearest is llama-3\.1-70b"):
        tokenloom.plan("llama-3.1-71b", "v5e:2x4", compile=False)
    with pytest.raises(ValueError, match="exceeds the 131072 positions"):
        tokenloom.plan("llama-3.1-8b", "v5e:2x4", max_model_len=200_000, compile=False)
    assert tokenloom.plan("qwen2.5-7b", "v5e:2x4", compile=False).plan == "data=2,tensor=4"


def test_experts_whole_on_their_devices():
    """They weigh what cut ones do, and a mixture sums one row a token over devices rather than one an expert."""
    report = tokenloom.plan(
        "mixtral-8x7b", "v5p-8", plan="expert=4", max_model_len=4096, max_num_seqs=8, compile=False
    )
    assert report.runs and any("enable_expert_parallel=True" in note for note in report.notes)
    same = tokenloom.plan(
        "mixtral-8x7b", "v5p-8", plan="tensor=4", max_model_len=4096, max_num_seqs=8, compile=False
    )
    assert same.runs and same.memory.weights == report.memory.weights
    assert report.work[0].sent / same.work[0].sent == pytest.approx((1 + 32 + 32) / (1 + 32 + 32 * 2))
    with pytest.raises(
        ValueError, match="'expert=8' keeps experts whole on their devices, but the model has no"
    ):
        tokenloom.plan("llama-3.1-8b", "v5e:2x4", plan="expert=8", compile=False)


def test_floors_count_experts_that_tokens_reach():
    one = case("qwen3-30b-a3b", "v5e:2x4", "tensor", max_model_len=4096, max_num_seqs=8)
    single, many = (backbone_work(one, "decode", [1] * rows, []).bytes for rows in (1, 16))
    attention = sum(
        placed_bytes(leaf) for path, leaf in one.leaves.items()
        if path.startswith("blocks.") and not (".channel." in path and ".router." not in path)
    )  # fmt: skip
    # One token reaches 8 of 128 experts, 16 tokens may reach all.
    assert (many - attention) / (single - attention) == pytest.approx(16, rel=0.01)
    # All-reduces of a ring: embedding, 48 mixers, 48 x 8 rows of experts; 2,048 numbers of 2 bytes.
    sums = 2 * 7 / 8 * (1 + 48 + 48 * 8) * 2048 * 2
    # Two devices share each of 4 KV heads' pages: of 4 query heads one sends queries of 128, outs and 2 lse.
    shared = 48 * 4 * (128 * (2 + 4) + 2 * 4)
    assert predicted_sent(one, 1) == pytest.approx(sums + shared)
    one = case(
        "qwen3-30b-a3b",
        "v5e:2x4",
        "tensor",
        max_model_len=4096,
        max_num_seqs=8,
        decode_context_parallel_size=1,
    )
    assert predicted_sent(one, 1) == pytest.approx(sums)


SCHEDULE = """HloModule jit_run, is_scheduled=true

%body (p: (s32[], bf16[16,8192])) -> (s32[], bf16[16,8192]) {
  %p = (s32[], bf16[16,8192]{1,0:T(8,128)(2,1)}) parameter(0)
  %ar-start = (bf16[16,8192]{1,0}, bf16[16,8192]{1,0:T(8,128)(2,1)S(1)}) all-reduce-start(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %busy = bf16[16,8192]{1,0} fusion(%x), kind=kLoop, calls=%f
  %ar-done = bf16[16,8192]{1,0} all-reduce-done(%ar-start)
  %ag = bf16[16,8192]{1,0} all-gather(%y), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}
  ROOT %t = (s32[], bf16[16,8192]{1,0}) tuple(%i, %ag)
}

%begin (b: bf16[2,8]) -> (bf16[2,8], bf16[16,8]) {
  %b = bf16[2,8]{1,0} parameter(0)
  %g1 = bf16[16,8]{1,0} all-gather(%b), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %c1 = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.3 (d: bf16[16,8]) -> bf16[16,8] {
  %d = bf16[16,8]{1,0} parameter(0)
  %g2 = bf16[16,8]{1,0} all-gather(%d), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %v = bf16[16,8]{1,0} convolution(%d, %d), dim_labels=bf_oi->bf
}

%finish (e: bf16[16,8]) -> bf16[16,8] {
  %e = bf16[16,8]{1,0} parameter(0)
  %g3 = bf16[16,8]{1,0} all-gather(%e), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %c3 = bf16[16,8]{1,0} custom-call(%g3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (s: bf16[16,8]) -> bf16[2,8] {
  %s = bf16[16,8]{1,0} parameter(0)
  %sum = bf16[16,8]{1,0} all-reduce(%s), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %own = bf16[2,8]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={2,8}
}

%cond (q: (s32[], bf16[16,8192])) -> pred[] {
  %limit = s32[]{:T(128)} constant(80), backend_config={}
  %q = (s32[], bf16[16,8192]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[16,8192]) -> bf16[16,8192] {
  %a = bf16[16,8192]{1,0} parameter(0)
  %idle-start = (bf16[4,8192]{1,0}, bf16[4,8192]{1,0}) all-gather-start(%a), replica_groups=mesh['axis_0'=8] {'axis_0'}
  %idle-done = bf16[4,8192]{1,0} all-gather-done(%idle-start)
  %w = (s32[], bf16[16,8192]{1,0}) while(%t0), condition=%cond, body=%body
  %f1 = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) fusion(%u), kind=kCustom, calls=%begin
  %f2 = bf16[16,8]{1,0} fusion(%f1), kind=kOutput, calls=%async_collective_fusion.3
  %f3 = bf16[16,8]{1,0} fusion(%f1), kind=kCustom, calls=%finish
  %f4 = bf16[2,8]{1,0} fusion(%f3), kind=kCustom, calls=%all-reduce-scatter
  ROOT %r = bf16[16,8192]{1,0} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def test_schedules_are_read():
    found = collectives(SCHEDULE, {"kv": 4, "rep": 2})
    size = 16 * 8192 * 2
    assert found == [
        Collective("all-gather", "kv x rep", 8, 16 * 8 * 2, 1, True),  # begun, computed beside, ended
        Collective("reduce-scatter", "kv x rep", 8, 16 * 8 * 2, 1, False),
        Collective("all-gather", "kv x rep", 8, 4 * 8192 * 2, 1, False),
        Collective("all-reduce", "rep", 2, size, 80, True),
        Collective("all-gather", "kv", 4, size, 80, False),
    ]
    assert found[3].sent == 80 * size and found[4].sent == 80 * size * 3 / 4
    # Unrolled, the body counts in twos.
    twos = "  %two = s32[] constant(2)\n  %next = s32[] add(%i, %two), metadata={}\n"
    unrolled = SCHEDULE.replace(
        "  ROOT %t = (s32[], bf16[16,8192]{1,0}) tuple(%i, %ag)",
        f"{twos}  ROOT %t = (s32[], bf16[16,8192]{{1,0}}) tuple(%next, %ag)",
    )
    assert [one.times for one in collectives(unrolled, {"kv": 4, "rep": 2})][3:] == [40, 40]
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("", {"tensor": 2})


SPARSE = """HloModule sparse

%called_computation.1 (p: bf16[64,8]) -> bf16[64,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  ROOT %all-reduce.17 = bf16[64,8]{1,0} all-reduce(%p), channel_id=7, replica_groups=mesh['axis_0'=8] {'axis_0'}
}, execution_thread="sparsecore"

%async_computation.1 (q: bf16[64,8]) -> bf16[64,8] {
  %q = bf16[64,8]{1,0} parameter(0)
  ROOT %custom-call.38 = bf16[64,8]{1,0} custom-call(%q), custom_call_target="x", called_computations={%called_computation.1}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[64,8]) -> bf16[64,8] {
  %a = bf16[64,8]{1,0} parameter(0)
  %ar.call-start = ((), (), (s32[8]{0})) async-start(), async_execution_thread="sparsecore", calls=%async_computation.1
  %f1 = bf16[64,8]{1,0} fusion(%a), kind=kOutput, calls=%product
  %ar.call-update = ((bf16[64,8]{1,0}), bf16[64,8]{1,0}, (s32[8]{0})) async-update(%ar.call-start, %f1)
  ROOT %ar.call-done = bf16[64,8]{1,0} async-done(%ar.call-update)
}
"""  # noqa: E501


def test_schedules_of_sparse_cores_are_read():
    """What is sent comes with an update behind the start: only what is computed after that hides it."""
    (alone,) = collectives(SPARSE, {"tensor": 8})
    assert alone == Collective("all-reduce", "tensor", 8, 64 * 8 * 2, 1, False)
    done = "  ROOT %ar.call-done"
    (beside,) = collectives(
        SPARSE.replace(done, f"  %f2 = bf16[64,8]{{1,0}} fusion(%a), kind=kOutput, calls=%product\n{done}"),
        {"tensor": 8},
    )
    assert beside == replace(alone, hidden=True)


def test_groups_of_devices():
    assert device_groups("replica_groups=[2,2]<=[2,2]T(1,0), x") == [(0, 2), (1, 3)]
    assert device_groups("replica_groups=[2,2]<=[4]") == [(0, 1), (2, 3)]
    assert device_groups("replica_groups={{0,3},{1,2}}") == [(0, 3), (1, 2)]
    assert device_groups("replica_groups=mesh['a'=2,'b'=2] {'a'}, use") == [(0, 2), (1, 3)]
    assert device_groups("channel_id=1") is None


def test_the_command(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads((models.PUBLISHED / "llama-3.2-1b.json").read_text())))
    picture = tmp_path / "plan.png"
    arguments = ["plan", str(config), "--topology", "v5e-1", "--predict-only"]
    assert main([*arguments, "--json", "--plot", str(picture)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["fits"] and data["runs"] and data["memory"]["free"] > 0 and picture.stat().st_size > 0
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "v5e:1x1, in Google Cloud v5e-1" in shown and "fits" in shown
    assert main(["plan", "llama-3.1-405b", "--topology", "v5e:2x4", "--predict-only"]) == 1
    assert main(["plan", "llama-3.1-8b", "--topology", "v9-8"]) == 2
    capsys.readouterr()
