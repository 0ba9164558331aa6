"""Weights swapped in place: the engine then is the engine of the new weights, whatever was running."""

import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tokenloom import LLM, SamplingParams
from tokenloom.adapt.rows import TrainingRows
from tokenloom.attention.batch import rectangle
from tokenloom.model.checkpoint import random_params
from tokenloom.model.decoder import Decoder
from tokenloom.model.layers import Numerics
from tokenloom.model.params import flatten, unflatten
from tokenloom.model.stacked import parts, stack
from tokenloom.serve import build as build_module
from tokenloom.serve import weights
from tokenloom.tests.engines import ROOMY, engine, greedy, prompts, same_tokens
from tokenloom.tests.shapes import ALL, VOCAB, llama, windowed

WINDOWS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 48)), jnp.int32)


def fresh(shape: str, seed: int, **more) -> LLM:
    return LLM.from_config(ALL[shape](), seed, strict=True, progress=False, **{**ROOMY, **more})


@pytest.fixture(scope="module")
def swapped() -> LLM:
    """An engine whose weights the tests of this module replace at will."""
    return fresh("llama", 0)


def running(llm: LLM, drawn: list[list[int]], params: SamplingParams, steps: int) -> list:
    """Requests that `steps` steps have brought along."""
    requests = [llm._submit(prompt, params) for prompt in drawn]
    for _ in range(steps):
        llm.engine.step()
    return requests


def finish(llm: LLM, requests: list) -> list:
    while not all(request.finished for request in requests):
        llm.engine.step()
    return [request.output() for request in requests]


@jax.jit
def forward(state, windows):
    """The training path: log-probabilities [B*S, V] of whole windows."""
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Decoder(llama(), rngs=nnx.Rngs(0)))), state)
    batch = rectangle(windows)
    rows = (TrainingRows(),) * model.num_layers
    x, _ = model.run(model.embed(batch.tokens, batch), rows, batch, range(model.num_layers))
    return jax.nn.log_softmax(model.head(model.normalise(x)), axis=-1)


def update(module: Decoder) -> None:
    """One step of Adam on the windows, in the module."""
    state = nnx.state(module)
    optimiser = optax.adam(1e-2)

    def loss(state):
        found = forward(state, WINDOWS[:, :-1])
        return -jnp.take_along_axis(found, WINDOWS[:, 1:].reshape(-1, 1), 1).mean()

    updates, _ = optimiser.update(jax.grad(loss)(state), optimiser.init(state), state)
    nnx.update(module, optax.apply_updates(state, updates))


def test_a_trained_module_scores_like_its_training_path(swapped):
    module = Decoder(llama(), rngs=nnx.Rngs(3))
    update(module)
    old = jax.tree.leaves(swapped.engine.programs.params)
    swapped.update_weights(module)
    assert all(leaf.is_deleted() for leaf in old)
    state = nnx.state(module)
    expected = np.asarray(forward(state, WINDOWS)).reshape(2, 48, VOCAB)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # as a training step that donates them would: the engine has copies
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = swapped.generate(np.asarray(WINDOWS).tolist(), params)
    for output, row in zip(outputs, expected):
        ids = output.prompt_token_ids
        found = [output.prompt_logprobs[at][ids[at]].logprob for at in range(1, len(ids))]
        assert np.abs(found - row[np.arange(len(ids) - 1), ids[1:]]).max() <= 1e-4
    assert swapped.engine.programs.compilations.late == 0


@pytest.mark.parametrize("shape", ["llama", "recurrent", "hybrid"])
def test_the_same_weights_swapped_in_change_nothing(shape):
    llm, drawn = engine(shape), prompts(6, 31)
    expected = llm.generate(drawn, greedy())
    requests = running(llm, drawn, greedy(), 9)
    assert any(request.samples[0].token_ids for request in requests)
    for _ in range(2):
        llm.update_weights(random_params(ALL[shape](), Numerics(), 0))
        llm.engine.step()
        llm.engine.step()
    for one, other in zip(expected, finish(llm, requests)):
        same_tokens(one, other)
        assert sorted(other.outputs[0].weight_versions) == list(other.outputs[0].weight_versions)
    assert llm.engine.programs.compilations.late == 0


@pytest.mark.parametrize("params", [greedy(30), SamplingParams(seed=4, max_tokens=30, ignore_eos=True)])
def test_tokens_after_a_swap_are_those_of_a_fresh_engine(swapped, params):
    """Nothing that the old weights computed is used: not pages, not cached prefixes, not sampled tokens."""
    config, drawn = llama(), prompts(5, 32)
    swapped.update_weights(random_params(config, Numerics(), 0))
    before = swapped.weight_version
    requests = running(swapped, drawn, params, 8)
    swapped.update_weights(random_params(config, Numerics(), 1))
    outputs = finish(swapped, requests)
    counts = [output.outputs[0].weight_versions.count(before) for output in outputs]
    assert 0 < max(counts) < 30, "the swap was meant to come while they ran"
    cut = []
    for output, count in zip(outputs, counts):
        [one] = output.outputs
        kept = None if one.logprobs is None else one.logprobs[:count]
        one = replace(
            one, token_ids=one.token_ids[:count], logprobs=kept, finish_reason="segment",
            weight_versions=one.weight_versions[:count],
        )  # fmt: skip
        cut.append(replace(output, outputs=[one]))
    renewed = fresh("llama", 1)
    for one, other in zip(outputs, renewed.resume(cut)):
        assert list(one.outputs[0].token_ids) == list(other.outputs[0].token_ids)
    # The same prompts again: nothing cached under the old weights is met.
    for one, other in zip(swapped.generate(drawn, greedy()), renewed.generate(drawn, greedy())):
        same_tokens(one, other)


BAD = {
    "missing: final_norm": lambda leaves: {k: v for k, v in leaves.items() if "final_norm" not in k},
    "unknown: blocks.2.mixer": lambda leaves: {**leaves, "blocks.2.mixer.q.weight": np.zeros(3, np.float32)},
    "has the shape (300, 32)": lambda leaves: {**leaves, "embedding.weight": np.zeros((300, 32), np.float32)},
    "holds int32": lambda leaves: {**leaves, "embedding.weight": np.zeros((VOCAB, 64), np.int32)},
    "is a float, not an array": lambda leaves: {**leaves, "embedding.weight": 1.0},
    "was deleted": lambda leaves: {**leaves, "lm_head.weight": deleted((VOCAB, 64))},
}


def deleted(shape) -> jax.Array:
    array = jnp.zeros(shape)
    array.delete()
    return array


@pytest.mark.parametrize("reason", BAD)
def test_what_does_not_fit_is_refused_before_anything_changes(swapped, reason):
    prompt = prompts(1, 33)[0]
    expected, version = swapped.generate(prompt, greedy())[0], swapped.weight_version
    leaves = swapped.engine.programs.params
    before = jax.tree.leaves(leaves)
    given = unflatten(BAD[reason](flatten(random_params(llama(), Numerics(), 5))))
    with pytest.raises(ValueError) as error:
        swapped.update_weights(given)
    assert reason in str(error.value)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(leaves))) and swapped.weight_version == version
    assert swapped.generate(prompt, greedy())[0].outputs[0].logprobs == expected.outputs[0].logprobs


def test_other_sources_and_versions_are_refused(swapped, tmp_path):
    with pytest.raises(ValueError, match="got a list"):
        swapped.update_weights([1, 2])
    fresh("hybrid", 0).save(tmp_path / "hybrid")
    with pytest.raises(ValueError, match=r"another model.*differs.* in .*blocks"):
        swapped.update_weights(tmp_path / "hybrid")
    version = swapped.weight_version
    with pytest.raises(ValueError, match="whole number above the present"):
        swapped.update_weights(random_params(llama(), Numerics(), 0), version=version)
    swapped.update_weights(random_params(llama(), Numerics(), 0), version=version + 10)
    assert swapped.weight_version == version + 10


def test_old_arrays_are_freed_one_by_one(swapped, monkeypatch):
    old, alive, made = jax.tree.leaves(swapped.engine.programs.params), [], weights._made

    def counting(*arguments):
        alive.append(sum(not leaf.is_deleted() for leaf in old))
        return made(*arguments)

    monkeypatch.setattr(weights, "_made", counting)
    swapped.update_weights(random_params(llama(), Numerics(), 0))
    assert alive == list(range(len(old), 0, -1))


def test_a_swap_that_breaks_half_way_stops_the_engine_until_the_next(swapped, monkeypatch):
    made, calls = weights._made, []

    def breaking(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return made(*arguments)

    monkeypatch.setattr(weights, "_made", breaking)
    with pytest.raises(OSError):
        swapped.update_weights(random_params(llama(), Numerics(), 2))
    with pytest.raises(RuntimeError, match="swap again"):
        swapped.generate([1, 2, 3], greedy(2))
    monkeypatch.undo()
    swapped.update_weights(random_params(llama(), Numerics(), 0))
    same_tokens(swapped.generate([1, 2, 3], greedy())[0], engine("llama").generate([1, 2, 3], greedy())[0])


SMALL = dict(max_num_seqs=2, max_num_batched_tokens=32)


def test_stored_dtypes_stay():
    llm, drawn, bfloat16 = fresh("llama", 0, dtype="bfloat16", **SMALL), prompts(3, 34), jnp.dtype("bfloat16")
    llm.update_weights(nnx.state(Decoder(llama(), rngs=nnx.Rngs(3))))
    assert {leaf.dtype for leaf in jax.tree.leaves(llm.engine.programs.params)} == {bfloat16}
    converted = llm.generate(drawn, greedy())
    llm.update_weights(Decoder(llama(), numerics=Numerics(bfloat16), rngs=nnx.Rngs(3)))
    for one, other in zip(converted, llm.generate(drawn, greedy())):
        same_tokens(one, other)


def test_stacked_weights(monkeypatch):
    """As on TPU and GPU: layers under a scan, their weights with a leading axis."""
    platform = replace(Numerics(), platform="gpu")
    monkeypatch.setattr(build_module, "choose_numerics", lambda dtype, stored: platform)
    llm, drawn = fresh("llama", 1, **SMALL), prompts(3, 35)
    assert llm.engine.programs.period == 1
    llm.update_weights(random_params(llama(), Numerics(), 0))
    for one, other in zip(llm.generate(drawn, greedy()), engine("llama").generate(drawn, greedy())):
        same_tokens(one, other)
    assert llm.engine.programs.compilations.late == 0


@pytest.mark.parametrize("period", [1, 2, 4])
def test_parts_name_what_stack_joins(period):
    params = random_params(windowed(), Numerics(), 0)
    separate = flatten(params)
    for path, leaf in flatten(stack(params, period)).items():
        names = parts(path, period, 4)
        joined = jnp.stack([separate[name] for name in names]) if "blocks" in path else separate[names[0]]
        assert (joined == leaf).all()


def test_folders_streams_and_threads(tmp_path):
    """Safetensors and Orbax are read array by array, under a stream and under another thread's generate."""
    sizes = dict(**SMALL, max_model_len=128, strict=True, progress=False)
    with LLM("demo-draft", **sizes) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        expected = llm.generate("def f(", params)[0].outputs[0]
        llm.save(tmp_path / "saved")
        stream = llm.stream("def f(", params)
        pieces = [next(stream), next(stream)]
        llm.update_weights(llm.folder)
        pieces += [next(stream), next(stream)]
        llm.update_weights(str(tmp_path / "saved"))
        assert "".join([*pieces, *stream]) == expected.text
        assert set(stream.output.outputs[0].weight_versions) == {0, 1, 2}
        results = []
        thread = threading.Thread(target=lambda: results.append(llm.generate(["def f("] * 8, params)))
        thread.start()
        for _ in range(3):
            llm.update_weights(llm.folder)
        thread.join()
        assert {one.outputs[0].text for one in results[0]} == {expected.text}
        assert llm.weight_version == 5 and llm.engine.programs.compilations.late == 0
