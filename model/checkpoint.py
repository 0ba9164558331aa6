"""Checkpoints: a folder's config and its weights, tensor by tensor straight onto their devices.

    raw, config = load_config(folder)
    params = load(folder, config, numerics, sharding)
    graphdef, specs = abstract(config, numerics)
    decoder = nnx.merge(graphdef, params)

Params are a pure dict (nested, layers numbered by ints). A weight is converted into an aligned buffer of its
final dtype, which the CPU back end takes over without a copy; elsewhere the buffer lives until its transfer ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from .config import BlockConfig, ModelConfig
from .decoder import Block, Decoder
from .families import find
from .families.common import Either, Source, Stack, token_ids
from .layers import Numerics
from .stored import Reader, open_checkpoint, read_json

Shardings = Callable[[str], jax.sharding.Sharding] | Mapping[Any, Any] | jax.sharding.Sharding | None
"""One sharding for all, a pytree like the params, or a function of the dotted path."""

BUFFERS = (
    r".*rotary_emb\.inv_freq",
    r".*\.(attn|attention)\.(bias|masked_bias)",
)
SHOWN = 4


def load_config(folder: str | Path) -> tuple[dict, ModelConfig]:
    """The raw `config.json` of a folder and what its family makes of it."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        if folder.is_dir() and any(folder.glob("*.gguf")):
            raise ValueError(
                f"{folder} holds GGUF files, which are not read; fetch the safetensors checkpoint they came from"
            )
        raise ValueError(f"{path} is missing; a checkpoint's folder needs it beside the weights: fetch it")
    raw = read_json(path)
    for place in (raw, raw.get("text_config")):
        if isinstance(place, dict) and place.get("quantization_config"):
            method = place["quantization_config"]
            method = method.get("quant_method", method) if isinstance(method, dict) else method
            raise ValueError(
                f"{path} has a quantization_config ({method!r}): quantised checkpoints are not read. Load the "
                "unquantised checkpoint and quantise it with a transform."
            )
    try:
        return raw, find(raw.get("model_type")).config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_generation_config(folder: str | Path) -> dict:
    """What `generation_config.json` says about sampling; {} without the file.

    `eos_token_ids` is always a tuple; the rest keeps its name and is there only when the file gives it.
    """
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return {}
    raw = read_json(path)
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
    found = {name: raw[name] for name in names if raw.get(name) is not None}
    try:
        return {"eos_token_ids": token_ids(raw.get("eos_token_id")), **found}
    except ValueError as error:
        raise ValueError(f"{path}: eos_token_id: {error}") from error


# ---------------------------------------------------------------- trees of parameters


def flatten(params: Mapping[Any, Any]) -> dict[str, Any]:
    """A nested dict of parameters -> {dotted path: leaf}."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict:
    """The inverse of `flatten`: parts of a path that are digits become int keys."""
    tree: dict = {}
    for path, leaf in leaves.items():
        keys = [int(key) if key.isdigit() else key for key in path.split(".")]
        place = tree
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = leaf
    return tree


def abstract(config: ModelConfig, numerics: Numerics = Numerics()) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, params as ShapeDtypeStructs): what `nnx.merge` and planning need, without arrays."""
    decoder = nnx.eval_shape(lambda: Decoder(config, numerics=numerics, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(decoder)
    return graphdef, nnx.to_pure_dict(state)


def shardings_of(shardings: Shardings, paths: Iterable[str]) -> dict[str, jax.sharding.Sharding | None]:
    """The sharding of each path; None is the default device."""
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(paths, shardings)
    if isinstance(shardings, Mapping):
        given = flatten(shardings)
        absent = [path for path in paths if path not in given]
        if absent:
            raise ValueError(f"the shardings lack {_some(absent)}; give one sharding for each parameter")
        return {path: given[path] for path in paths}
    return {path: shardings(path) for path in paths}


# ---------------------------------------------------------------- reading


def load(
    folder: str | Path, config: ModelConfig, numerics: Numerics = Numerics(), sharding: Shardings = None
) -> dict:
    """The folder's weights as params of `Decoder(config, numerics)`, in its dtypes, on their devices.

    Of a sharded parameter only the addressable shards are read. ValueError (file, tensor, both shapes, remedy)
    for tensors that are missing, unexpected or misshapen, and for files that are not whole.
    """
    folder = Path(folder)
    reader = open_checkpoint(folder)
    specs = flatten(abstract(config, numerics)[1])
    views = _match(reader, config, specs)
    places = shardings_of(sharding, specs)
    arrays = {}
    for path, spec in specs.items():
        arrays[path] = _place(views[path], spec, places[path])
    return unflatten(arrays)


Views = list[np.ndarray] | np.ndarray
"""A stored tensor, or the tensors to be stacked, as views of files."""


def _match(
    reader: Reader, config: ModelConfig, specs: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Views]:
    """For each parameter the stored views that make it, after every check that needs no weight's bytes."""
    family = find(config.model_type)
    wanted = family.weights(config)
    assert wanted.keys() == specs.keys(), sorted(wanted.keys() ^ specs.keys())
    chosen = {path: _choose(entry, reader.names) for path, entry in wanted.items()}
    used = {name for entry in chosen.values() for name in _names(entry)}
    tied = _tied_head(reader, config)
    ignored = re.compile("|".join((*BUFFERS, *family.IGNORED)))
    extra = [n for n in sorted(reader.names - used - set(tied)) if not ignored.fullmatch(n)]
    missing = sorted(used - reader.names)
    if missing or extra:
        raise ValueError(_disagreement(reader, config, missing, extra))
    views = {path: _views(entry, reader) for path, entry in chosen.items()}
    for path, spec in specs.items():
        view = views[path]
        got = (len(view), *view[0].shape) if isinstance(view, list) else view.shape
        if got != spec.shape:
            name = _names(chosen[path])[0]
            raise ValueError(
                f"{reader.entry(name).file}: tensor {name} gives {path} the shape {got}, but config.json asks for "
                f"{tuple(spec.shape)}{_why(path, config)}; config and weights are of different checkpoints"
            )
    for name in tied:
        _check_tied(reader, name, _names(chosen["embedding.weight"])[0])
    return views


def _choose(entry: Source | Stack | Either, names: frozenset[str]) -> Source | Stack:
    """The option of an Either whose tensors are all stored (the first when none is)."""
    options = entry.options if isinstance(entry, Either) else (entry,)
    return next((option for option in options if names.issuperset(_names(option))), options[0])


def _names(entry: Source | Stack) -> list[str]:
    return [entry.name] if isinstance(entry, Source) else [part.name for part in entry.sources]


def _views(entry: Source | Stack, reader: Reader) -> Views:
    if isinstance(entry, Stack):
        return [_view(part, reader) for part in entry.sources]
    return _view(entry, reader)


def _view(source: Source, reader: Reader) -> np.ndarray:
    view = reader.view(source.name)
    return view if source.part is None else source.part(view)


def _tied_head(reader: Reader, config: ModelConfig) -> list[str]:
    """Stored copies of a tied head, under any name that the family gives an untied one."""
    if not config.tie_embeddings:
        return []
    entry = find(config.model_type).weights(replace(config, tie_embeddings=False))["lm_head.weight"]
    options = entry.options if isinstance(entry, Either) else (entry,)
    return [option.name for option in options if isinstance(option, Source) and option.name in reader.names]


def _check_tied(reader: Reader, head: str, embedding: str) -> None:
    """A tied head may be stored twice, but then both are the same."""
    a, b = reader.view(head), reader.view(embedding)
    step = max(1, 2**20 // max(1, a[:1].nbytes))
    if a.shape != b.shape or any(
        not np.array_equal(a[at : at + step], b[at : at + step]) for at in range(0, len(a), step)
    ):
        raise ValueError(
            f"{reader.entry(head).file}: config.json ties the output head to the embedding, but {head} "
            f"{a.shape} differs from {embedding} {b.shape}; set tie_word_embeddings to false if it is a real head"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _why(path: str, config: ModelConfig) -> str:
    if path in ("embedding.weight", "lm_head.weight"):
        return f" (vocab_size = {config.vocab_size}, hidden_size = {config.hidden_size})"
    return ""


def _disagreement(reader: Reader, config: ModelConfig, missing: list[str], extra: list[str]) -> str:
    """What the checkpoint lacks, what it has too much, and the likeliest reason."""
    lines = [f"{reader.folder} does not hold a {config.model_type} model as its config.json describes it"]
    if missing:
        lines.append(f"missing tensors: {_some(missing)}")
    if extra:
        lines.append(f"unexpected tensors: {_some(extra)}")
    numbers = [
        int(n)
        for name in reader.names
        for n in re.findall(r"\blayers\.(\d+)\.|\bh\.(\d+)\.", name)
        for n in n
        if n
    ]
    if numbers and max(numbers) + 1 != config.num_layers:
        lines.append(f"the tensors' names count {max(numbers) + 1} layers, the config {config.num_layers}")
    lines.append("fetch config.json and all weight files of one checkpoint again, or correct the config")
    return "; ".join(lines)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary: the CPU back end adopts such a buffer without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _read(views: Views, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a parameter as an aligned array of `dtype`."""
    if isinstance(views, np.ndarray):
        view = views[index]
        out = aligned(view.shape, dtype)
        np.copyto(out, view, casting="unsafe")
        return out
    chosen = views[index[0]] if index else views
    rows = [view[index[1:]] for view in chosen]
    out = aligned((len(rows), *rows[0].shape), dtype)
    for at, row in enumerate(rows):
        np.copyto(out[at], row, casting="unsafe")
    return out


def _place(views: Views, spec: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Read one parameter onto its devices; equal shards are read once, and no host copy outlives this call."""
    dtype = np.dtype(spec.dtype)
    if sharding is None:
        return jax.block_until_ready(jax.device_put(_read(views, dtype, ()), may_alias=True))
    made: dict[tuple, np.ndarray] = {}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or ()
        key = tuple((part.start, part.stop) for part in index)
        if key not in made:
            made[key] = _read(views, dtype, index)
        return made[key]

    return jax.block_until_ready(jax.make_array_from_callback(spec.shape, sharding, shard))


# ---------------------------------------------------------------- random weights


@partial(jax.jit, static_argnums=(0, 1, 2))
def _random_block(config: BlockConfig, hidden: int, numerics: Numerics, key: jax.Array) -> dict:
    block = Block(config, hidden, numerics=numerics, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(block))


@partial(jax.jit, static_argnums=(0, 1))
def _random_rest(config: ModelConfig, numerics: Numerics, key: jax.Array) -> dict:
    decoder = Decoder(replace(config, blocks=()), numerics=numerics, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(decoder))


def random_params(config: ModelConfig, numerics: Numerics = Numerics(), seed: int = 0) -> dict:
    """Params of random weights; equal blocks share one compiled initialiser, so deep models start fast."""
    key = jax.random.key(seed, impl="rbg")
    params = _random_rest(config, numerics, jax.random.fold_in(key, 0))
    params["blocks"] = {
        index: _random_block(block, config.hidden_size, numerics, jax.random.fold_in(key, index + 1))
        for index, block in enumerate(config.blocks)
    }
    return params
