"""The whole stack in one go, for interpreters and JAX versions where nothing else is run."""

from tokenloom import LLM, SamplingParams


def test_the_demo_model_writes_alone_batched_and_sampled():
    with LLM("demo", max_num_seqs=2, max_num_batched_tokens=64, max_model_len=128, progress=False) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        sampled = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=12, ignore_eos=True)
        outputs = llm.generate(["import os", "class A", "def f("], [greedy, sampled, greedy])
        assert all(len(output.outputs[0].token_ids) == 12 for output in outputs)
        alone = llm.generate("class A", sampled)[0]
        assert list(alone.outputs[0].token_ids) == list(outputs[1].outputs[0].token_ids)
