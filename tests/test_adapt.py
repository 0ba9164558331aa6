"""Training of the embedded models: schedule, data, tokenizer, resuming, export, and the shipped folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenloom.adapt import card, data, export
from tokenloom.adapt import tokenizer as tokenizers
from tokenloom.adapt.evaluate import Evaluator, windows
from tokenloom.adapt.rows import TrainingRows
from tokenloom.adapt.schedule import WarmupStableDecay
from tokenloom.adapt.train import Corpus, Recipe, Trainer, build, losses
from tokenloom.attention.batch import rectangle
from tokenloom.attention.caches.uncached import Uncached
from tokenloom.attention.ops import AttentionSpec
from tokenloom.model.checkpoint import flatten, load, load_config

jitted_losses = jax.jit(losses, static_argnums=0)
MODELS = Path(__file__).resolve().parent.parent / "model"
TINY = Recipe(
    1, 32, 4, 2, 48, steps=6, long_steps=2, decay=3, vocab=300, max_position=64,
    batch=2, length=16, long_batch=1, long_length=32, warmup=2,
)  # fmt: skip
SOURCE = '''def add(left, right):
    """Add two numbers.

    Nothing else.
    """
    return left + right
'''


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([SOURCE * 3, "import json\nclass Reader:\n    pass\n"], 300)


def corpus() -> Corpus:
    rng = np.random.default_rng(1)
    return Corpus(
        rng.integers(0, 300, 2000).astype(np.uint16), rng.integers(0, 300, 200).astype(np.uint16), 3.0
    )


# ---------------------------------------------------------------- schedule


def test_schedule_warms_up_holds_and_decays_to_zero():
    schedule = WarmupStableDecay(0.5, total=20, warmup=4, decay=5)
    rates = np.array([float(schedule(step)) for step in range(21)])
    np.testing.assert_allclose(rates[:4], [0.125, 0.25, 0.375, 0.5])
    np.testing.assert_allclose(rates[4:16], 0.5)
    np.testing.assert_allclose(rates[15:], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], atol=1e-7)


def test_schedules_of_different_totals_agree_until_the_shorter_decays():
    short, long = WarmupStableDecay(1.0, 20, 4, 5), WarmupStableDecay(1.0, 200, 4, 50)
    assert all(float(short(step)) == float(long(step)) for step in range(15))


def test_schedule_refuses_parts_longer_than_the_whole():
    with pytest.raises(ValueError, match="fit the total"):
        WarmupStableDecay(1.0, 8, 4, 5)


# ---------------------------------------------------------------- data


def test_split_is_disjoint_complete_and_independent_of_what_else_is_there():
    documents = [data.Document(f"a/{index}.py", str(index)) for index in range(400)]
    training, held = data.split(documents, 10)
    assert {d.path for d in training}.isdisjoint(d.path for d in held)
    assert len(training) + len(held) == 400 and 20 <= len(held) <= 60
    again_training, again_held = data.split(documents[::-3], 10)
    assert set(again_training) <= set(training) and set(again_held) <= set(held)


def test_collect_is_ordered_and_leaves_out_tests_and_duplicates(tmp_path: Path):
    files = {
        "b.py": b"b = 1\n", "a.py": b"a = 1\n", "copy.py": b"a = 1\n", "empty.py": b" \n",
        "latin.py": b"# \xe9\n", "test/x.py": b"x = 1\n", "encodings/y.py": b"y = 1\n",
        "pkg/test.py": b"z = 1\n", "_sysconfigdata_linux.py": b"w = 1\n", "notes.txt": b"text",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert [document.path for document in data.collect(tmp_path)] == ["a.py", "b.py", "pkg/test.py"]
    with pytest.raises(ValueError, match="no Python source"):
        data.collect(tmp_path / "test" / "missing")


def test_windows_cover_the_stream_once_a_pass_and_differ_between_passes():
    cut = data.Windows(np.arange(1000, dtype=np.uint16), length=16, batch=3, seed=5)
    first = np.concatenate([cut(index) for index in range(cut.per_pass)])
    assert first.shape == (cut.per_pass * 3, 17) and (np.diff(first, axis=1) == 1).all()
    starts = np.sort(first[:, 0])
    assert (np.diff(starts) == 16).all()
    second = np.concatenate([cut(index + cut.per_pass) for index in range(cut.per_pass)])
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(cut(7), data.Windows(cut.tokens, 16, 3, 5)(7))
    with pytest.raises(ValueError, match="too few"):
        data.Windows(np.arange(20), 16, 3, 0)


def test_stream_keeps_every_text_behind_an_end_token(tokenizer: Tokenizer):
    texts = ["def a", "", "b = 1\n"]
    ids = data.stream(tokenizer, texts, seed=3)
    end = tokenizer.token_to_id(tokenizers.END_OF_TEXT)
    parts = [list(part) for part in np.split(ids, np.flatnonzero(ids == end))[1:]]
    assert sorted(tokenizer.decode(part[1:]) for part in parts) == sorted(texts)


def test_instructions_ask_for_a_function_and_answer_with_its_source():
    document = data.Document("x.py", "class A:\n" + "".join(f"    {line}\n" for line in SOURCE.splitlines()))
    (conversation,) = data.instructions([document], every=1)
    asked = "Write a Python function named add. Add two numbers."
    assert conversation.startswith(f"<|user|>{asked}<|end|><|assistant|>def add(left, right):\n    ")
    assert conversation.endswith("    return left + right\n<|end|>")


# ---------------------------------------------------------------- tokenizer


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_tokenizer_gives_any_text_back(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_has_every_byte_and_keeps_special_tokens_first(tokenizer: Tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert [tokenizer.token_to_id(token) for token in tokenizers.SPECIAL] == list(
        range(len(tokenizers.SPECIAL))
    )
    assert len([token for token in tokenizer.get_vocab() if len(token) == 1]) == 256
    with pytest.raises(ValueError, match="at least 262"):
        tokenizers.train(["x"], 261)


@pytest.mark.parametrize("prompt", ["def add(left, right):\n", "class Reader:\n", "return left", "x = 1"])
def test_a_prompt_is_cut_as_the_whole_text_is(tokenizer: Tokenizer, prompt: str):
    whole = tokenizer.encode(prompt + "    return left\n").ids
    ids = tokenizer.encode(prompt).ids
    assert whole[: len(ids)] == ids


def test_chat_template_renders_as_the_training_data_does(tmp_path: Path, tokenizer: Tokenizer):
    import jinja2

    tokenizers.save(tokenizer, tmp_path, 64)
    template = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": "Say {{ a }}."}, {"role": "assistant", "content": "b\n"}]
    compiled = jinja2.Environment().from_string(template)
    assert compiled.render(messages=messages) == tokenizers.render(messages)
    started = compiled.render(messages=messages[:1], add_generation_prompt=True)
    assert started == "<|user|>Say {{ a }}.<|end|><|assistant|>"


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("window, softcap, n", [(None, None, 9), (None, 5.0, 300), (40, None, 300)])
def test_training_rows_equal_their_specification(window: int | None, softcap: float | None, n: int):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2 * n, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    batch, spec = rectangle(jnp.zeros((2, n), jnp.int32)), AttentionSpec(0.3, window, softcap)
    got = TrainingRows().attend(q, k, v, batch, spec)[0]
    np.testing.assert_allclose(got, Uncached().attend(q, k, v, batch, spec)[0], atol=2e-6)


def test_training_rows_refuse_what_they_do_not_do():
    x = jnp.zeros((4, 2, 8))
    with pytest.raises(ValueError, match="Uncached"):
        TrainingRows().attend(
            x, x, x, rectangle(jnp.zeros((1, 4), jnp.int32)), AttentionSpec(1.0, causal=False)
        )


def history(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer.save(str(folder / "tokenizer.json"))
    Trainer(TINY, corpus(), folder).run(save_every=2)
    return folder


def test_resumed_equals_uninterrupted(run: Path, tmp_path: Path):
    # The checkpoint of step 2 lies before the decay, that of step 4 in the middle of it; step 5 begins long rows.
    Trainer(TINY, corpus(), tmp_path).run(save_every=2, stop=3)
    resumed = Trainer(TINY, corpus(), tmp_path, resume=True)
    assert int(resumed.state.step) == 3
    resumed.run(save_every=2)
    assert history(tmp_path) == history(run)
    with pytest.raises(ValueError, match="--resume"):
        Trainer(TINY, corpus(), tmp_path)


def test_lines_after_the_checkpoint_are_forgotten_when_resuming(tmp_path: Path):
    Trainer(TINY, corpus(), tmp_path).run(save_every=2, stop=2)
    with (tmp_path / "history.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "loss": 0.0, "tokens": 1, "seconds": 0.0}) + "\n")
    Trainer(TINY, corpus(), tmp_path, resume=True)
    assert [step for step, _ in history(tmp_path)] == [1, 2]


def test_a_shortened_recipe_keeps_its_ending():
    longer = Recipe(2, 32, 4, 2, 48, steps=100, long_steps=20, decay=30)
    assert (longer.ending_at(90).steps, longer.ending_at(90).decay, longer.ending_at(90).long_steps) == (
        90,
        30,
        20,
    )
    with pytest.raises(ValueError, match="max_position"):
        Recipe(2, 32, 4, 2, 48, steps=9, long_steps=0, decay=3, length=4096)


def test_blocks_begin_as_the_identity():
    graph, params = build(TINY.model, 0)
    first = jitted_losses(graph, params, jnp.asarray([[5, 9, 5, 9, 7]]))[0]
    # With nothing added by the blocks a prediction depends on the current token alone: 5 -> 9 costs the same.
    assert first[0] == pytest.approx(float(first[2]), rel=1e-6) and abs(float(first[1] - first[3])) > 1e-4


# ---------------------------------------------------------------- evaluation and export


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 23])
def test_every_token_is_scored_once(length: int):
    tokens, counted = np.arange(1, length + 1), []
    for window, first, last in windows(tokens, 8):
        counted.extend(window[1:][first:last])
    assert counted == list(range(2, length + 1))


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    out = tmp_path_factory.mktemp("folder")
    params, step = export.restore(run, TINY)
    assert step == TINY.steps
    export.write_folder(export.pure_dict(params), TINY.model, tokenizer, out, "float32")
    return out


def test_export_uses_hugging_face_names_and_shapes(folder: Path):
    with safe_open(folder / "model.safetensors", "np") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    assert len(shapes) == 2 + 9
    assert shapes["model.embed_tokens.weight"] == (300, 32)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (16, 32)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (32, 48)
    assert shapes["model.layers.0.post_attention_layernorm.weight"] == (32,)
    assert "lm_head.weight" not in shapes


def test_exported_folder_loads_and_gives_the_same_loss(run: Path, folder: Path, tokenizer: Tokenizer):
    _, config = load_config(folder)
    params, _ = export.restore(run, TINY)
    graph, _ = build(TINY.model, 1)
    window = jnp.asarray([tokenizer.encode(SOURCE).ids[:33]])
    expected = jitted_losses(graph, export.pure_dict(params), window)
    np.testing.assert_array_equal(jitted_losses(graph, load(folder, config), window), expected)
    assert config.eos_token_ids == (0, tokenizer.token_to_id(tokenizers.END))


def test_score_is_the_sum_of_the_losses_over_the_bytes(folder: Path, tokenizer: Tokenizer):
    _, config = load_config(folder)
    graph, _ = build(config, 1)
    text = "def añd(left):"
    score = Evaluator.from_folder(folder).score(text)
    window = jnp.asarray([[0, *tokenizer.encode(text).ids]])
    bits = float(jitted_losses(graph, load(folder, config), window).sum()) / np.log(2)
    assert score.bytes == len(text) + 1
    assert score.bits_per_byte == pytest.approx(bits / score.bytes, rel=1e-5)


def test_card_states_the_folder_it_describes(run: Path, folder: Path):
    records = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    score = Evaluator.from_folder(folder).score("def a(left): return 1\n")
    card.write(folder, TINY, records, ["python -m x"], [card.Measured("a text", 1, score)], "float32")
    text = (folder / "README.md").read_text()
    assert "    python -m x\n" in text
    assert f"{card.parameter_count(folder):,} parameters" in text and f"{score.bits_per_byte:.3f} |" in text
    expected = sum(int(np.prod(leaf.shape)) for leaf in flatten(build(TINY.model, 0)[1]).values())
    assert card.parameter_count(folder) == expected


# ---------------------------------------------------------------- the shipped folders


@pytest.mark.parametrize("name, most", [("demo", 6_500_000), ("demo_draft", 1_000_000)])
def test_shipped_folder_agrees_with_its_card(name: str, most: int):
    folder = MODELS / name
    count = card.parameter_count(folder)
    text = (folder / "README.md").read_text()
    assert count <= most
    stated = re.search(r"([\d,]+) parameters", text)
    assert stated and int(stated[1].replace(",", "")) == count
    raw, config = load_config(folder)
    assert raw["architectures"] == ["LlamaForCausalLM"] and config.max_position == 2048
    assert config.vocab_size == Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == 4096


def test_shipped_folders_share_one_tokenizer_and_stay_small():
    demo, draft = (MODELS / name / "tokenizer.json" for name in ("demo", "demo_draft"))
    assert demo.read_bytes() == draft.read_bytes()
    files = [file for name in ("demo", "demo_draft") for file in (MODELS / name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 20e6


def test_shipped_model_knows_python():
    # A uniform guess costs 12 bits a token; 1.2 bits a byte is far beyond a model that learned nothing.
    text = (
        'def __repr__(self):\n    return "<%s at %x>" % (self.__class__.__name__, id(self))\n\n\nimport sys\n'
    )
    assert Evaluator.from_folder(MODELS / "demo", 128).score(text).bits_per_byte < 1.2
