"""The engine with kernels generates what it generates without them, and what the plain model says."""

import pytest
from tokenloom import LLM
from tokenloom.attention.backends import backends, named
from tokenloom.attention.blockwise import Blockwise
from tokenloom.pallas_kernels.attention.tpu import TpuKernels
from tokenloom.pallas_kernels.attention.triton import TritonKernels
from tokenloom.pallas_kernels.chips import CPU, GPUS, TPUS
from tokenloom.tests.devices import run_on
from tokenloom.tests.engines import check_against_whole, engine, greedy, prompts
from tokenloom.tests.shapes import ALL

SMALL = dict(
    max_num_seqs=2, max_num_batched_tokens=32, page_size=16, strict=True, progress=False, max_model_len=64
)


@pytest.mark.parametrize("shape, backend", [("llama", "tpu"), ("windowed", "triton")])
def test_kernels_equal_the_plain_model(shape, backend):
    """Chunked prompts, decodes beside them, cached prefixes: the contract of `tests/test_laws.py`, with kernels."""
    llm = LLM.from_config(ALL[shape](), 0, attention_backend=backend, **SMALL)
    drawn = prompts(4, 11, longest=45)
    for output in llm.generate([*drawn, drawn[0]], greedy(12)):
        check_against_whole(shape, output)
    assert llm.engine.pages.free == llm.engine.pages.num_pages - 1


SPLIT = """
import sys
from tokenloom import LLM
from tokenloom.tests.engines import check_against_whole, greedy, prompts
from tokenloom.tests.shapes import ALL

shape, backend, form = sys.argv[1:]
llm = LLM.from_config(
    ALL[shape](), 0, attention_backend=backend, sequence_parallel_size=2, sequence_parallel_form=form, max_num_seqs=1,
    max_num_batched_tokens=32, page_size=16, strict=True, progress=False, max_model_len=64,
)
for output in llm.generate(prompts(2, 11, longest=45), greedy(6)):
    check_against_whole(shape, output)
print("equal")
"""


@pytest.mark.parametrize(
    "shape, backend, form", [("windowed", "tpu", "token_ring"), ("windowed", "triton", "ring")]
)
def test_kernels_on_split_texts_equal_the_plain_model(shape, backend, form):
    """Two devices, a text on both: prompts in chunks, windows, and decodes."""
    assert run_on(2, "-c", SPLIT, shape, backend, form).endswith("equal\n")


@pytest.mark.parametrize("dtype, bits", [("int8", 0.02), ("fp8", 0.2)])
def test_quantised_keys_and_values_stay_near(dtype, bits):
    """Log-probabilities of the plain model's own choices move by less than `bits`, and pages take fewer bytes."""
    llm = LLM.from_config(ALL["llama"](), 0, kv_cache_dtype=dtype, **SMALL)
    plain = engine("llama")
    assert llm.engine.programs.state[0].k.dtype.itemsize < plain.engine.programs.state[0].k.dtype.itemsize
    drawn = prompts(3, 12, longest=40)
    for ours, its in zip(llm.generate(drawn, greedy(8)), plain.generate(drawn, greedy(8))):
        mine, exact = ours.outputs[0], its.outputs[0]
        assert mine.logprobs != exact.logprobs, "nothing was quantised"
        for token, other, a, b in zip(mine.token_ids, exact.token_ids, mine.logprobs, exact.logprobs):
            assert abs(a[token].logprob - b[other].logprob) < bits
            if token != other:
                break


def test_back_ends_follow_the_chip():
    assert [type(one) for one in backends(CPU)] == [Blockwise]
    for chip in TPUS.values():
        assert [type(one) for one in backends(chip)] == [TpuKernels, Blockwise]
        assert not backends(chip)[0].interpret
    for chip in GPUS.values():
        assert [type(one) for one in backends(chip)] == [TritonKernels, Blockwise]
    assert named("tpu", CPU)[0].interpret and named("triton", CPU)[0].interpret
    with pytest.raises(ValueError, match="attention_backend 'cuda' is not known; choose"):
        LLM.from_config(ALL["llama"](), 0, attention_backend="cuda", **SMALL)
    with pytest.raises(ValueError, match="kv_cache_dtype 'int3' is not known; choose one of float32"):
        LLM.from_config(ALL["llama"](), 0, kv_cache_dtype="int3", **SMALL)
