"""What TPU compilers make of steps in two halves, read from their scheduled programs."""

from dataclasses import replace

import pytest
from tokenloom.model.config import llama_config
from tokenloom.serve.build import Build
from tokenloom.serve.planner.compiled import PlannedPrograms, compile_program
from tokenloom.serve.planner.memory import Case
from tokenloom.sharding.division import Division
from tokenloom.sharding.topology import Topology

pytestmark = pytest.mark.tpu_topology
TOKENS, LAYERS = 4096, 3
CONFIG = replace(
    llama_config(
        layers=LAYERS, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocab=8192, max_position=TOKENS
    ),
    dtype="bfloat16",
)


def exposed(topology, overlap):
    """What every device waits for in a prompt's step: (kind, bytes of the buffer) and how often."""
    where = Topology.parse(topology)
    build = Build(max_num_seqs=4, max_num_batched_tokens=TOKENS, overlap_tokens=overlap)
    case = Case.of(CONFIG, where, Division.parse("tensor", where.devices), build)
    case = replace(case, devices=tuple(where.compile_only()))
    shape = case.buckets.shape(0, TOKENS)
    program = compile_program(case, shape, PlannedPrograms.of(case).chosen(full=True)[shape])
    assert program.collectives is not None
    found = [one for one in program.collectives if not one.hidden and one.bytes > 100_000]
    return {(one.kind, one.bytes): one.times for one in found}


def test_nothing_of_a_layer_is_exposed():
    """Two sums a layer become transfers beside products; what is left is done once: embedding, and x at the end."""
    whole = 2 * 4096 * TOKENS
    assert exposed("v5e:2x4", 0) == {("all-reduce", whole): 2 * LAYERS + 1}
    assert exposed("v5e:2x4", None) == {("reduce-scatter", whole // 2): 2, ("all-gather", whole // 2): 2}
