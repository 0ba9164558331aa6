"""Compiled programs in a folder: nothing compiles on them, and what does not suit is named before it is opened."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom import LLM, SamplingParams
from tokenloom.attention.caches.paged import Pages
from tokenloom.model import checkpoint
from tokenloom.model.config import llama_config
from tokenloom.model.layers import Numerics
from tokenloom.serve import compiled
from tokenloom.serve.compile_model import compile_for
from tokenloom.serve.compiled import MANIFEST, Artefact, Compiler, Job, build_tree, describe_tree
from tokenloom.serve.fingerprint import differences, source_digest
from tokenloom.serve.sampling.sampler import Sampled
from tokenloom.tests import tiny

SIZES = dict(max_num_seqs=1, max_num_batched_tokens=32, progress=False)
PROMPTS = ["Once upon a time there was", "A"]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=6, logprobs=1, prompt_logprobs=1),
    SamplingParams(temperature=1.0, seed=3, max_tokens=6, repetition_penalty=1.2),
]
FRESH = """
import warnings
import jax

seen = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **more: seen.append(more) if event.endswith("backend_compile_duration") else None
)
from tokenloom import LLM
from tokenloom.tests.test_compiled import SIZES, tokens

assert len(jax.devices()) == DEVICES
warnings.simplefilter("error")
llm = LLM(MODEL, compiled=FOLDER, strict=True, **SIZES, **MORE)
print(tokens(llm), len(seen))
"""


def tokens(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS)]


def run(devices: int, cache: Path, *command: str) -> str:
    """The last line that a Python process of its own prints, with so many devices and its compilation cache there."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    own = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([sys.executable, *command], env=kept | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def fresh(devices: int, model: Path, folder: Path, cache: Path, **more) -> str:
    """Start on a folder's programs: the tokens, and how often JAX compiled."""
    code = FRESH
    for name, value in dict(DEVICES=devices, MODEL=str(model), FOLDER=str(folder), MORE=more).items():
        code = code.replace(name, repr(value))
    return run(devices, cache, "-c", code)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The tiny model's weights, and a tokenizer, in a folder."""
    folder, config = tmp_path_factory.mktemp("model") / "tiny", llama_config(**tiny.CONFIG)
    params = checkpoint.random_params(config, Numerics(), 0)
    checkpoint.save_orbax(folder, params, config, metadata={}, tokenizer_from=checkpoint.resolve("demo"))
    return folder


@pytest.fixture(scope="module")
def cold(model) -> LLM:
    return LLM(model, **SIZES)


@pytest.fixture(scope="module")
def written(cold, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("programs") / "tiny"
    cold.save_compiled(folder)
    return folder


@pytest.fixture
def copied(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


@pytest.fixture
def unopened(monkeypatch) -> None:
    """Fails where a payload is opened."""

    def opened(*arguments, **more):
        pytest.fail("a payload was opened")

    monkeypatch.setattr(compiled, "deserialize_and_load", opened)


def facts(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())["facts"]


def change(folder: Path, edit) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


# -- it works ----------------------------------------------------------------------------------------------


def test_a_fresh_process_compiles_nothing(cold, model, written, tmp_path):
    """An artefact for one device, in a process of eight."""
    assert fresh(8, model, written, tmp_path) == f"{tokens(cold)} 0"
    assert not list(tmp_path.rglob("*-cache")), "something was compiled and kept"


def test_the_manifest_lists_every_program(cold, written):
    manifest = json.loads((written / MANIFEST).read_text())
    keys = {entry["key"] for entry in manifest["programs"]}
    assert keys == {repr(key) for key in cold.engine.programs.compiled} | {"'state'", "'sampler'"}
    assert {entry["file"] for entry in manifest["programs"]} == {
        path.name for path in written.iterdir() if path.name != MANIFEST
    }
    everything = b"".join(path.read_bytes() for path in written.iterdir())
    weights = [leaf for leaf in jax.tree.leaves(cold.engine.programs.params) if leaf.ndim == 2]
    assert weights and not any(np.asarray(leaf).tobytes()[:64] in everything for leaf in weights)
    assert manifest["facts"]["device"]["count"] == 1 and "code" in manifest["notice"]
    with pytest.raises(ValueError, match="exists already; choose another folder"):
        cold.save_compiled(written)


def test_split_models_start_on_their_programs(model, tmp_path):
    """Weights in bfloat16, whose products are tried out before programs compile, but not on an artefact; pages of 32
    tokens, which both devices share. One device refuses the programs of two by name."""
    folder = tmp_path / "split"
    written = run(
        2, tmp_path / "first", "-m", "tokenloom.serve.cli", "compile", str(model), "-o", str(folder),
        "--max-num-seqs", "1", "--max-num-batched-tokens", "32", "--tensor-parallel-size", "2", "--dtype", "bfloat16",
    )  # fmt: skip
    assert "8 programs" in written and "for 2 x cpu; max_model_len 128, num_pages 5" in written
    shown = fresh(2, model, folder, tmp_path / "second", tensor_parallel_size=2, dtype="bfloat16")
    assert shown.endswith("] 0")
    assert facts(folder)["mesh"] and facts(folder)["device"]["ids"] == [0, 1]
    with pytest.raises(ValueError, match=r"device\.count: the artefact has 2, this process 1"):
        LLM(model, compiled=folder, strict=True, **SIZES)


@pytest.mark.tpu_topology
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed (the dev extra brings it)")
@pytest.mark.parametrize("tensor, texts", [(1, 1), (2, 1), (2, 2)])
def test_programs_of_a_slice_that_is_not_here(tmp_path, tensor, texts):
    """On one device, with weights split, and with texts split too."""
    config = llama_config(
        layers=2, hidden=128, heads=2, kv_heads=2, intermediate=128, vocab=512, max_position=256
    )
    folder = compile_for(
        config,
        "v5e:2x2",
        tmp_path / "tpu",
        max_num_seqs=1,
        max_num_batched_tokens=32 * texts,
        tensor_parallel_size=tensor,
        sequence_parallel_size=texts,
    )
    found = facts(folder)
    assert found["device"]["kind"] == "TPU v5 lite" and found["device"]["count"] == tensor * texts
    assert found["mesh"].get("seq", 1) == texts and found["mesh"].get("tensor", 1) == tensor
    assert found["versions"]["libtpu"] and found["versions"]["jax"] == jax.__version__
    artefact = Artefact.of(folder)
    assert artefact.check(found) == [] and len(artefact.payloads) == len(artefact.programs) == 8
    (first, *_) = artefact.check(found | {"device": {**found["device"], "platform": "cpu"}})
    assert first == 'device.platform: the artefact has "tpu", this process "cpu"'


# -- it does not suit --------------------------------------------------------------------------------------


def test_settings_are_named_before_anything_is_opened(model, written, unopened):
    with pytest.raises(
        ValueError, match=r"engine\.max_num_batched_tokens: the artefact has 32, this process 64"
    ):
        LLM(model, compiled=written, strict=True, **{**SIZES, "max_num_batched_tokens": 64})
    with pytest.raises(
        ValueError, match=r'engine\.kv_cache_dtype: the artefact has "float32", this process "int8"'
    ):
        LLM(model, compiled=written, strict=True, kv_cache_dtype="int8", **SIZES)


@pytest.mark.parametrize(
    "section, name, value",
    [
        ("versions", "jax", "0.0.1"),
        ("versions", "jaxlib", "0.0.1"),
        ("versions", "libtpu", "0.0.1"),
        ("package", "source", "0" * 64),
        ("device", "count", 8),
        ("device", "kind", "TPU v5 lite"),
        ("options", "XLA_FLAGS", "--xla_cpu_max_isa=SSE4_2"),
        ("model", "config", "0" * 64),
        ("engine", "page_size", 4),
        ("mesh", "tensor", 2),
        ("buckets", "chunks", [64]),
        ("arrays", "weights", "0" * 64),
    ],
)
def test_facts_that_differ_are_named(written, copied, unopened, section, name, value):
    change(copied, lambda manifest: manifest["facts"][section].update({name: value}))
    with pytest.raises(ValueError, match=rf"{section}\.{name}: the artefact has .*Start with the settings"):
        Compiler(jax.devices(), lambda: facts(written), copied, strict=True)


def test_a_cpu_needs_the_features_of_the_writer(written):
    theirs, ours = facts(written), facts(written)
    ours["host"]["cpu_features"] = [*ours["host"]["cpu_features"], "of_tomorrow"]
    assert differences(theirs, ours) == []
    theirs["host"]["cpu_features"] = [*theirs["host"]["cpu_features"], "amx_future"]
    assert differences(theirs, ours) == [
        "host.cpu_features: the artefact's CPU has amx_future, this one does not"
    ]
    ours["device"]["platform"] = theirs["device"]["platform"] = "gpu"
    assert differences(theirs, ours) == []


def test_plug_ins_from_elsewhere_are_facts_too():
    assert source_digest([None, Path()]) != source_digest() == source_digest([None, Pages()])
    unknown = type("Mine", (), {"__module__": "elsewhere"})()
    with pytest.raises(ValueError, match="the source of Mine cannot be read"):
        source_digest([unknown])


@pytest.mark.parametrize("harm", ["changed", "truncated", "missing", "outside", "format"])
def test_damage_is_named(written, copied, unopened, harm):
    entry = json.loads((copied / MANIFEST).read_text())["programs"][2]
    path, expected = copied / entry["file"], entry["file"]
    if harm == "changed":
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    elif harm == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "missing":
        path.unlink()
    elif harm == "outside":
        change(copied, lambda manifest: manifest["programs"][2].update(file="../x.bin"))
    else:
        change(copied, lambda manifest: manifest.update(format=99))
    expected = {
        "changed": f"{expected}: the file's sha256 is not the manifest's",
        "truncated": f"{expected}: the file has .* bytes, the manifest says",
        "missing": f"{expected}: the file is missing",
        "outside": "names a file outside the folder",
        "format": "format: the artefact has 99, this process reads 1",
    }[harm]
    with pytest.raises(ValueError, match=expected):
        Compiler(jax.devices(), lambda: facts(written), copied, strict=True)


class Touch:
    """Pickled: leaves a mark where it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("hash_says_so", [False, True])
def test_a_payload_whose_hash_differs_is_never_unpickled(written, copied, tmp_path, hash_says_so):
    """With the hash in the manifest changed as well it is: hashes find damage, not malice."""
    mark, payload = tmp_path / "mark", pickle.dumps(Touch(tmp_path / "mark"))
    job = Job(jax.jit(lambda: jnp.zeros(1)))

    def edit(manifest):
        entry = manifest["programs"][0]
        (copied / entry["file"]).write_bytes(payload)
        entry |= {"bytes": len(payload), "result": "*"}
        entry["sha256"] = sha256(payload).hexdigest() if hash_says_so else entry["sha256"]

    change(copied, edit)
    if hash_says_so:
        compiler = Compiler(jax.devices(), lambda: facts(written), copied, strict=True)
        with pytest.raises(TypeError):
            compiler.compile({"state": job}, False)
    else:
        with pytest.warns(UserWarning, match="sha256 is not the manifest's.*compiling instead"):
            compiler = Compiler(jax.devices(), lambda: facts(written), copied)
        assert compiler.compile({"state": job}, False)["state"]() == 0.0
    assert mark.exists() == hash_says_so


def test_what_does_not_suit_is_compiled_instead(cold, model, copied):
    entry = json.loads((copied / MANIFEST).read_text())["programs"][0]
    (copied / entry["file"]).write_bytes(b"")
    with pytest.warns(
        UserWarning, match="do not suit this engine: .* the file has 0 bytes.*compiling instead"
    ):
        llm = LLM(model, compiled=copied, **SIZES)
    assert tokens(llm) == tokens(cold)
    llm.close()


def test_programs_that_are_missing_or_take_other_arguments_are_named(written):
    spec = jax.ShapeDtypeStruct((3,), jnp.float32)
    compiler = Compiler(jax.devices(), lambda: facts(written), written)
    jobs = {"score": Job(jax.jit(lambda x: x + 1), (spec,)), "other": Job(jax.jit(lambda: 0))}
    with pytest.warns(
        UserWarning, match="'score': it takes other arguments; program 'other': the artefact has none"
    ):
        made = compiler.compile(jobs, False)
    assert made["score"](jnp.ones(3)).tolist() == [2, 2, 2]


def test_folders_without_a_manifest_are_refused(model, copied, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *arguments: pytest.fail("weights were read"))
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(
            ValueError, match=r"has no manifest\.json; write one with `tokenloom compile MODEL"
        ):
            LLM(model, compiled=folder, **SIZES)
    for wrong in (
        "{",
        "[]",
        '{"facts": {}, "programs": []}',
        '{"facts": {"device": {}, "engine": {}}, "programs": [{}]}',
    ):
        (copied / MANIFEST).write_text(wrong)
        with pytest.raises(ValueError, match=r"is not a manifest .*; write one with"):
            Artefact.of(copied)


# -- trees -------------------------------------------------------------------------------------------------


def test_trees_of_results_come_from_those_of_arguments():
    known = [jax.tree.structure(one) for one in ({"a": 1}, Sampled(0, 0, 0))]
    tree = jax.tree.structure((0, (Sampled(1, 2, 3), {"a": 4}), {"a": 5}))
    described = json.loads(json.dumps(describe_tree(tree, known)))
    assert described == ["*", [1, 0], 0] and build_tree(described, known) == tree
    with pytest.raises(ValueError, match="a part that none of its arguments has"):
        describe_tree(jax.tree.structure({"b": 1}), known)
