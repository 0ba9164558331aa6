"""Every plan = one device: each family under one plan, each plan for some family; all pairs: `tests/plan_laws.py`."""

import pytest
from tokenloom.model.families import supported
from tokenloom.tests.devices import run_on
from tokenloom.tests.plan_laws import DEVICES, PLANS

TWO_SEATS = (
    "llama:seq=2,tensor=4,form=ring", "hybrid:tensor=4", "gemma2:seq=2,form=token_ring", "mixtral:expert=2",
    "mistral:seq=2,tensor=2,form=gather", "mamba2:seq=2,form=ring",
)  # fmt: skip
ONE_SEAT = (
    "gemma3:tensor=2", "gemma3_text:seq=2,form=ring", "gpt2:seq=2,form=ring", "gpt_neox:tensor=4", "mamba2:tensor=2",
    "mixtral:expert=4", "olmo2:tensor=4", "opt:tensor=4", "phi3:tensor=2", "qwen2:tensor=4,dcp=1", "qwen3:tensor=2",
    "qwen3_moe:seq=2,expert=2,form=token_ring", "grouped:tensor=8", "sixths:expert=6",
    "sixths:expert=3,weights=int4", "llama:tensor=2,weights=int8", "grouped:tensor=2,weights=int4",
)  # fmt: skip


@pytest.mark.parametrize(("seats", "cases"), [(1, ONE_SEAT), (2, TWO_SEATS)], ids=["one seat", "two seats"])
def test_plans_equal_one_device(seats, cases):
    """Recurrent layers over a split text are refused; with two seats prompts run beside decodes."""
    lines = run_on(DEVICES, "-m", "tokenloom.tests.plan_laws", *cases, "--seats", str(seats)).splitlines()
    expected = ["refused" if case.startswith("mamba2:seq") else "equal" for case in cases]
    assert [line.split()[0] for line in lines] == expected


def test_every_family_and_every_plan_is_there():
    names, plans = zip(*(case.split(":") for case in (*ONE_SEAT, *TWO_SEATS)))
    assert {*supported()} <= {*names} and {*PLANS} <= {*plans}
