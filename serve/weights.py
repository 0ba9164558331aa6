"""New weights for a running engine, leaf by leaf and in place: nothing is compiled, nothing exists twice.

A swap is planned first (every name, shape and dtype is checked, nothing changes) and runs then: each leaf is made
as the engine holds it (dtype, sharding, stacked or not), and the one that it replaces is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ..model import checkpoint
from ..model.config import ModelConfig
from ..model.layers import Numerics
from ..model.params import flatten, some
from ..model.stacked import parts, stack
from ..model.transforms.quantisation import plain_config
from ..sharding.placement import put
from .build import with_length
from .programs import Programs
from .transformed import Read, Transforms, original_shapes

Weights = nnx.Module | nnx.State | Mapping[Any, Any] | str | Path
# What two checkpoints of one model may say differently.
LABELS = ("model_type", "bos_token_id", "eos_token_ids", "dtype", "max_position")


def plan_swap(
    programs: Programs,
    config: ModelConfig,
    length: int,
    source: Weights,
    transforms: Transforms = Transforms(),
) -> Callable[[], None]:
    """A function that puts `source` in the place of the engine's weights; ValueError when it does not fit.

    source: an NNX module (a `model.decoder.Decoder`), its state, a pure dict of parameters, or a checkpoint's
    folder. Arrays are copied, so a trainer may go on to donate its own. `length` is max_model_len. The weights of
    the original model pass through the `transforms` that made the engine's.
    """
    held = flatten(programs.params)
    groups = {path: _group(programs, config, path) for path in held}
    shapes = {
        name: held[path].shape[1:] if _stacked(programs, path) else held[path].shape
        for path, names in groups.items()
        for name in names
    }
    if isinstance(source, str | Path):
        read, original = _folder(Path(source), config, length, _dtype(held))
    else:
        leaves = _leaves(source)
        original = config.quantised and not any(name.endswith(".codes") for name in leaves)
        _check(leaves, original_shapes(config) if original else shapes)
        read = {name: partial(_given, leaf) for name, leaf in leaves.items()}
    if original:
        read = transforms.readers(config, read)
    return partial(_swap, programs, {path: [read[name] for name in names] for path, names in groups.items()})


def _dtype(held: Mapping[str, jax.Array]) -> jnp.dtype:
    """The dtype of the parameters that are stored as numbers: norms are, whatever else is quantised."""
    paths = [path for path in held if not path.endswith((".codes", ".scales", ".zeros"))]
    return next(held[path].dtype for path in paths)


def _stacked(programs: Programs, path: str) -> bool:
    return programs.period is not None and path.startswith("blocks.")


def _group(programs: Programs, config: ModelConfig, path: str) -> list[str]:
    """The separate parameters that make the leaf `path` of the engine."""
    return [path] if programs.period is None else parts(path, programs.period, config.num_layers)


def _leaves(source: Any) -> dict[str, Any]:
    """{dotted path: array} of a module, a state or a pure dict."""
    if isinstance(source, nnx.Module):
        source = nnx.state(source)
    if isinstance(source, nnx.State):
        source = nnx.to_pure_dict(source)
    if not isinstance(source, Mapping):
        raise ValueError(
            "weights come as an NNX module, its state, a dict of parameters or a checkpoint's folder; got a "
            f"{type(source).__name__}"
        )
    return flatten(source)


def _given(leaf: Any, sharding: jax.sharding.Sharding | None) -> Any:
    del sharding
    return leaf


def _check(leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless the leaves are those of the model, alive, and made of floating-point numbers."""
    problems = [
        f"{label}: {some(sorted(names))}"
        for label, names in (
            ("missing", shapes.keys() - leaves.keys()), ("unknown", leaves.keys() - shapes.keys())
        )
        if names
    ]  # fmt: skip
    for name in sorted(shapes.keys() & leaves.keys()):
        leaf = leaves[name]
        if not isinstance(leaf, jax.Array | np.ndarray):
            problems.append(f"{name} is a {type(leaf).__name__}, not an array")
        elif leaf.shape != shapes[name]:
            problems.append(f"{name} has the shape {leaf.shape}, the running model's has {shapes[name]}")
        elif not (jnp.issubdtype(leaf.dtype, jnp.floating) or name.endswith((".codes", ".zeros"))):
            problems.append(f"{name} holds {leaf.dtype}, not floating-point numbers")
        elif isinstance(leaf, jax.Array) and leaf.is_deleted():
            problems.append(f"{name} was deleted (donated to a step of training, perhaps)")
    if problems:
        raise ValueError(
            f"these weights do not fit the running model, and nothing was changed: {some(problems)}. Give every "
            "parameter of one model of the same config"
        )


def _folder(folder: Path, config: ModelConfig, length: int, dtype: jnp.dtype) -> tuple[dict[str, Read], bool]:
    """A checkpoint's parameters, each read when it is placed, and whether they are those of the original model, not
    of the quantised one; its config must describe either."""
    stored = checkpoint.load_config(folder)[1]
    same = replace(with_length(stored, length), **{name: getattr(config, name) for name in LABELS})
    original = config.quantised and not same.quantised
    config = plain_config(config) if original else config
    if same != config:
        differing = [f.name for f in fields(config) if getattr(same, f.name) != getattr(config, f.name)]
        raise ValueError(
            f"{folder} holds another model, and nothing was changed: its config differs from that of the running "
            f"one in {', '.join(differing)}; open it with LLM({str(folder)!r}) instead"
        )
    return dict(checkpoint.readers(folder, stored, Numerics(dtype, dtype))), original


def _swap(programs: Programs, groups: Mapping[str, list[Read]]) -> None:
    """Replace the engine's leaves one at a time: there is never more than one leaf too many."""
    for path, reads in groups.items():
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
        place: Any = programs.params
        for key in parents:
            place = place[key]
        old = place[last]
        place[last] = jax.block_until_ready(_made(reads, old, _stacked(programs, path)))
        old.delete()


def _made(reads: list[Read], like: jax.Array, stacked: bool) -> jax.Array:
    """One leaf with the dtype and sharding of `like`, sharing memory with nothing."""
    if stacked:
        layer = _layer(like.sharding)
        layers = {index: read(layer).astype(like.dtype) for index, read in enumerate(reads)}
        leaf = stack({"blocks": layers}, 1)["blocks"][0]
    else:
        leaf = reads[0](like.sharding).astype(like.dtype)
    if jax.process_count() > 1:  # what is read there is nobody else's
        return put(leaf, like.sharding)
    return jax.device_put(leaf, like.sharding, may_alias=False)


def _layer(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding | None:
    """Where a layer of a stacked leaf lies before it is stacked; None: on the default device."""
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
