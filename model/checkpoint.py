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
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from .config import ModelConfig
from .families import find
from .families.common import Either, Source, Stack, token_ids
from .hub import resolve
from .layers import Numerics
from .orbax import is_orbax, orbax_config, orbax_readers, restore_orbax, save_orbax
from .params import Shardings, abstract, flatten, random_params, shardings_of, some, unflatten
from .stored import Reader, open_checkpoint, read_json

__all__ = [
    "Reader",
    "Shardings",
    "abstract",
    "flatten",
    "is_orbax",
    "load",
    "load_config",
    "load_generation_config",
    "open_checkpoint",
    "random_params",
    "read_config",
    "readers",
    "resolve",
    "restore_orbax",
    "save_orbax",
    "unflatten",
]

BUFFERS = (
    r".*rotary_emb\.inv_freq",
    r".*\.(attn|attention)\.(bias|masked_bias)",
)


def read_config(raw: dict) -> ModelConfig:
    """What a raw `config.json` means, by the family of its `model_type`."""
    for place in (raw, raw.get("text_config")):
        if isinstance(place, dict) and place.get("quantization_config"):
            method = place["quantization_config"]
            method = method.get("quant_method", method) if isinstance(method, dict) else method
            raise ValueError(
                f"quantization_config is {method!r}: quantised checkpoints are not read. Load the unquantised "
                "checkpoint and quantise it with a transform."
            )
    return find(raw.get("model_type")).config(raw)


def load_config(folder: str | Path) -> tuple[dict, ModelConfig]:
    """The raw `config.json` of a folder and what its family makes of it (of an Orbax folder: its own record)."""
    folder = Path(folder)
    if is_orbax(folder):
        return orbax_config(folder)
    path = folder / "config.json"
    if not path.is_file():
        if folder.is_dir() and any(folder.glob("*.gguf")):
            raise ValueError(
                f"{folder} holds GGUF files, which are not read; fetch the safetensors checkpoint they came from"
            )
        raise ValueError(f"{path} is missing; a checkpoint's folder needs it beside the weights: fetch it")
    raw = read_json(path)
    try:
        return raw, read_config(raw)
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


# ---------------------------------------------------------------- reading


def load(
    folder: str | Path, config: ModelConfig, numerics: Numerics = Numerics(), sharding: Shardings = None
) -> dict:
    """The folder's weights as params of `Decoder(config, numerics)`, in its dtypes, on their devices.

    Of a sharded parameter only the addressable shards are read. ValueError (file, tensor, both shapes, remedy)
    for tensors that are missing, unexpected or misshapen, and for files that are not whole.
    """
    if is_orbax(folder):
        return restore_orbax(folder, numerics, sharding)[0]
    read = readers(folder, config, numerics)
    places = shardings_of(sharding, read)
    return unflatten({path: place(places[path]) for path, place in read.items()})


def readers(
    folder: str | Path, config: ModelConfig, numerics: Numerics = Numerics()
) -> dict[str, Callable[[jax.sharding.Sharding | None], jax.Array]]:
    """For each parameter a function that reads it onto a sharding, so that a caller decides how many exist at a
    time. All names and shapes are checked before this returns, as for `load`."""
    if is_orbax(folder):
        return orbax_readers(folder, numerics)
    reader = open_checkpoint(folder)
    specs = flatten(abstract(config, numerics)[1])
    views = _match(reader, config, specs)

    def read(path: str, sharding: jax.sharding.Sharding | None) -> jax.Array:
        return _place(views[path](), specs[path], sharding)

    return {path: partial(read, path) for path in specs}


Views = list[np.ndarray] | np.ndarray
"""A stored tensor, or the tensors to be stacked, as views of files."""


def _match(
    reader: Reader, config: ModelConfig, specs: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Callable[[], Views]]:
    """For each parameter a function that opens the stored views that make it, after every check of names and
    shapes. Views are opened when a parameter is placed: a `part` that has to copy then lives no longer than that."""
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
    views = {path: partial(_views, entry, reader) for path, entry in chosen.items()}
    for path, spec in specs.items():
        view = views[path]()
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


def _why(path: str, config: ModelConfig) -> str:
    if path in ("embedding.weight", "lm_head.weight"):
        return f" (vocab_size = {config.vocab_size}, hidden_size = {config.hidden_size})"
    return ""


def _disagreement(reader: Reader, config: ModelConfig, missing: list[str], extra: list[str]) -> str:
    """What the checkpoint lacks, what it has too much, and the likeliest reason."""
    lines = [f"{reader.folder} does not hold a {config.model_type} model as its config.json describes it"]
    if missing:
        lines.append(f"missing tensors: {some(missing)}")
    if extra:
        lines.append(f"unexpected tensors: {some(extra)}")
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
