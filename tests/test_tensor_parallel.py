"""How heads split over devices, and refusals; engines: `tests/test_plans.py`."""

import pytest
from tokenloom import LLM
from tokenloom.sharding.placement import needs_split, possible_sizes, split_heads
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
