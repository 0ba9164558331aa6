"""Checkpoints of our own, written by Orbax: shards in parallel, and the config beside them.

A folder holds `tokenloom.json` (the ModelConfig and what else was recorded, such as transforms), `params/` (the
arrays), and any tokenizer files that were copied: nothing else is needed to run it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from . import config as configs
from . import depth
from .config import ModelConfig
from .layers import Numerics
from .params import Shardings, abstract, flatten, shardings_of, some, unflatten
from .stored import read_json

RECORD, ARRAYS = "tokenloom.json", "params"
FORMAT = 1
CLASSES = {
    cls.__name__: cls
    for cls in (
        depth.ReservedLayers,
        depth.DecayingDepth,
        configs.QuantConfig,
        configs.NormConfig,
        configs.RopeConfig,
        configs.AttentionConfig,
        configs.Mamba2Config,
        configs.MLPConfig,
        configs.MoEConfig,
        configs.BlockConfig,
        configs.ModelConfig,
    )
}
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
)


def to_plain(value: object) -> object:
    """A config as JSON values: a dataclass becomes a dict with its "class", a tuple a list."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def from_plain(value: object) -> Any:
    """The inverse of `to_plain`; classes and fields that we do not know raise ValueError."""
    if isinstance(value, list):
        return tuple(from_plain(item) for item in value)
    if not isinstance(value, dict):
        return value
    name = value.get("class")
    fields = {key: from_plain(item) for key, item in value.items() if key != "class"}
    if name not in CLASSES:
        raise ValueError(f"the config has a part of class {name!r}; known: {', '.join(CLASSES)}")
    unknown = fields.keys() - {field.name for field in dataclasses.fields(CLASSES[name])}
    if unknown:
        raise ValueError(
            f"{name} has no {', '.join(sorted(unknown))}; the checkpoint was written by a newer version: update"
        )
    return CLASSES[name](**fields)


def is_orbax(folder: str | Path) -> bool:
    """Whether `save_orbax` wrote this folder."""
    return (Path(folder) / RECORD).is_file()


def save_orbax(
    path: str | Path,
    params: dict,
    config: ModelConfig,
    *,
    metadata: dict | None = None,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write `params` and `config` to a new folder.

    `metadata` is any JSON object (which transforms were applied); `tokenizer_from` is a folder whose tokenizer
    files are copied along.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists; give a new folder, or remove it first")
    path.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / ARRAYS, params)
    for pattern in COPIED if tokenizer_from is not None else ():
        for file in Path(str(tokenizer_from)).glob(pattern):
            shutil.copy(file, path / file.name)
    record = {"format": FORMAT, "metadata": metadata or {}, "config": to_plain(config)}
    # Last, so that a folder with a record is whole.
    (path / RECORD).write_text(json.dumps(record, indent=1), "utf-8")


def orbax_config(path: str | Path) -> tuple[dict, ModelConfig]:
    """(the recorded metadata, the config) of a folder that `save_orbax` wrote."""
    file = Path(path) / RECORD
    if not file.is_file():
        raise ValueError(f"{path} is no folder written by save_orbax: it has no {RECORD}")
    record = read_json(file)
    if record.get("format") != FORMAT:
        raise ValueError(f"{file} has format {record.get('format')!r}, this version reads {FORMAT}: update")
    try:
        config = from_plain(record.get("config"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{file} records no ModelConfig; write the checkpoint again")
    return record.get("metadata", {}), config


def restore_orbax(
    path: str | Path, numerics: Numerics | None = None, sharding: Shardings = None
) -> tuple[dict, ModelConfig]:
    """(params, config), each array straight to its sharding, in `numerics`' dtypes (None: as stored)."""
    path = Path(path).absolute()
    config = orbax_config(path)[1]
    with ocp.StandardCheckpointer() as checkpointer:
        specs = _specs(checkpointer, path, config, numerics)
        places = shardings_of(sharding, specs)
        target = {name: _target(spec, places[name]) for name, spec in specs.items()}
        return checkpointer.restore(path / ARRAYS, unflatten(target)), config


def orbax_readers(
    path: str | Path, numerics: Numerics | None = None
) -> dict[str, Callable[[jax.sharding.Sharding | None], jax.Array]]:
    """For each array a function that reads it alone onto a sharding; names and shapes are checked first."""
    path = Path(path).absolute()
    config = orbax_config(path)[1]
    with ocp.StandardCheckpointer() as checkpointer:
        specs = _specs(checkpointer, path, config, numerics)

    def read(name: str, sharding: jax.sharding.Sharding | None) -> jax.Array:
        item = unflatten({name: _target(specs[name], sharding)})
        how = ocp.checkpoint_utils.construct_restore_args(item)
        with ocp.PyTreeCheckpointer() as checkpointer:
            one = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
            return flatten(checkpointer.restore(path / ARRAYS, args=one))[name]

    return {name: partial(read, name) for name in specs}


def _specs(
    checkpointer: ocp.StandardCheckpointer, path: Path, config: ModelConfig, numerics: Numerics | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What is stored, in `numerics`' dtypes (None: as stored), after its names and shapes were checked."""
    specs = flatten(abstract(config, numerics or Numerics())[1])
    stored = flatten(_stored_tree(checkpointer, path / ARRAYS))
    shared = sorted(stored.keys() & specs.keys())
    differing = sorted(stored.keys() ^ specs.keys())
    differing += [name for name in shared if tuple(stored[name].shape) != specs[name].shape]
    if differing:
        raise ValueError(f"{path / ARRAYS} and {RECORD} disagree about {some(differing)}; write them again")
    return {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype if numerics else stored[name].dtype)
        for name, spec in specs.items()
    }


def _target(spec: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding or here)


def _stored_tree(checkpointer: ocp.StandardCheckpointer, path: Path) -> dict:
    """The stored arrays' metadata, as Orbax keeps it (keys are strings)."""
    if not path.is_dir():
        raise ValueError(f"{path} is missing; copy the checkpoint's whole folder")
    found = checkpointer.metadata(path).item_metadata
    if found is None:
        raise ValueError(f"{path} has no metadata of its arrays; copy the checkpoint's whole folder")
    return found.tree
