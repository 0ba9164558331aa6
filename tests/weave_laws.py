"""Steps in two halves on several devices: `python -m tokenloom.tests.weave_laws engines swaps` prints a line for each
case that held, anything else is an error. `tests/test_weave.py` runs it on devices that the CPU pretends to have."""

import sys
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from tokenloom import LLM
from tokenloom.model.config import MoEConfig, llama_config
from tokenloom.model.expert_parallel import swap
from tokenloom.sharding.weaving import Weaving
from tokenloom.tests.engines import check_against_whole, greedy, prompts
from tokenloom.tests.shapes import ALL, LENGTH


def grouped():
    """Two KV heads, for more devices than that."""
    return llama_config(
        layers=2, hidden=64, heads=8, kv_heads=2, intermediate=128, vocab=304, max_position=LENGTH
    )


def eighths():
    """The same with eight experts, of which a token uses two, in one layer."""
    first, second = grouped().blocks
    return replace(grouped(), blocks=(first, replace(second, channel=MoEConfig(8, 2, 48))))


ALL |= {shape.__name__: shape for shape in (grouped, eighths)}
CASES = (("windowed", 2, False), ("experts", 2, True), ("grouped", 8, False), ("eighths", 4, True))


def generates(shape: str, size: int, experts: bool) -> None:
    """An engine all of whose prompts' steps run in halves generates what the plain model says; tokens are sent to their
    experts where they have fewer of them than there are devices."""
    llm = LLM.from_config(
        ALL[shape](), 0, max_num_seqs=2, max_num_batched_tokens=32, page_size=16, max_model_len=64, strict=True,
        progress=False, tensor_parallel_size=size, overlap_tokens=1, enable_expert_parallel=experts,
    )  # fmt: skip
    (engine,) = llm.engine.replicas
    programs = engine.programs
    assert isinstance(programs.tokens, Weaving)
    woven = [one for one in programs.plan.backbones() if programs.tokens.over(one)]
    assert {one.kind for one in woven} == ({"prefill", "mixed"} if size == 2 else {"prefill"}), woven
    job = programs._jobs()[woven[0]]
    assert ("all_to_all" in str(job.jitted.trace(*job.arguments).jaxpr)) == (shape == "eighths")
    for output in llm.generate(prompts(5, 5, longest=45), greedy(10)):
        check_against_whole(shape, output)
    llm.close()
    print("equal", shape, size)


def swaps() -> None:
    """Rows reach their devices in order, drawn counts and none at all, over one mesh axis and two; there and back they
    are what they were."""
    draw = np.random.default_rng(0)
    for shape, axes in (((4,), ("a",)), ((2, 2), ("a", "b"))):
        mesh = Mesh(np.array(jax.devices()[:4]).reshape(shape), axes)
        for most in (0, 3, 7):
            counts = draw.integers(0, most + 1, (4, 4)).astype(np.int32)
            M, room = int(counts.sum(1).max()) + 2, int(counts.sum(0).max()) + 3
            sent = draw.standard_normal((4, M, 5)).astype(np.float32)

            def run(rows, counts, room=room, M=M, axes=axes):
                came = swap(rows, counts, room, axes, "cpu")
                return came, swap(came, counts.T, M, axes, "cpu")

            split = jax.jit(
                jax.shard_map(
                    run,
                    mesh=mesh,
                    in_specs=(PartitionSpec(axes), PartitionSpec()),
                    out_specs=PartitionSpec(axes),
                    check_vma=False,
                )
            )
            came, back = (np.asarray(one).reshape(4, -1, 5) for one in split(sent.reshape(-1, 5), counts))
            ends = counts.cumsum(1)
            for here in range(4):
                parts = [sent[one, ends[one, here] - counts[one, here] : ends[one, here]] for one in range(4)]
                wanted = np.concatenate([*parts, np.zeros((room - counts[:, here].sum(), 5))])
                np.testing.assert_array_equal(came[here], wanted)
                kept = counts[here].sum()
                np.testing.assert_array_equal(back[here, :kept], sent[here, :kept])
                assert not back[here, kept:].any()
        print("equal", axes)


if __name__ == "__main__":
    if "engines" in sys.argv:
        for case in CASES:
            generates(*case)
    if "swaps" in sys.argv:
        swaps()
