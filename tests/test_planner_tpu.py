"""The engine's programs compiled for slices that are not here: what executables take is what was predicted.

Five cells of `benchmarks/plan_matrix.py`'s kind that compile quickly: KV heads whose devices share their pages, texts
split over devices with quantised keys and values, a mixture with its experts whole on their devices, replicas, and a
chip whose collectives run on SparseCores, and whose compiler would copy stacked weights unless told otherwise.
"""

from importlib.util import find_spec

import pytest
import tokenloom

pytestmark = [
    pytest.mark.tpu_topology,
    pytest.mark.skipif(
        find_spec("libtpu") is None, reason="libtpu is not installed (the dev extra brings it)"
    ),
]


def small(**more) -> dict:
    """A Llama of 3 layers, as wide as a large one's smallest share."""
    return {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 16,
        "num_key_value_heads": 4, "intermediate_size": 4096, "vocab_size": 32000, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", **more,
    }  # fmt: skip


MIXTURE = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
CELLS = {
    "v5e:2x4": (small(), {"plan": "tensor=8"}, "kv x rep"),
    "v6e:2x2": (small(), {"kv_cache_dtype": "int8", "plan": "seq=2"}, "tensor"),
    "v5p:2x2x1": (small(**MIXTURE), {"plan": "expert=4"}, "tensor"),
    "v4:2x2x1": (small(), {"plan": "data=4"}, ""),
    "tpu7x:2x2x1": (small(), {"plan": "data=2,tensor=4"}, "tensor"),
}


@pytest.mark.parametrize("topology", CELLS)
def test_executables_take_what_was_predicted(topology):
    raw, more, axis = CELLS[topology]
    report = tokenloom.plan(
        raw, topology, max_model_len=2048, max_num_seqs=16, max_num_batched_tokens=64, **more
    )
    assert report.fits and [one.name.split("_")[0] for one in report.programs] == ["decode", "prefill"]
    for program in report.programs:
        assert program.deviation is not None and abs(program.deviation) < 0.03, program
        assert program.temporaries < 0.05 * program.arguments
        assert program.work is not None and program.work.binds in ("bandwidth", "compute", "interconnect")
    assert report.compiled_bytes is not None and report.compiled_bytes < report.memory.available
    decode = report.programs[0]
    assert decode.collectives is not None
    reduces = [one for one in decode.collectives if one.kind == "all-reduce"]
    if not axis:
        assert not decode.collectives
        return
    # The embedding and both mixers of 3 layers, each [16, 2048] in bfloat16: a mixture sums once for all its experts.
    split = {"seq"} if "seq" in more.get("plan", "") else set()
    assert {one.axis for one in reduces} == {axis} | split
    rows = sum(one.bytes * one.times for one in reduces if one.axis == axis) / (16 * 2048 * 2)
    assert rows == 1 + 2 * 3
    # No expert's matrix travels, and no page: of 3 layers, two devices exchange 16 rows of 4 query heads.
    more = [one for one in decode.collectives if one.kind != "all-reduce"]
    if axis == "kv x rep":
        rows = {one.bytes // 4: (one.kind, one.axis, one.times) for one in more}
        assert rows == {
            16 * 4 * 128 // 2: ("all-gather", "rep", 3), 16 * 4 * 2: ("all-gather", "rep", 3),
            16 * 4 * 128: ("reduce-scatter", "rep", 3),
        }  # fmt: skip
        assert report.programs[0].results < 0.01 * report.memory.state  # pages are written in place
    elif topology == "tpu7x:2x2x1":
        # This compiler gathers the step's keys and values, to write each device's to its pages; no page and no weight.
        assert {one.kind for one in more} == {"all-gather"}
        assert max(one.bytes for one in more) == 16 * 4 * 128 * 2
        return
    else:
        assert not more or split
    assert decode.work is not None and decode.work.sent == pytest.approx(report.work[0].sent)
