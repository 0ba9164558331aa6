"""Caches inside the engine: the contract with room for all, texts without end, memory, and what is refused."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from tokenloom import LLM, SamplingParams
from tokenloom.attention.caches.double_sparsity import DoubleSparsity
from tokenloom.attention.caches.gear import GEAR, Int4KV
from tokenloom.attention.caches.h2o import H2O
from tokenloom.attention.caches.minference import AShape, MInference
from tokenloom.attention.caches.streaming import StreamingLLM
from tokenloom.tests.engines import NEAR_TIE, TOLERANCE, greedy, prompts, same_tokens
from tokenloom.tests.families import whole_logits
from tokenloom.tests.shapes import LENGTH, llama, recurrent

SMALL = dict(max_num_seqs=2, max_num_batched_tokens=32, page_size=8)
ROOMY = {
    "streaming": StreamingLLM(4, LENGTH),
    "double sparsity": DoubleSparsity(LENGTH, 4, dense_layers=0),
    "h2o": H2O(LENGTH, 16),
}


@cache
def engine(policy, **more) -> LLM:
    return LLM.from_config(llama(), strict=True, progress=False, cache=policy, **{**SMALL, **more})


def check_dense(llm: LLM, outputs) -> None:
    """Every token is the plain model's choice, with its log-probability."""
    texts = np.zeros((len(outputs), LENGTH), np.int32)
    for row, one in zip(texts, outputs):
        ids = [*one.prompt_token_ids, *one.outputs[0].token_ids]
        row[: len(ids)] = ids
    scores = jax.nn.log_softmax(whole_logits(llm.config, llm.engine.programs.params, texts), -1)
    for row, one in zip(np.asarray(scores), outputs):
        for place, entry in enumerate(one.outputs[0].logprobs, len(one.prompt_token_ids) - 1):
            token = one.outputs[0].token_ids[place - len(one.prompt_token_ids) + 1]
            assert abs(entry[token].logprob - row[place, token]) <= TOLERANCE
            assert row[place].max() - row[place, token] <= NEAR_TIE


@pytest.mark.parametrize("name", list(ROOMY))
def test_room_for_all_is_the_plain_model(name):
    """Prompts in chunks beside decodes, more than there are seats."""
    llm = engine(ROOMY[name])
    check_dense(llm, llm.generate(prompts(5, 1, 90), greedy(12)))
    assert llm.engine.pages.free == llm.engine.pages.num_pages - 1
    assert f"{ROOMY[name]!r}, without exactness" in repr(llm)


def test_prompts_that_may_not_be_cut_wait_for_a_step_of_their_own():
    """Sparse prompts, whole and never two halves; with room for all they are the plain model's."""
    llm = engine(MInference(AShape(0, LENGTH)), page_size=None, max_num_batched_tokens=LENGTH)
    chunks, take = [], llm.engine.scheduler._take

    def watched(sequence, budget, found):
        chunks.append((sequence.computed, take(sequence, budget, found), len(sequence.tokens)))
        return chunks[-1][1]

    llm.engine.scheduler._take = watched
    check_dense(llm, llm.generate(prompts(4, 8, 150), greedy(6)))
    assert all(start == 0 and count == known for start, count, known in chunks) and len(chunks) == 4


def test_streaming_goes_on_where_positions_end():
    """A fixed memory, texts longer than the model has positions; alone and in company the same."""
    policy = StreamingLLM(4, 28)
    llm = engine(policy, max_model_len=LENGTH + 100)
    drawn = [prompts(1, seed, 90)[0] for seed in (2, 3, 4)]
    params = greedy(LENGTH)
    together = llm.generate(drawn, params)
    assert all(len(one.prompt_token_ids) + len(one.outputs[0].token_ids) > LENGTH for one in together[:2])
    same_tokens(together[1], llm.generate(drawn[1], params)[0])
    assert llm.engine.programs.width == 0 and "no pages" in repr(llm)
    with pytest.raises(
        ValueError, match=r"max_model_len=292 \(of which StreamingLLM.* needs 256\) exceeds the 192"
    ):
        LLM.from_config(llama(), cache=StreamingLLM(4, 252), max_model_len=292, progress=False)


def test_compressed_pages_are_shared_and_rebuilt():
    """A pool that is too small preempts, prefixes hit, and the tokens are those of a text alone."""
    llm = engine(Int4KV(group=8, block=8), num_pages=20)
    head = prompts(1, 5, 60)[0]
    drawn = [head + [token] * 20 for token in (7, 8, 9)]
    together = llm.generate(drawn, greedy(40))
    assert llm.engine.scheduler.preemptions > 0 and llm.engine.pages.hit_tokens > 0
    for prompt, found in zip(drawn, together):
        same_tokens(found, llm.generate(prompt, greedy(40))[0])


def test_h2o_gives_pages_back_when_the_prompt_is_done():
    llm = engine(ROOMY["h2o"])
    request = llm.enqueue(None, prompts(1, 6, 60)[0], greedy(8))
    while llm.engine.busy:
        llm.engine.step()
        sequence = request.samples[0].sequence
        if len(request.samples[0].token_ids) > 1:
            assert not sequence.pages and llm.engine.pages.free == llm.engine.pages.num_pages - 1
    assert request.finished


def refused(match: str, config=None, **settings) -> None:
    with pytest.raises(ValueError, match=match):
        LLM.from_config(llama() if config is None else config, progress=False, **settings)


def test_illegal_combinations_are_refused_when_the_engine_is_built():
    both = r"cache={}.*{}.*(choose|leave|lower|raise)"
    refused(both.format("StreamingLLM", "int8"), cache=StreamingLLM(), kv_cache_dtype="int8")
    refused(both.format("H2O", "tensor_parallel_size=2"), cache=H2O(), tensor_parallel_size=2)
    refused(both.format("GEAR", "page_size=16"), cache=GEAR(), page_size=16)
    refused(
        "needs prompts whole, but max_num_batched_tokens=64", cache=MInference(), max_num_batched_tokens=64
    )
    refused("for attention, which mamba2 has none of", recurrent(), cache=H2O())
    refused("prefix_cache=True cannot hold: what H2O", cache=H2O(), prefix_cache=True)
    refused("wants 40 channels of heads of 16", cache=DoubleSparsity(channels=40))
    refused("do not fit 2 KV heads", cache=DoubleSparsity(labels=(((0,),),) * 3, dense_layers=0))
    learned = replace(llama(), model_type="gpt2", learned_positions=(LENGTH, 0))
    refused("exceeds the 192 learned positions", learned, cache=StreamingLLM(4, 20), max_model_len=300)
    refused("vectors of 64 numbers do not divide", cache=Int4KV(group=5))
    for wrong in (
        lambda: StreamingLLM(-1),
        lambda: H2O(1, 0),
        lambda: DoubleSparsity(0),
        lambda: Int4KV(3).codec,
    ):
        with pytest.raises(ValueError, match="needs"):
            wrong()


def test_what_cannot_be_rebuilt_is_not_resumed():
    llm = engine(ROOMY["h2o"])
    params = SamplingParams(temperature=0.0, max_tokens=8, segment_tokens=4, ignore_eos=True)
    output = llm.generate([1, 2, 3], params)[0]
    with pytest.raises(ValueError, match="a prompt and a generation different states"):
        llm.resume(output)
