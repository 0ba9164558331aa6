"""How heads split over devices, and refusals; engines: `tests/test_plans.py`."""

from typing import Any

import pytest
from tokenloom import LLM, StreamingLLM
from tokenloom.attention.caches.paged import Pages
from tokenloom.serve.build import Build
from tokenloom.serve.context_rules import keeps_copies
from tokenloom.sharding.placement import needs_split, possible_sizes, split_heads
from tokenloom.tests.devices import run_on
from tokenloom.tests.shapes import ALL


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"tensor_parallel_size=64, but there are \d+ cpu devices"):
        LLM.from_config(ALL["llama"](), 0, tensor_parallel_size=64, progress=False)
    with pytest.raises(ValueError, match="tensor_parallel_size=0 must be a whole number of at least 1"):
        LLM.from_config(ALL["llama"](), 0, tensor_parallel_size=0, progress=False)


def test_heads_split_whole_or_in_groups():
    assert split_heads(4, {(32, 8)}) == (4, 1)
    assert split_heads(16, {(64, 8)}) == (8, 2)
    assert split_heads(8, {(32, 1)}) == (1, 8)
    # 3 devices a pair of KV heads would give each one and a half; 12 devices cut a group of 8 queries into thirds.
    assert split_heads(4, {(12, 6)}) is None and split_heads(24, {(64, 8)}) is None
    # Layers with different KV heads split where all do, and are never repeated.
    assert split_heads(2, {(8, 4), (8, 2)}) == (2, 1) and split_heads(4, {(8, 4), (8, 2)}) is None
    assert possible_sizes({(12, 6)}, 16) == [1, 2, 3, 6, 12]
    with pytest.raises(
        ValueError, match=r"12 query heads with 6 KV heads; the nearest sizes that do are 6, 3, 2"
    ):
        needs_split(5, {(12, 6)}, 8)


def copies(asked, heads=(8, 2), tensor=8, sequence=1, page_size=None, cache=Pages()):
    return keeps_copies(
        asked, {heads}, tensor=tensor, sequence=sequence, page_size=page_size, cache=cache
    )  # fmt: skip


def test_who_shares_pages():
    """Four devices have one KV head between them; by default they share its pages where those can be cut."""
    assert not copies(None) and not copies(4) and copies(1)
    assert not copies(None, page_size=16) and copies(None, page_size=18)
    assert copies(None, cache=StreamingLLM(4, 28)) and copies(None, sequence=2)
    with pytest.raises(ValueError, match=r"size=2: 4 of tensor_parallel_size=8 .* choose 4, 1 for a copy"):
        copies(2)
    with pytest.raises(ValueError, match=r"size=2: 1 of tensor_parallel_size=2 .* choose 1 or None"):
        copies(2, tensor=2)


def test_pages_that_cannot_be_shared_are_refused():
    refused: list[tuple[dict[str, Any], str]] = [
        (dict(decode_context_parallel_size=0), "decode_context_parallel_size=0 must be a whole number"),
        (dict(decode_context_parallel_size=2), "tensor_parallel_size=1 is no multiple of it"),
        (dict(decode_context_parallel_size=3, tensor_parallel_size=4), "no multiple of it"),
        (
            dict(decode_context_parallel_size=2, tensor_parallel_size=4, sequence_parallel_size=2),
            "with sequence_parallel_size=2",
        ),
        (
            dict(decode_context_parallel_size=2, tensor_parallel_size=4, page_size=17),
            "page_size=17 is not cut evenly over decode_context_parallel_size=2",
        ),
    ]
    for settings, message in refused:
        with pytest.raises(ValueError, match=message):
            Build(**settings)


def test_beams_fork_shared_pages():
    assert run_on(4, "-m", "tokenloom.tests.split_laws", "beams").split("\n")[0] == "equal beams"
