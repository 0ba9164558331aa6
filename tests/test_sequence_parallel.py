"""Texts split over devices: layers, a long prompt, equal work, the cost formula, refusals; engines:
`tests/test_plans.py`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tokenloom import LLM, StreamingLLM, TokenRecycling
from tokenloom.attention.batch import Shape
from tokenloom.attention.caches.paged import Pages
from tokenloom.attention.caches.split import Split, SplitPages
from tokenloom.attention.flat import KEYS, QUERIES, Marks, meets
from tokenloom.attention.forms import FORMS, Load, Speeds, choose
from tokenloom.attention.ops import AttentionSpec
from tokenloom.attention.spread import order, spreads
from tokenloom.serve.cache_rules import check_model
from tokenloom.serve.drafters.speculation import check_drafter
from tokenloom.tests.devices import run_on
from tokenloom.tests.shapes import ALL


def law(devices, *arguments):
    """Lines of `tests.split_laws` in a process with so many devices."""
    return run_on(devices, "-m", "tokenloom.tests.split_laws", *arguments).splitlines()


def test_split_pages_equal_whole_pages():
    """One layer: decodes, prompts in all forms, windows, soft caps, chunks, int8; the same among devices that have the
    query heads of one KV head in parts; and both rings against `dense`."""
    assert len(law(4, "layer")) == 8 + 4 + 5


def test_a_long_prompt_over_eight_devices():
    """8,192 tokens: the same tokens as one device, with an eighth of the pages on each."""
    assert law(8, "long", "8192", "2048")[-1] == "equal, 1/8 of the pages on each device"


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_work_is_equal(devices):
    """Blocks of queries and keys that meet at each hop of the ring, causal, one prompt: within 5 % of equal."""
    shape = Shape(0, 1, 1, 2 * 512 * devices)
    positions = order(shape, devices).reshape(devices, -1)
    whole = Marks(np.zeros_like(positions), positions, np.full_like(positions, shape.C))
    spec, work = AttentionSpec(1.0), np.zeros((devices, devices), int)
    for hop in range(devices):
        for device in range(devices):
            queries, keys = (
                jax.tree.map(lambda x, at=at: jnp.asarray(x[at]), whole).blocks(size)
                for at, size in ((device, QUERIES), ((device - hop) % devices, KEYS))
            )
            work[hop, device] = int(meets(queries, keys, spec).sum())
    assert (work.max(1) <= 1.05 * work.min(1)).all() and work[1:].min() > 0
    # Half of all pairs of blocks, and the diagonal.
    pairs = (shape.C // QUERIES) * (shape.C // KEYS)
    assert pairs / 2 <= work.sum() <= pairs / 2 + shape.C // QUERIES


def test_blocks_that_cannot_meet_are_left_out_and_no_others():
    draw = np.random.default_rng(0)
    for spec in (AttentionSpec(1.0), AttentionSpec(1.0, window=7), AttentionSpec(1.0, causal=False)):
        rows = np.sort(draw.integers(0, 4, 64)).astype(np.int32)
        positions = np.concatenate([np.arange(n) for n in np.bincount(rows, minlength=4)]).astype(np.int32)
        positions[60:] = -1
        lengths = np.bincount(rows, minlength=4).astype(np.int32)[rows]
        marks = Marks(*(jnp.asarray(x) for x in (rows, positions, lengths)))
        first, last = (np.asarray(x) for x in spec.visible(marks.positions, marks.lengths))
        sees = (rows[:, None] == rows) & (positions[:, None] >= 0) & (positions >= 0)
        sees &= (positions >= first[:, None]) & (positions <= last[:, None])
        needed = sees.reshape(8, 8, 4, 16).any((1, 3))
        met = np.asarray(meets(marks.blocks(8), marks.blocks(16), spec))
        assert (met | ~needed).all() and not met.all()


LLAMA_8B = Load(8, 0, 0, 32, 8, 128, 2, 218_000_000)


def test_forms_follow_the_cost():
    """Few tokens are not spread; grouped heads send keys; many KV heads and little against much send queries; where
    links are much quicker than arithmetic nothing is left to hide."""
    assert choose(LLAMA_8B.of(8, 0)) == "whole"
    assert choose(LLAMA_8B.of(8192, 0)) == "ring"
    multi_head = replace(LLAMA_8B, kv_heads=32)
    direct = Speeds(torus=False)
    assert choose(multi_head.of(2048, 120_000), direct) in ("token_ring", "ring")
    assert multi_head.of(512, 500_000).seconds("token_ring", direct) < multi_head.of(512, 500_000).seconds(
        "gather", direct
    )
    for form in FORMS:
        assert LLAMA_8B.of(8192, 0).seconds(form, Speeds()) > LLAMA_8B.of(4096, 0).seconds(form, Speeds()) > 0
    # A ring cannot beat arithmetic: it never takes less than the layer's work shared out.
    load = LLAMA_8B.of(8192, 0)
    least = (4 * 32 * 128 * 8192 * 4096 + 2 * load.parameters * 8192) / 8 / 197e12
    assert load.seconds("ring", Speeds()) >= least


def test_what_comes_out_uneven_is_not_spread():
    assert spreads(Shape(0, 1, 4, 64), 8) and spreads(Shape(8, 1, 4, 64), 8)
    assert not spreads(Shape(6, 1, 4, 64), 8) and not spreads(Shape(0, 1, 4, 40), 8)
    assert not spreads(Shape(8, 1, 0, 0), 8)
    assert sorted(order(Shape(8, 1, 4, 64), 4)) == list(range(72))


def refused(match, shape="llama", **options):
    with pytest.raises(ValueError, match=match):
        LLM.from_config(ALL[shape](), 0, progress=False, max_model_len=64, **options)


def test_what_cannot_be_is_refused():
    refused(r"sequence_parallel_size=64, but there are \d+ cpu devices", sequence_parallel_size=64)
    refused("tensor_parallel_size=2 times sequence_parallel_size=64 is 128", sequence_parallel_size=64,
            tensor_parallel_size=2)  # fmt: skip
    refused("sequence_parallel_size=0 must be a whole number", sequence_parallel_size=0)
    refused(
        "page_size=18 is not cut evenly over sequence_parallel_size=4", sequence_parallel_size=4, page_size=18
    )
    refused("sequence_parallel_form='ring' with sequence_parallel_size=1", sequence_parallel_form="ring")
    refused("choose one of whole, gather, ring, token_ring", sequence_parallel_form="both",
            sequence_parallel_size=2)  # fmt: skip
    refused("keeps a text on one device, but sequence_parallel_size=2", sequence_parallel_size=2,
            cache=StreamingLLM(4, 28))  # fmt: skip
    with pytest.raises(ValueError, match="has recurrent layers, which read them in order"):
        check_model(Pages(), ALL["hybrid"](), length=64, budget=64, parts=2)
    split = SplitPages(Split(AbstractMesh((2,), ("seq",))))
    with pytest.raises(ValueError, match="needs rejected tokens forgotten, which cache=SplitPages"):
        check_drafter(TokenRecycling(), split, ALL["llama"](), devices=2)
