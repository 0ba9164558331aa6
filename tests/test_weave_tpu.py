"""What TPU compilers make of steps in two halves, read from their scheduled programs."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
from tokenloom.model.config import MoEConfig, llama_config
from tokenloom.serve.build import Build
from tokenloom.serve.planner.compiled import PlannedPrograms, compile_program
from tokenloom.serve.planner.memory import Case
from tokenloom.sharding.division import Division
from tokenloom.sharding.topology import Topology

pytestmark = [
    pytest.mark.tpu_topology,
    pytest.mark.skipif(
        find_spec("libtpu") is None, reason="libtpu is not installed (the dev extra brings it)"
    ),
]
TOKENS, LAYERS = 4096, 3
CONFIG = replace(
    llama_config(
        layers=LAYERS, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocab=8192, max_position=TOKENS
    ),
    dtype="bfloat16",
)


def prompts_step(config, topology, plan, overlap):
    """The collectives of a step of TOKENS prompt tokens."""
    where = Topology.parse(topology)
    build = Build(max_num_seqs=4, max_num_batched_tokens=TOKENS, overlap_tokens=overlap)
    case = Case.of(config, where, Division.parse(plan, where.devices), build)
    case = replace(case, devices=tuple(where.compile_only()))
    shape = case.buckets.shape(0, TOKENS)
    program = compile_program(case, shape, PlannedPrograms.of(case).chosen(full=True)[shape])
    assert program.collectives is not None
    return [one for one in program.collectives if one.bytes > 100_000]


def exposed(found):
    """What every device waits for: (kind, bytes of the buffer) and how often."""
    return {(one.kind, one.bytes): one.times for one in found if not one.hidden}


def test_nothing_of_a_layer_is_exposed():
    """Two sums a layer become transfers beside products; what is left is done once: embedding, and x at the end."""
    whole = 2 * 4096 * TOKENS
    assert exposed(prompts_step(CONFIG, "v5e:2x4", "tensor", 0)) == {("all-reduce", whole): 2 * LAYERS + 1}
    once = {("reduce-scatter", whole // 2): 2, ("all-gather", whole // 2): 2}
    assert exposed(prompts_step(CONFIG, "v5e:2x4", "tensor", None)) == once


def test_tokens_are_sent_to_their_experts():
    """Of eight experts a token has two: rows go there and back, of each half, and nobody waits."""
    blocks = tuple(replace(block, channel=MoEConfig(8, 2, 4096)) for block in CONFIG.blocks)
    found = prompts_step(replace(CONFIG, blocks=blocks), "v5e:2x4", "expert", None)
    sent = [one for one in found if one.kind == "ragged-all-to-all"]
    # Rows, the numbers of their experts (which lie in rows of 128), and what the experts said.
    assert sum(one.times for one in sent) == 2 * 3 * LAYERS and all(one.hidden for one in sent)
    assert all(times < LAYERS for times in exposed(found).values())
