"""Checkpoints: what is stored is what is loaded, on any placement; what cannot be right is refused by name."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tokenloom.model import checkpoint, hub, orbax
from tokenloom.model.config import llama_config
from tokenloom.model.decoder import Decoder
from tokenloom.model.families import find, supported
from tokenloom.model.families.common import Source
from tokenloom.model.layers import Numerics
from tokenloom.model.stored import INDEX, SINGLE, open_checkpoint
from tokenloom.tests import families
from tokenloom.tests.devices import run_on

RAW = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def stored_tensors(raw: dict, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random tensors under the names that the config's family stores, from the parameters' own shapes."""
    config = checkpoint.read_config(raw)
    specs = checkpoint.flatten(checkpoint.abstract(config)[1])
    rng, found = np.random.default_rng(0), {}
    for path, entry in find(config.model_type).weights(config).items():
        assert isinstance(entry, Source) and entry.part is None
        found[entry.name] = rng.standard_normal(specs[path].shape).astype(dtype)
    return found


def write(folder: Path, tensors: dict[str, np.ndarray], raw: dict = RAW, shards: int = 1) -> Path:
    """A checkpoint folder of one file, or of several with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, folder / SINGLE)
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load(folder: Path, dtype: str = "float32") -> dict[str, jax.Array]:
    config = checkpoint.load_config(folder)[1]
    numerics = Numerics(jnp.dtype(dtype), jnp.dtype("float32"))
    return checkpoint.flatten(checkpoint.load(folder, config, numerics))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_what_is_stored_is_what_is_loaded(tmp_path, shards, stored, wanted):
    tensors = stored_tensors(RAW, jnp.dtype(stored))
    got = load(write(tmp_path, tensors, shards=shards), wanted)
    weights = find("llama").weights(checkpoint.read_config(RAW))
    assert got.keys() == weights.keys()
    for path, entry in weights.items():
        assert got[path].dtype == wanted
        np.testing.assert_array_equal(np.asarray(got[path]), tensors[entry.name].astype(jnp.dtype(wanted)))


def test_params_merge_into_the_decoder(tmp_path):
    config = checkpoint.load_config(write(tmp_path, stored_tensors(RAW)))[1]
    graphdef, specs = checkpoint.abstract(config)
    params = checkpoint.load(tmp_path, config)
    assert jax.tree.structure(specs) == jax.tree.structure(params)
    assert isinstance(nnx.merge(graphdef, params), Decoder)
    assert jax.tree.structure(checkpoint.unflatten(checkpoint.flatten(params))) == jax.tree.structure(params)


def test_fused_tensors_are_cut(tmp_path):
    """Phi-3 stores q, k and v as one tensor, gate and up as another."""
    raw = RAW | {"model_type": "phi3"}
    config = checkpoint.read_config(raw)
    plain = stored_tensors(RAW)
    fused = {n: t for n, t in plain.items() if not re.search(r"\.(q|k|v|gate|up)_proj", n)}
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        parts = [plain[f"{attention}{n}_proj.weight"] for n in "qkv"]
        fused[f"{attention}qkv_proj.weight"] = np.concatenate(parts)
        parts = [plain[f"{mlp}{n}_proj.weight"] for n in ("gate", "up")]
        fused[f"{mlp}gate_up_proj.weight"] = np.concatenate(parts)
    got = checkpoint.flatten(checkpoint.load(write(tmp_path, fused, raw), config))
    for path, entry in find("llama").weights(checkpoint.read_config(RAW)).items():
        np.testing.assert_array_equal(np.asarray(got[path]), plain[entry.name])


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    raw = RAW | {"tie_word_embeddings": True}
    tensors = stored_tensors(raw)
    assert "lm_head.weight" not in tensors
    write(tmp_path, tensors, raw)
    alone = load(tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    write(tmp_path, tensors | {"lm_head.weight": embedding}, raw)
    assert load(tmp_path).keys() == alone.keys()
    write(tmp_path, tensors | {"lm_head.weight": embedding + 1}, raw)
    with pytest.raises(ValueError, match=r"lm_head\.weight .* differs from model\.embed_tokens\.weight"):
        load(tmp_path)


def test_known_buffers_are_ignored(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    assert load(write(tmp_path, stored_tensors(RAW) | extra))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_gemma3_layouts_without_the_vision_tower(tmp_path, prefix):
    text = RAW | {"head_dim": 6, "sliding_window": 8, "tie_word_embeddings": True}
    plain = stored_tensors(text | {"model_type": "gemma3_text"})
    tensors = {prefix + name.removeprefix("model."): tensor for name, tensor in plain.items()}
    vision = prefix.removesuffix("language_model.") if prefix.startswith("model.") else ""
    tensors[vision + "vision_tower.patch.weight"] = np.ones(3, np.float32)
    tensors[vision + "multi_modal_projector.norm.weight"] = np.ones(3, np.float32)
    got = load(write(tmp_path, tensors, {"model_type": "gemma3", "text_config": text}))
    np.testing.assert_array_equal(got["embedding.weight"], plain["model.embed_tokens.weight"])


# ---------------------------------------------------------------- refusals


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (without(Q), rf"missing tensors: {Q}; fetch"),
        (lambda t: t | {"model.extra": t[Q]}, r"unexpected tensors: model\.extra; fetch"),
        (lambda t: t | {Q: t[Q][:, :-1]}, rf"{SINGLE}: tensor {Q} gives .*\(24, 23\), but .* \(24, 24\)"),
        (lambda t: {n: v for n, v in t.items() if "layers.1." not in n}, "count 1 layers, the config 2"),
        (lambda t: t | {n.replace("s.1.", "s.2."): v for n, v in t.items()}, "count 3 layers, the config 2"),
        (lambda t: t | {Q: t[Q].astype(np.int8)}, rf"tensor {Q} is stored as I8; .*quantise it with a transform"),
        (lambda t: t | {n: t[n][:30] for n in t if "embed" in n}, r"\(30, 24\), .*\(40, 24\) \(vocab_size = 40"),
    ],
)  # fmt: skip
def test_tensors_that_disagree_with_the_config_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, change(stored_tensors(RAW))))


def cut(data: bytes) -> bytes:
    return data[:-100]


@pytest.mark.parametrize(
    "break_it, message",
    [
        (cut, r"has \d+ bytes, tensor .* ends at byte \d+ \(a download that broke off\?\); fetch"),
        (lambda data: data[:20], "its header alone needs"),
        (lambda data: b"", "its header alone needs"),
        (lambda data: data[:8] + b"x" + data[9:], "its header is not JSON"),
        (lambda data: data.replace(b"[24,24]", b"[24,25]"), "of shape .24, 25. and dtype F32 has 2304 bytes"),
        (lambda data: data.replace(b'"dtype"', b'"dtyqe"'), "its header is malformed"),
    ],
)  # fmt: skip
def test_broken_files_are_refused(tmp_path, break_it, message):
    file = write(tmp_path, stored_tensors(RAW)) / SINGLE
    file.write_bytes(break_it(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{SINGLE} is not a whole safetensors file: .*{message}"):
        load(tmp_path)


def test_an_index_that_lies_is_refused(tmp_path):
    write(tmp_path, stored_tensors(RAW), shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    second = index["weight_map"][Q]
    (first,) = {*index["weight_map"].values()} - {second}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {Q: first}}))
    with pytest.raises(ValueError, match=rf"says that {first} holds {Q}, but it does not"):
        open_checkpoint(tmp_path).view(Q)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {Q: "../" + first}}))
    with pytest.raises(ValueError, match="names the shard"):
        open_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / second).unlink()
    with pytest.raises(ValueError, match=f"names the shard '{second}', which is not in"):
        open_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list, but an object is needed"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "files, message",
    [
        (["pytorch_model.bin"], r"only pickled weights \(pytorch_model\.bin\).*never read"),
        (["model.gguf"], "only GGUF files"),
        (["adapter_model.safetensors"], "but adapter_model.safetensors; rename"),
        ([], "it holds no files. Fetch"),
    ],
)
def test_folders_without_weights_are_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        open_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"config\.json is missing"),
        ("{", r"config\.json is not valid JSON \(.*line 1 column 2"),
        ("3", "holds a JSON int, but an object is needed"),
        ("{}", "model_type None is not supported; supported: .*llama"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "'gptq': quantised"),
        (
            '{"model_type": "gemma3", "text_config": {"quantization_config": {"bits": 4}}}',
            "quantised checkpoints",
        ),
        ('{"model_type": "llama"}', r"config\.json: .* gives num_attention_heads = None"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_config(tmp_path)


def test_a_gguf_folder_says_so(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="holds GGUF files"):
        checkpoint.load_config(tmp_path)


# ---------------------------------------------------------------- memory and devices

MEASURE = """
import sys, threading, time
import jax, numpy as np
from safetensors.numpy import load_file
from tokenloom.model import checkpoint

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

folder, way = sys.argv[1:]
config = checkpoint.load_config(folder)[1]
checkpoint.load(sys.argv[1] + "/warm", checkpoint.load_config(folder + "/warm")[1])
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
if way == "ours":
    params = checkpoint.load(folder, config)
else:
    stored = load_file(folder + "/model.safetensors")
    params = {name: jax.device_put(tensor.astype(np.float32)) for name, tensor in stored.items()}
jax.block_until_ready(params)
done = True
thread.join()
print(peak - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""
BIG = RAW | {"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
LARGEST = 1024 * 4096 * 2


def write_hollow(folder: Path, raw: dict) -> int:
    """A bfloat16 checkpoint of zeros that takes no room on the disk (a sparse file); returns its bytes."""
    config = checkpoint.read_config(raw)
    specs = checkpoint.flatten(checkpoint.abstract(config)[1])
    header, at = {}, 0
    for path, entry in find("llama").weights(config).items():
        assert isinstance(entry, Source)
        shape, size = list(specs[path].shape), 2 * specs[path].size
        header[entry.name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(raw))
    with (folder / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return at


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_loading_needs_no_more_than_a_tensor_beside_the_arrays(tmp_path):
    """138 MB of bfloat16 become 276 MB of float32 in place: next to nothing else is held. A reader that takes
    the file in first (the control) holds it all."""
    (tmp_path / "warm").mkdir()
    write_hollow(tmp_path / "warm", RAW)
    total = write_hollow(tmp_path, BIG)

    def beside(way: str) -> int:
        command = [sys.executable, "-c", MEASURE, str(tmp_path), way]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert beside("ours") < LARGEST + 60e6
    assert beside("whole file") > 0.9 * total > LARGEST + 100e6


def test_the_cpu_takes_aligned_buffers_over(tmp_path):
    """What the memory test relies on, seen directly."""
    for dtype in ("float32", "bfloat16"):
        buffer = checkpoint.aligned((100, 100), np.dtype(dtype))
        buffer[:] = 1
        array = jax.device_put(buffer, may_alias=True)
        if jax.default_backend() == "cpu":
            assert array.unsafe_buffer_pointer() == buffer.ctypes.data


SHARDED = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
from tokenloom.model import checkpoint

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
config = checkpoint.load_config(folder)[1]
plain = checkpoint.load(folder, config)
mesh = jax.make_mesh((4, 2), ("x", "y"))

def place(path):
    if path.endswith("norm.weight") or "norms" in path:
        return NamedSharding(mesh, P())
    return NamedSharding(mesh, P("x", "y"))

def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)

sharded = checkpoint.load(folder, config, sharding=place)
same(plain, sharded)
weight = sharded["blocks"][0]["channel"]["up"]["weight"]
assert weight.sharding == place("up.weight") and weight.addressable_shards[0].data.shape == (9, 12)
tree = checkpoint.unflatten({path: place(path) for path in checkpoint.flatten(plain)})
same(plain, checkpoint.load(folder, config, sharding=tree))

checkpoint.save_orbax(out, sharded, config, metadata={"transforms": ["none"]})
back, read = checkpoint.restore_orbax(out, sharding=place)
same(plain, back)
assert read == config and checkpoint.load_config(out) == ({"transforms": ["none"]}, config)
assert back["blocks"][1]["mixer"]["q"]["weight"].sharding == place("q.weight")
same(plain, checkpoint.restore_orbax(out)[0])
print(len(jax.devices()), "devices")
"""


def test_on_eight_devices_loading_and_orbax_keep_every_number(tmp_path):
    write(tmp_path / "stored", stored_tensors(RAW))
    printed = run_on(8, "-c", SHARDED, str(tmp_path / "stored"), str(tmp_path / "orbax"))
    assert printed == "8 devices\n"


def test_only_the_shards_asked_for_are_read(tmp_path, monkeypatch):
    """A sharding over one of two halves: the other half's bytes are never copied."""
    view = np.arange(48, dtype=np.float32).reshape(8, 6)
    index = (slice(0, 4), slice(None))
    copied = []
    monkeypatch.setattr(
        np, "copyto", lambda out, part, casting: copied.append(part.size) or out.__setitem__(..., part)
    )
    got = checkpoint._read(view, np.dtype("float32"), index)
    np.testing.assert_array_equal(got, view[:4])
    stacked = checkpoint._read([view, view + 1, view + 2], np.dtype("float32"), (slice(1, 3), slice(0, 2)))
    np.testing.assert_array_equal(stacked, np.stack([view + 1, view + 2])[:, :2])
    assert copied == [24, 12, 12]


def test_shardings_must_be_complete(tmp_path):
    config = checkpoint.load_config(write(tmp_path, stored_tensors(RAW)))[1]
    with pytest.raises(ValueError, match=r"the shardings lack blocks\.0\."):
        checkpoint.load(tmp_path, config, sharding={"embedding": {"weight": None}})


# ---------------------------------------------------------------- Orbax


def test_orbax_folder_is_self_contained(tmp_path):
    """`load_config` and `load` read it like any checkpoint, in the dtype asked for; tokenizer files come along."""
    source = write(tmp_path / "stored", stored_tensors(RAW))
    (source / "tokenizer.json").write_text("{}")
    config = checkpoint.load_config(source)[1]
    params = checkpoint.load(source, config)
    checkpoint.save_orbax(tmp_path / "orbax", params, config, tokenizer_from=source)
    assert (tmp_path / "orbax" / "tokenizer.json").read_text() == "{}"
    read = checkpoint.load_config(tmp_path / "orbax")[1]
    assert read == config and hash(read) == hash(config)
    half = Numerics(jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))
    got = checkpoint.load(tmp_path / "orbax", read, half)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b.astype(jnp.bfloat16)))
    with pytest.raises(ValueError, match="exists; give a new folder"):
        checkpoint.save_orbax(tmp_path / "orbax", params, config)
    with pytest.raises(ValueError, match=r"is no folder written by save_orbax"):
        checkpoint.restore_orbax(source)


def test_orbax_refuses_a_config_of_another_model(tmp_path):
    config = checkpoint.read_config(RAW)
    checkpoint.save_orbax(tmp_path / "a", checkpoint.random_params(config), config)
    record = json.loads((tmp_path / "a" / orbax.RECORD).read_text())
    record["config"]["vocab_size"] = 41
    (tmp_path / "a" / orbax.RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"disagree about embedding\.weight, lm_head\.weight"):
        checkpoint.restore_orbax(tmp_path / "a")
    record["config"]["flavour"] = "new"
    (tmp_path / "a" / orbax.RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="ModelConfig has no flavour"):
        checkpoint.load_config(tmp_path / "a")


@pytest.mark.parametrize("model_type", supported())
def test_every_config_survives_json(model_type):
    for seed in range(8):
        raw = {"model_type": model_type, **families.family_draws(model_type).draw(random.Random(seed))}
        config = checkpoint.read_config(raw)
        assert orbax.from_plain(json.loads(json.dumps(orbax.to_plain(config)))) == config


# ---------------------------------------------------------------- random weights, names, generation settings


def test_random_params_fit_and_follow_the_seed():
    config = llama_config(layers=3, hidden=64, heads=4, kv_heads=2, intermediate=96, vocab=128)
    numerics = Numerics(jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))
    specs = checkpoint.abstract(config, numerics)[1]
    params = checkpoint.random_params(config, numerics, 1)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), specs
    )
    flat, again = (
        checkpoint.flatten(params),
        checkpoint.flatten(checkpoint.random_params(config, numerics, 1)),
    )
    other = checkpoint.flatten(checkpoint.random_params(config, numerics, 2))
    random_ones = [path for path in flat if "norm" not in path]
    for path in random_ones:
        assert (flat[path] == again[path]).all() and (flat[path] != other[path]).any()
    first, second = (flat[f"blocks.{index}.mixer.q.weight"] for index in (0, 1))
    assert (first != second).any()
    assert abs(float(first.astype("float32").std()) * 8 - 1) < 0.1


def test_abstract_makes_no_arrays():
    """A 70B model's specs, on any machine."""
    config = llama_config(layers=80, hidden=8192, heads=64, kv_heads=8, intermediate=28672, vocab=128256)
    leaves = jax.tree.leaves(checkpoint.abstract(config)[1])
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == 70_553_706_496


def test_resolve_finds_folders_and_packaged_models(tmp_path, monkeypatch):
    assert hub.resolve(tmp_path) == tmp_path and hub.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        hub.resolve(tmp_path / "file")
    for wrong in ("no such thing", tmp_path / "absent", "a/b/c", "../a"):
        with pytest.raises(ValueError, match=r"there is no folder .* 'org/name', or .* demo, demo-draft"):
            hub.resolve(wrong)
    monkeypatch.setattr(hub.resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="the packaged model 'demo-draft' is not in"):
        hub.resolve("demo-draft")
    (tmp_path / "demo_draft").mkdir()
    assert hub.resolve("demo-draft") == tmp_path / "demo_draft"


def test_hub_names_are_fetched_or_refused(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(name, **patterns):
        asked.update(patterns, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert hub.resolve("org/name-1.5B") == tmp_path
    assert asked["name"] == "org/name-1.5B" and "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["allow_patterns"])

    def offline(name, **patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        ValueError, match=r"'org/name' is no local folder, .* failed .*no connection.*give its folder"
    ):
        hub.resolve("org/name")


@pytest.mark.parametrize("given, ids", [("2", (2,)), ("[2, 7]", (2, 7)), ("null", ())])
def test_generation_config(tmp_path, given, ids):
    assert checkpoint.load_generation_config(tmp_path) == {}
    text = f'{{"eos_token_id": {given}, "temperature": 0.6, "top_k": null, "transformers_version": "4.50.0"}}'
    (tmp_path / "generation_config.json").write_text(text)
    assert checkpoint.load_generation_config(tmp_path) == {"eos_token_ids": ids, "temperature": 0.6}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id"):
        checkpoint.load_generation_config(tmp_path)
