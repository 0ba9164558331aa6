"""Any plan = one device: models split over two devices generate what the plain model says."""

import os
import subprocess
import sys

import pytest
from tokenloom import LLM
from tokenloom.tests.shapes import ALL

SPLIT = """
import jax, numpy as np
from tokenloom import LLM
from tokenloom.attention.caches.paged import PagedKV
from tokenloom.tests.engines import check_against_whole, engine, greedy, prompts
from tokenloom.tests.shapes import ALL

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
    assert all(len(page.sharding.device_set) == size and not page.sharding.is_fully_replicated for page in pages)
    one = engine(shape).engine.programs.params
    llm.update_weights(jax.tree.map(np.asarray, one))
    check_against_whole(shape, llm.generate(prompts(1, 6, longest=45), greedy(6))[0])
    llm.close()
    print("equal", shape, size)
"""


def test_split_models_equal_whole_ones():
    cases = [("experts", 2, {}), ("hybrid", 2, {})]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    code = SPLIT.replace("CASES", repr(cases))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == len(cases)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"tensor_parallel_size=64, but there are \d+ cpu devices"):
        LLM.from_config(ALL["llama"](), 0, tensor_parallel_size=64, progress=False)
    with pytest.raises(ValueError, match="tensor_parallel_size=0 must be a whole number of at least 1"):
        LLM.from_config(ALL["llama"](), 0, tensor_parallel_size=0, progress=False)
