"""Any plan = one device: models split over two devices generate what the plain model says."""

import pytest
from tokenloom import LLM
from tokenloom.sharding.placement import needs_split, possible_sizes, split_heads
from tokenloom.tests.devices import run_on
from tokenloom.tests.shapes import ALL

SPLIT = """
import jax, numpy as np
from tokenloom import LLM
from tokenloom.attention.caches.paged import PagedKV
from tokenloom.model.config import llama_config
from tokenloom.tests.engines import check_against_whole, engine, greedy, prompts
from tokenloom.tests.shapes import ALL, LENGTH

ALL["grouped"] = lambda: llama_config(
    layers=1, hidden=64, heads=8, kv_heads=2, intermediate=128, vocab=304, max_position=LENGTH
)
for shape, size, more in CASES:
    llm = LLM.from_config(
        ALL[shape](), 0, max_num_seqs=2, max_num_batched_tokens=32, page_size=16, max_model_len=64, strict=True,
        progress=False, tensor_parallel_size=size, **more,
    )
    for output in llm.generate(prompts(4, 5, longest=45), greedy(10)):
        check_against_whole(shape, output)
    weights = jax.tree.leaves(llm.engine.programs.params)
    split = [leaf for leaf in weights if not leaf.sharding.is_fully_replicated]
    assert len(split) >= len(weights) // 3
    pages = [entry.k for entry in llm.engine.programs.state if isinstance(entry, PagedKV)]
    for page in pages:
        shards = page.addressable_shards
        assert len(shards) == size and shards[0].data.shape[1] == max(1, page.shape[1] // size)
    one = engine(shape).engine.programs.params
    llm.update_weights(jax.tree.map(np.asarray, one))
    check_against_whole(shape, llm.generate(prompts(1, 6, longest=45), greedy(6))[0])
    llm.close()
    print("equal", shape, size)
"""


def test_split_models_equal_whole_ones():
    """KV heads split, and, where devices are more than KV heads, repeated: 2 x 2 and 2 x 4 devices."""
    cases = [("experts", 2, {}), ("hybrid", 4, {}), ("grouped", 8, {})]
    assert run_on(8, "-c", SPLIT.replace("CASES", repr(cases))).count("equal") == len(cases)


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
