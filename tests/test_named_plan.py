"""LLM(plan=...): a name, or the planner's choice, becomes the sizes of a model over the devices at hand."""

from types import SimpleNamespace

import pytest
import tokenloom
from tokenloom import LLM
from tokenloom.model.config import llama_config
from tokenloom.serve import named_plan
from tokenloom.serve.named_plan import ALONE, plan_sizes, slice_of
from tokenloom.serve.planner import models
from tokenloom.tests.devices import run_on

SETTINGS = dict(max_model_len=8192, max_num_seqs=8, max_num_batched_tokens=512)
RUN = """
import jax
jax.config.update("jax_platforms", "cpu")
from tokenloom import LLM, SamplingParams
from tokenloom.tests.test_named_plan import small
found = []
for plan in (None, "tensor=2", "seq=2", "auto"):
    with LLM(small(), plan=plan, max_num_seqs=1, max_model_len=48, max_num_batched_tokens=16, progress=False) as llm:
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
        place = jax.tree.leaves(llm.engine.programs.params)[0].sharding
        found.append((len(place.device_set), list(output.outputs[0].token_ids)))
assert [size for size, _ in found] == [1, 2, 2, 2], found
assert all(tokens == found[0][1] for _, tokens in found), found
print("equal")
"""


def small():
    return llama_config(layers=1, hidden=32, heads=4, kv_heads=2, intermediate=64, vocab=96, max_position=64)


def pretend(monkeypatch, count: int, kind: str = "cpu") -> None:
    devices = [SimpleNamespace(device_kind=kind) for _ in range(count)]
    monkeypatch.setattr(named_plan, "jax", SimpleNamespace(devices=lambda: devices))


def sizes(plan, model=None, **more):
    found = plan_sizes(plan, small() if model is None else model, ALONE | more, **SETTINGS)
    return tuple(int(found[name]) for name in ALONE)


def test_engines_of_named_plans_equal_one_device():
    assert run_on(2, "-c", RUN).split() == ["equal"]


def test_names_become_sizes(monkeypatch):
    """(tensor, sequence, data, experts whole)."""
    assert sizes(None, tensor_parallel_size=3) == (3, 1, 1, 0)
    pretend(monkeypatch, 8)
    assert sizes("tensor=8") == sizes("tensor") == (8, 1, 1, 0)
    assert sizes("seq=2,tensor=4") == (4, 2, 1, 0)
    assert sizes("data=2,expert=4") == (4, 1, 2, 1)
    assert sizes("auto") == (4, 1, 2, 0)  # four query heads
    with pytest.raises(ValueError, match="covers 1 x 4 of the slice's 8 devices; the nearest"):
        sizes("tensor=4")
    with pytest.raises(ValueError, match="'fast' is not known: give auto, or factors"):
        sizes("fast")
    with pytest.raises(ValueError, match="'tensor=8' says what tensor_parallel_size=2 says too; give one"):
        sizes("tensor=8", tensor_parallel_size=2)


@pytest.mark.parametrize(
    "topology, kind, count", [("v5e:4x4", "TPU v5 lite", 16), ("tpu7x:2x2x1", "TPU7x", 8)]
)
def test_auto_asks_the_planner_on_tpu(monkeypatch, topology, kind, count):
    pretend(monkeypatch, count, kind)
    where = slice_of(named_plan.jax.devices())
    assert where is not None and where.name == topology
    config = models.find("llama-3.1-8b")[1]
    chosen = tokenloom.plan(config, topology, compile=False, **SETTINGS).plan
    assert sizes("auto", config) == sizes(chosen, config)
    pretend(monkeypatch, 3, kind)  # no slice has so many
    assert slice_of(named_plan.jax.devices()) is None


def test_what_the_machine_lacks_is_said_by_name():
    with pytest.raises(ValueError, match="plan 'tensor=2' covers"):
        LLM(small(), plan="tensor=2", progress=False)
