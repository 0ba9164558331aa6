"""Experts whole on their devices: layers, what is sent, refusals; engines: `tests/test_plans.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from tokenloom import LLM
from tokenloom.attention.batch import rectangle
from tokenloom.model.channels.moe import MoE
from tokenloom.model.config import MoEConfig
from tokenloom.model.expert_parallel import ExpertSplit
from tokenloom.model.layers import Numerics
from tokenloom.serve.build import Build
from tokenloom.sharding.division import Division
from tokenloom.sharding.placement import Placement, needs_experts
from tokenloom.tests.devices import run_on
from tokenloom.tests.shapes import ALL


def test_split_layers_equal_whole_ones():
    """Three formats, two back ends of the product, four meshes; under a scan, padding of nan."""
    printed = run_on(6, "-m", "tokenloom.tests.expert_laws")
    assert sum(line.startswith("equal") for line in printed.splitlines()) == 3 * 2 * 4


def test_one_sum_and_nothing_else_is_sent():
    """The compiled layer has one all-reduce, of the tokens' rows: no expert's matrix travels."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    moe = MoE(
        MoEConfig(6, 2, 8), 16, numerics=Numerics(experts=ExpertSplit(mesh, ("tensor",))), rngs=nnx.Rngs(0)
    )
    graph, params = nnx.split(moe)
    call = jax.jit(lambda params, x, batch: nnx.merge(graph, params)(x, batch))
    text = call.lower(params, jnp.ones((5, 16)), rectangle(jnp.zeros((1, 5), jnp.int32))).as_text()
    assert text.count("stablehlo.all_reduce") == 1
    assert not any(kind in text for kind in ("all_gather", "all_to_all", "collective_permute"))


def test_only_the_experts_of_a_plan_change():
    cut, whole = (Placement.over(None, (2, 2), 1, experts).plan for experts in (False, True))
    assert dict(whole.table)["experts"] == dict(cut.table)["expert_mlp"] == ("kv", "rep")
    assert "expert_mlp" not in dict(whole.table)
    assert all(
        dict(whole.table)[name] == dict(cut.table)[name] for name in ("heads", "kv_heads", "mlp", "vocab")
    )


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"enable_expert_parallel=True .* but tensor_parallel_size=1"):
        LLM.from_config(ALL["experts"](), 0, enable_expert_parallel=True, progress=False)
    with pytest.raises(ValueError, match="enable_expert_parallel=2 must be True or False"):
        Build(enable_expert_parallel=2, tensor_parallel_size=2)  # type: ignore[arg-type]
    asked = "enable_expert_parallel with tensor_parallel_size=4"
    with pytest.raises(ValueError, match=rf"{asked} .*6 experts do not divide by 4; .* that do are 3, 6, 2"):
        needs_experts(4, {6}, {(12, 12)}, 8, asked)
    with pytest.raises(ValueError, match=rf"{asked} .* the model has no experts"):
        needs_experts(4, ALL["llama"]().expert_counts, {(12, 12)}, 8, asked)
    with pytest.raises(ValueError, match=r"plan 'expert=4' .* 6 experts do not divide by 4"):
        Division(1, 4, True).place({(8, 8)}, None, {6})
