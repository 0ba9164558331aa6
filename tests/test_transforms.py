"""Laws of transforms, over all of them, and what each format promises."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenloom import CATS, LLM, Fp8, Int4, Int8, OutlierSuppressionPlus, SkipDecode, UnifiedLayerSkipping
from tokenloom.attention.batch import Shape, make_batch, rectangle
from tokenloom.attention.caches.recurrent import Stateless
from tokenloom.attention.caches.uncached import Uncached
from tokenloom.model import checkpoint
from tokenloom.model.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, QuantConfig
from tokenloom.model.depth import DecayingDepth, ReservedLayers
from tokenloom.model.layers import Numerics
from tokenloom.model.params import flatten
from tokenloom.model.stacked import abstract_stacked, period_of, stack
from tokenloom.model.state import Capacity, make_state
from tokenloom.model.transforms.calibration import windows
from tokenloom.model.transforms.outlier_suppression_plus import can_shift, fold, units
from tokenloom.model.transforms.transform import assemble, from_record, leaves_of, to_record
from tokenloom.model.transforms.unified_layer_skipping import reserved
from tokenloom.tests.engines import greedy, prompts, same_tokens
from tokenloom.tests.shapes import ALL, VOCAB, llama

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (1, 24)), jnp.int32)
TEXTS = prompts(3, 11, 40)
TRANSFORMS = {
    "int8": Int8(),
    "int8-weights": Int8(activations=None),
    "fp8": Fp8(),
    "int4": Int4(group_size=16),
    "os+": OutlierSuppressionPlus(Int4(group_size=16), grid=4, window=16),
    "cats": CATS(0.5),
    "unified": UnifiedLayerSkipping(2),
    "skip-decode": SkipDecode(3, horizon=40),
}
FORMATTED = ("int8", "int8-weights", "fp8", "int4", "os+")
IDENTITIES = {
    "int8": Int8(layers=(), embeddings=False),
    "fp8": Fp8(layers=(), embeddings=False),
    "int4": Int4(layers=(), embeddings=False),
    "os+": OutlierSuppressionPlus(Int8(layers=(), embeddings=False)),
    "cats": CATS(0.0),
    "unified": UnifiedLayerSkipping(1),
    "skip-decode": SkipDecode(6),
}
# Rounding inputs to 8 bits may turn a difference in their last bits into a step.
TOLERANCES = {"int8": 5e-3}
SIZES = dict(
    max_num_seqs=4, max_num_batched_tokens=32, page_size=16, max_model_len=96, strict=True, progress=False
)


LONGEST = 48


def deep() -> ModelConfig:
    """Six layers, so that there is something to skip."""
    config = llama()
    return replace(config, blocks=config.blocks[:1] * 6)


@cache
def original(shape: str):
    """A decoder of random weights."""
    config = deep() if shape == "deep" else ALL[shape]()
    return assemble(config, Numerics(), checkpoint.random_params(config, Numerics(), 1))


@cache
def transformed(name: str, shape: str = "llama"):
    shape = "deep" if name in ("unified", "skip-decode") else shape
    return TRANSFORMS[name](original(shape), TEXTS)


@nnx.jit
def logits(model, tokens=TOKENS) -> jax.Array:
    """[B*S, V] of whole texts, without an engine."""
    states = tuple(
        Uncached() if isinstance(block.mixer, AttentionConfig) else Stateless()
        for block in model.config.blocks
    )
    batch = rectangle(tokens)
    x, _ = model.run(model.embed(batch.tokens, batch), states, batch, range(model.num_layers))
    return model.head(model.normalise(x))


def same_leaves(a, b) -> None:
    one, other = leaves_of(a), leaves_of(b)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(np.asarray(one[path]), np.asarray(other[path]), path)


# -- over all transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IDENTITIES)
def test_settings_that_ask_for_nothing_change_nothing_to_the_bit(name):
    model = original("deep")
    found = IDENTITIES[name](model, TEXTS)
    assert found.config == model.config
    same_leaves(found, model)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_record_names_the_transform(name):
    plain = json.loads(json.dumps(to_record(TRANSFORMS[name])))
    assert from_record(plain) == TRANSFORMS[name]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_saved_and_restored_is_itself(name, tmp_path):
    model = transformed(name)
    checkpoint.save_orbax(tmp_path / "saved", nnx.to_pure_dict(nnx.state(model)), model.config)
    params, config = checkpoint.restore_orbax(tmp_path / "saved", Numerics())
    assert config == model.config
    same_leaves(assemble(config, Numerics(), params), model)


@pytest.mark.parametrize("shape", ("experts", "hybrid"))
@pytest.mark.parametrize("name", ("int8", "int4"))
def test_a_transformed_model_is_near_the_original(name, shape):
    """What is rounded is near what it was (random weights, so int4 is far)."""
    a, b = logits(original(shape)), logits(transformed(name, shape))
    limit = {"int4": 0.5, "fp8": 0.25}.get(name, 0.08)
    assert 0 < float(jnp.abs(a - b).mean()) < limit * float(a.std())


@pytest.mark.parametrize("name", FORMATTED)
def test_a_tampered_code_changes_what_the_model_says(name):
    model = transformed(name)
    before = logits(model)
    for path in ("blocks.1.mixer.v.weight", "blocks.0.channel.down.weight", "lm_head.weight"):
        leaves = leaves_of(model)
        codes = leaves[f"{path}.codes"]
        bits = jax.lax.bitcast_convert_type(codes[3, 2], jnp.uint8) ^ 64
        tampered = codes.at[3, 2].set(jax.lax.bitcast_convert_type(bits, codes.dtype))
        other = assemble(
            model.config, Numerics(), checkpoint.unflatten({**leaves, f"{path}.codes": tampered})
        )
        assert bool((logits(other) != before).any()), path


@pytest.mark.parametrize("name", ("int8", "int4", "cats", "unified", "skip-decode"))
def test_stacked_equals_separate(name):
    model = transformed(name)
    config, period = model.config, period_of(model.config)
    assert period < config.num_layers
    graphdef, specs = abstract_stacked(config, Numerics(), period)
    params = stack(nnx.to_pure_dict(nnx.state(model)), period)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), specs
    )
    batch = make_batch(
        Shape(0, 1, 1, 24), 8, tokens=TOKENS[0], lengths=jnp.array([24]), page_table=jnp.arange(1, 4)[None],
        query_starts=jnp.array([0, 24]), seats=jnp.array([0]),
    )  # fmt: skip
    batch = replace(batch, prompt_lengths=jnp.array([9]))

    def run(model, period):
        state = make_state(config, Capacity(4, 8, 1), period)
        x, _ = model.run(model.embed(batch.tokens, batch), state, batch, range(config.num_layers))
        return model.head(model.normalise(x))

    separate = jax.jit(lambda: run(model, None))()
    stacked = jax.jit(lambda params: run(nnx.merge(graphdef, params), period))(params)
    np.testing.assert_allclose(
        np.asarray(stacked), np.asarray(separate), rtol=0, atol=TOLERANCES.get(name, 2e-5)
    )


@pytest.mark.parametrize("name", FORMATTED)
def test_a_model_is_not_quantised_twice(name):
    with pytest.raises(ValueError, match="begin with the original checkpoint"):
        TRANSFORMS[name](transformed(name), TEXTS)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"names the layers \[7\], but the model has 2"):
        Int8(layers=(0, 7))(original("llama"))
    with pytest.raises(ValueError, match="groups of 48 do not divide a weight's 64 inputs"):
        Int4(group_size=48)(original("llama"))
    with pytest.raises(ValueError, match="need int8 weights, not fp8"):
        QuantConfig("fp8", activations="int8")
    with pytest.raises(ValueError, match="no name of a file"):
        from_record({"file": "../int8", "class": "Int8"})
    with pytest.raises(ValueError, match="update"):
        from_record({"file": "int8", "class": "Int9"})
    with pytest.raises(ValueError, match="not drawn"):
        LLM.from_config(transformed("int8").config, progress=False)


# -- Outlier Suppression+ ----------------------------------------------------------------------------------


def normed(config: ModelConfig) -> ModelConfig:
    """The same with LayerNorm and biases everywhere, so that channels can be shifted."""
    block = config.blocks[0]
    norm = NormConfig("layer", 1e-5, bias=True)
    mixer = replace(block.mixer, qkv_bias=True)
    return replace(
        config, blocks=(replace(block, norm=norm, mixer=mixer, channel=MLPConfig(96, "gelu", False, True)),)
    )


@pytest.mark.parametrize("shape", ("llama", "windowed", "experts", "recurrent", "layer-norm"))
def test_folded_factors_leave_the_function_as_it_was(shape):
    """Before anything is rounded, and for offsets in norms, mixtures, tied heads and biases."""
    config = normed(llama()) if shape == "layer-norm" else ALL[shape]()
    model = assemble(config, Numerics(), checkpoint.random_params(config, Numerics(), 2))
    leaves, draw, shifted = leaves_of(model), np.random.default_rng(0), 0
    for index, block in enumerate(config.blocks):
        start = f"blocks.{index}."
        held = {path.removeprefix(start): leaf for path, leaf in leaves.items() if path.startswith(start)}
        for unit in units(block):
            width = held[unit.readers[0]].shape[-1]
            scale = jnp.asarray(draw.uniform(1, 3, width), jnp.float32)
            shift = jnp.asarray(draw.standard_normal(width), jnp.float32)
            allowed = can_shift(unit, held)
            shifted += allowed
            held = fold(held, unit, scale, shift if allowed else jnp.zeros_like(shift))
        leaves |= {f"{start}{path}": leaf for path, leaf in held.items()}
    assert shifted == (2 if shape == "layer-norm" else 0)
    other = assemble(config, Numerics(), checkpoint.unflatten(leaves))
    np.testing.assert_allclose(np.asarray(logits(other)), np.asarray(logits(model)), rtol=2e-4, atol=2e-4)


def test_outliers_are_suppressed():
    """A channel a hundred times larger than the others ruins rounded inputs, and less so with its factor."""
    model = original("llama")
    leaves = leaves_of(model)
    for norm in ("blocks.0.norms.0.weight", "blocks.1.norms.0.weight", "blocks.1.norms.1.weight"):
        leaves[norm] = leaves[norm].at[5].set(100.0)
    outlying = assemble(model.config, Numerics(), checkpoint.unflatten(leaves))
    exact = logits(outlying)
    plain = Int8()(outlying)
    better = OutlierSuppressionPlus(Int8(), grid=12, window=32)(outlying, TEXTS)
    a, b = (float(jnp.square(logits(one) - exact).mean()) for one in (plain, better))
    assert b < 0.7 * a
    with pytest.raises(ValueError, match="looks at texts, but got none"):
        OutlierSuppressionPlus(Int8())(model)


# -- CATS --------------------------------------------------------------------------------------------------


def test_thresholds_cut_the_share_that_was_asked_for():
    model, found = original("llama"), transformed("cats")
    leaves = leaves_of(found)
    tokens = windows(TEXTS, 192, "CATS")
    cut = leaves["blocks.0.channel.threshold"]
    open_gates = {**leaves, **{path: jnp.array([-1.0]) for path in leaves if path.endswith("threshold")}}
    same = assemble(found.config, Numerics(), checkpoint.unflatten(open_gates))
    np.testing.assert_array_equal(np.asarray(logits(same)), np.asarray(logits(model)))
    gates = found.blocks[0].channel.gates(_channel_input(model, tokens))
    assert abs(float((gates == 0).mean()) - 0.5) < 0.01
    assert bool((jnp.abs(gates[gates != 0]) > cut).all())
    with pytest.raises(ValueError, match="gated MLPs, but mamba2 has none"):
        CATS(0.5)(original("recurrent"), TEXTS)


def _channel_input(model, tokens):
    batch = rectangle(tokens)
    block = model.blocks[0]
    x, _ = block.mixed(model.embed(batch.tokens, batch), batch, Uncached())
    return block.channel_norm(x)


# -- layers that are skipped -------------------------------------------------------------------------------


def test_reserved_layers_are_those_of_the_authors():
    assert reserved(30, 2) == (*range(0, 28, 2), 29)
    assert reserved(30, 3) == (*range(0, 27, 3), 29)
    assert reserved(30, 5) == (0, 6, 12, 18, 24, 29) and reserved(30, 10) == (0, 15, 29)
    with pytest.raises(ValueError, match="leaves 2 of 6 layers"):
        reserved(6, 3)


def test_depth_never_grows_along_a_text():
    """So keys and values are there wherever a layer runs (drawn schedules)."""
    draw, positions = np.random.default_rng(0), jnp.arange(64)
    for _ in range(20):
        warmup, smallest, largest = sorted(draw.choice(np.arange(0, 12), 3, replace=False).tolist())
        depth = DecayingDepth(warmup, largest, smallest, int(draw.integers(1, 64)))
        active = np.stack([depth.active(layer, 12, positions, jnp.full(64, 10)) for layer in range(12)])
        assert (np.diff(active.astype(int), axis=1) <= 0).all()
        assert (active.sum(0)[:10] == largest).all() and active.sum(0).min() >= smallest


@pytest.mark.parametrize("name", ("unified", "skip-decode"))
def test_an_engine_that_skips_equals_one_pass_with_masks(name):
    """Decoding step by step, alone and in company, with preemption: each token's layers follow from its place."""
    sizes = {**SIZES, "page_size": 8, "num_pages": 8, "max_num_seqs": 2, "max_model_len": LONGEST}
    with LLM.from_config(deep(), 1, transforms=[TRANSFORMS[name]], **sizes) as engine:
        assert not engine.engine.pages.sharing
        for output in engine.generate(prompts(3, 5, 24), greedy(16)):
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            expected = masked(transformed(name), ids, len(output.prompt_token_ids))
            for at, (token, entry) in enumerate(
                zip(output.outputs[0].token_ids, output.outputs[0].logprobs), len(output.prompt_token_ids) - 1
            ):
                assert abs(entry[token].logprob - expected[at, token]) < 1e-4
                assert expected[at].max() - expected[at, token] < 2e-4
    with pytest.raises(ValueError, match="prefix_cache=True cannot hold"):
        LLM.from_config(deep(), 1, transforms=[TRANSFORMS[name]], prefix_cache=True, **SIZES)


def masked(model, ids: list[int], prompt: int) -> np.ndarray:
    """Log-probabilities [len(ids), V] of one pass where each token passes by the layers that it skips; what it skipped
    holds no keys for others."""
    depth, positions = model.config.depth, np.arange(LONGEST)
    active = np.stack(
        [depth.active(layer, model.num_layers, positions, np.full(LONGEST, prompt)) for layer in range(6)]
    )
    for runs in active:
        # A token that is active sees the active ones before it; both schedules make them all that it may see.
        assert runs[: int(np.flatnonzero(runs).max()) + 1].all() or isinstance(depth, ReservedLayers)
    padded = np.zeros(LONGEST, np.int32)
    padded[: len(ids)] = ids
    return np.asarray(_masked(model, jnp.asarray(padded), jnp.asarray(active)))[: len(ids)]


@nnx.jit
def _masked(model, ids: jax.Array, active: jax.Array) -> jax.Array:
    x, batch = model.embedding(ids), rectangle(ids[None])
    for block, runs in zip(model.blocks, active, strict=True):
        x = jnp.where(runs[:, None], block(x, batch, Uncached())[0], x)
    return jax.nn.log_softmax(model.head(model.normalise(x)), -1)


# -- whole engines -----------------------------------------------------------------------------------------


@cache
def llm(name: str) -> LLM:
    return LLM.from_config(llama(), 1, transforms=[TRANSFORMS[name]], calibration=TEXTS, **SIZES)


@pytest.mark.parametrize("name", ("int8-weights", "int4"))
def test_batch_equals_alone(name):
    engine, drawn = llm(name), prompts(5, 3, 60)
    together = engine.generate(drawn, greedy(12))
    for prompt, output in zip(drawn, together):
        same_tokens(engine.generate([prompt], greedy(12))[0], output)


def test_rounded_inputs_in_a_batch_equal_alone_but_for_near_ties():
    """Rounding x to 8 bits turns a difference in its last bits into a whole step where x lies between two codes, so
    the tolerance here is a step's worth of log-probability, not float32's."""
    engine, drawn = llm("int8"), prompts(5, 3, 60)
    together = engine.generate(drawn, greedy(12))
    for prompt, output in zip(drawn, together):
        alone = engine.generate([prompt], greedy(12))[0].outputs[0]
        for a, b in zip(alone.logprobs, output.outputs[0].logprobs):
            best = sorted((entry.logprob for entry in a.values()), reverse=True)
            if next(iter(a)) != next(iter(b)) and best[0] - best[1] < 0.05:
                break
            assert abs(best[0] - max(entry.logprob for entry in b.values())) < 0.05


@pytest.mark.parametrize("name", ("int8", "int4"))
def test_an_engine_opens_what_it_saved_and_takes_new_weights(name, tmp_path):
    engine, drawn = llm(name), prompts(2, 4, 30)
    before = engine.generate(drawn, greedy(8))
    engine.save(tmp_path / "saved")
    with LLM(tmp_path / "saved", skip_tokenizer_init=True, **SIZES) as again:
        assert again.transforms == engine.transforms
        for a, b in zip(before, again.generate(drawn, greedy(8))):
            assert a.outputs[0].token_ids == b.outputs[0].token_ids
        others = assemble(llama(), Numerics(), checkpoint.random_params(llama(), Numerics(), 7))
        again.update_weights(others)
        fresh = TRANSFORMS[name](others)
        held = flatten(again.engine.programs.params)
        for path, leaf in leaves_of(fresh).items():
            np.testing.assert_array_equal(np.asarray(held[path]), np.asarray(leaf), path)
        with pytest.raises(ValueError, match="do not fit the running model"):
            again.update_weights({"embedding": {"weight": jnp.zeros((3, 3))}})
        again.update_weights(tmp_path / "saved")
        for a, b in zip(before, again.generate(drawn, greedy(8))):
            assert a.outputs[0].token_ids == b.outputs[0].token_ids


def test_experts_are_rounded_and_routers_are_not():
    leaves = leaves_of(transformed("int8", "experts"))
    assert leaves["blocks.0.channel.gate.codes"].dtype == jnp.int8
    assert "blocks.0.channel.router.weight" in leaves
