"""Laws of replicas, for a process that has several devices: `python -m tokenloom.tests.replicas small,2,1 life`.

A line is printed for a law that held; anything else is an error. `tests/test_replicas.py` runs them on devices that the
CPU pretends to have.
"""

import random
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
from tokenloom import LLM, BeamSearch, Fair, SamplingParams
from tokenloom.model.config import llama_config
from tokenloom.serve.telemetry.lines import read
from tokenloom.tests.engines import check_against_whole, greedy, mixed, prompts
from tokenloom.tests.shapes import ALL, LENGTH, VOCAB

SIZES = dict(
    max_num_seqs=2, max_num_batched_tokens=32, page_size=8, max_model_len=128, strict=True, progress=False
)
ALL["small"] = lambda: llama_config(
    layers=1, hidden=32, heads=2, kv_heads=2, intermediate=64, vocab=VOCAB, max_position=LENGTH
)


def made(shape: str, replicas: int, tensor: int = 1, **more) -> LLM:
    return LLM.from_config(
        ALL[shape](), 0, data_parallel_size=replicas, tensor_parallel_size=tensor, **{**SIZES, **more}
    )


@cache
def alone(shape: str) -> LLM:
    """One engine, shared by all laws."""
    return made(shape, 1)


def tokens(outputs) -> list:
    return [[(one.token_ids, one.finish_reason) for one in output.outputs] for output in outputs]


def same(shape: str, replicas: int, tensor: int) -> None:
    """Any number of replicas generates what one engine does, with too few pages in each."""
    llm = made(shape, replicas, tensor, num_pages=12)
    for output in llm.generate(prompts(6, 5, longest=45), greedy(10)):
        check_against_whole(shape, output)
    used = [one.steps for one in llm.engine.replicas]
    assert len(used) == replicas and all(used)
    places = [
        leaf.sharding.device_set
        for one in llm.engine.replicas
        for leaf in jax.tree.leaves(one.programs.params)
    ]
    assert len(set().union(*places)) == replicas * tensor and all(len(place) == tensor for place in places)
    if tensor == 1:
        draw, given = random.Random(7), prompts(10, 8, longest=60)
        params = [mixed(draw) for _ in given]
        for _ in range(2):  # the second time prefixes are found
            assert tokens(llm.generate(given, params)) == tokens(alone(shape).generate(given, params))
        assert sum(one.scheduler.preemptions for one in llm.engine.replicas)
    llm.update_weights(jax.tree.map(np.asarray, llm.engine.replicas[1].programs.params))
    assert {one.weight_version for one in llm.engine.replicas} == {1}
    check_against_whole(shape, llm.generate(prompts(1, 6, longest=45), greedy(6))[0])
    llm.close()
    assert "closed" in repr(llm)
    print("same", shape, replicas, tensor)


def life() -> None:
    """Errors, searches, segments, early ends and telemetry do not know of replicas."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        llm, one = made("small", 2, telemetry=path, policy=Fair()), alone("small")
        given = prompts(5, 3, longest=40)
        wrong = [given[0], [1] * 128, given[1], [1 << 40], [], [-3], given[2]]
        outputs = llm.generate(wrong, greedy(5))
        assert [output.error is None for output in outputs] == [True, False, True, False, False, False, True]
        results = [
            BeamSearch(2).generate(
                one_of, given, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
            )
            for one_of in (llm, one)
        ]
        several, single = (
            [[h.completion.token_ids for h in r.hypotheses] for r in found] for found in results
        )
        assert several == single
        paused = llm.generate(given, greedy(12, segment_tokens=4))
        assert {output.outputs[0].finish_reason for output in paused} == {"segment"}
        assert tokens(llm.resume(paused)) == tokens(one.generate(given, greedy(12)))
        ended = llm.generate(
            given, SamplingParams(n=2, max_tokens=40, ignore_eos=True), until=[lambda _: True] * 5
        )
        assert all(output.finished for output in ended)
        llm.reset_prefix_cache()
        assert "2 replicas, each llama" in repr(llm)
        llm.close()
        files = sorted(Path(folder).iterdir())
        assert [file.name for file in files] == ["run.1.jsonl", "run.jsonl"]
        for file in files:
            (record,) = read(file)
            assert record.summary is not None and record.steps
    print("life")


if __name__ == "__main__":
    for law in sys.argv[1:]:
        shape, *sizes = law.split(",")
        life() if law == "life" else same(shape, *map(int, sizes))
