"""`auto`: which plan it takes, from which figures, and that it says so."""

import pytest
import tokenloom
from tokenloom.serve.build import Build
from tokenloom.serve.planner import models
from tokenloom.serve.planner.choose import MARGIN, choose, decode_work, prefill_work, seconds
from tokenloom.serve.planner.memory import Case
from tokenloom.serve.planner.plan import _working
from tokenloom.sharding.division import Division, divisions
from tokenloom.sharding.topology import Topology


def works(model: str, topology: str, seats: int | None = None, **build) -> list[Case]:
    config = models.find(model)[1]
    given = Build(max_num_seqs=seats or 1, **build)
    return list(_working(config, Topology.parse(topology), given, None, seats is None))


def planned(model: str, topology: str, **settings):
    return tokenloom.plan(model, topology, compile=False, **settings)


@pytest.mark.parametrize(
    "model, topology",
    [
        ("llama-3.1-8b", "v5e:2x4"), ("llama-3.1-8b", "v5e:4x4"), ("qwen2.5-7b", "v5e:2x4"),
        ("qwen3-30b-a3b", "v6e:2x4"), ("mixtral-8x7b", "v5e:4x4"), ("llama-3.1-405b", "v5e:2x4"),
    ],
)  # fmt: skip
def test_the_choice_follows_from_floors_memory_and_bytes(model, topology):
    """What is chosen fits where anything does; no plan with whole texts is so wide; none with split texts would be
    quicker by the margin; experts lie where they send less."""
    found = works(model, topology)
    best, why = choose(found)
    assert why and best in found
    fitting = [case for case in found if case.fits]
    assert best.fits == bool(fitting)
    if not fitting:
        return
    whole = [case for case in fitting if case.division.seq == 1]
    if best.division.seq == 1:
        assert best.division.data == min(case.division.data for case in whole)
    else:
        assert not whole or seconds(best) < seconds(whole[0])
    split = [case for case in fitting if case.division.seq > 1 and not case.division.experts]
    cut = next(
        c
        for c in fitting
        if not c.division.experts and c.division.name == best.division.name.replace("expert", "tensor")
    )
    assert all(seconds(case) >= MARGIN * seconds(cut) for case in split)
    sent = {
        case.division.experts: decode_work(case)[0].sent + prefill_work(case).sent for case in (cut, best)
    }
    assert not best.division.experts or sent[True] < sent[False]


def test_shared_pages_make_the_widest_plan_the_best():
    """8 KV heads on 16 chips: were there two copies of all keys and values, splitting texts would be quicker."""
    report = planned("llama-3.1-8b", "v5e:4x4")
    assert report.plan == "tensor=16" and report.runs
    assert report.why[0] == "tensor=16: the widest plan that fits"
    best, why = choose(works("llama-3.1-8b", "v5e:4x4", decode_context_parallel_size=1))
    assert best.division.name == "seq=2,tensor=8" and "seq=2,tensor=8 rather than tensor=16" in why[0]
    # On 8 chips nothing is repeated.
    report = planned("llama-3.1-8b", "v5e:2x4")
    assert report.plan == "tensor=8" and report.why == ("tensor=8: the widest plan that fits",)


def test_what_can_be_started_goes_first():
    """32 query heads do not split over 64 chips on 16 hosts: two replicas would be quicker, but of one host only."""
    best, why = choose(works("llama-3.1-8b", "v5p:4x4x4"))
    assert best.runs and best.division.seq > 1 and "fits and can be started" in why[0]
    assert any("for throughput alone data=" in line for line in why)


def test_a_text_that_fits_no_other_way_is_split():
    """12 query heads do not split over 8 chips; a text of 700,000 tokens fits when all of them share it, and not on the
    4 chips of a replica."""
    config = dict(
        model_type="llama", vocab_size=32000, hidden_size=1536, num_hidden_layers=96, num_attention_heads=12,
        num_key_value_heads=2, intermediate_size=4096, max_position_embeddings=1 << 20, torch_dtype="bfloat16",
        rms_norm_eps=1e-5,
    )  # fmt: skip
    asked = dict(max_model_len=700_000, max_num_seqs=1)
    fits = {one.plan: one.fits for one in planned(config, "v5e:2x4", **asked).alternatives}
    assert not any(fit for name, fit in fits.items() if "seq" not in name)
    report = planned(config, "v5e:2x4", **asked)
    assert report.fits and "seq=" in report.plan and "no plan that leaves texts whole fits" in report.why[0]


def test_experts_lie_whole_where_that_sends_less():
    report = planned("qwen3-30b-a3b", "v5e:2x4")
    assert report.plan == "expert=8" and any("experts whole on their devices" in line for line in report.why)
    whole, cut = (planned("qwen3-30b-a3b", "v5e:2x4", plan=name) for name in ("expert=8", "tensor=8"))
    assert whole.work[0].sent + whole.work[2].sent < cut.work[0].sent + cut.work[2].sent
    assert whole.why == cut.why == ()


def test_what_does_not_fit_is_the_widest_with_advice():
    report = planned("llama-3.1-405b", "v5e:2x4")
    assert not report.fits and report.plan == "tensor=8" and report.advice
    assert report.why == ("no plan of this slice fits; this is the widest",)


def test_divisions_of_texts_are_of_one_replica():
    found = divisions(8, False, True)
    assert found[0] == Division(1, 8) and Division(1, 4, seq=2) in found and Division(1, 1, seq=8) in found
    assert all(one.data == 1 or one.seq == 1 for one in found) and len(set(found)) == len(found)
    assert all(one.data * one.devices == 8 for one in found)
    assert [one for one in found if one.seq == 1] == divisions(8, False)
