"""Parameters as a pure dict: nested, layers numbered by ints, addressed by dotted paths ("blocks.0.mixer.q.weight")."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
from flax import nnx

from .config import BlockConfig, ModelConfig
from .decoder import Block, Decoder
from .layers import Numerics

Shardings = Callable[[str], jax.sharding.Sharding] | Mapping[Any, Any] | jax.sharding.Sharding | None
"""One sharding for all, a pytree like the params, or a function of the dotted path."""


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


class _Keys:
    """Stands in for `nnx.Rngs` while tracing: `params()` gives the next key, counted in Python. nnx's own counter
    is a traced variable, which costs time quadratic in the number of parameters (80 layers: 6 s)."""

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0

    def params(self) -> jax.Array:
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


def _rngs(key: jax.Array) -> nnx.Rngs:
    return cast(nnx.Rngs, _Keys(key))


def abstract(config: ModelConfig, numerics: Numerics = Numerics()) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, params as ShapeDtypeStructs): what `nnx.merge` and planning need, without arrays."""
    decoder = nnx.eval_shape(lambda: Decoder(config, numerics=numerics, rngs=_rngs(jax.random.key(0))))
    graphdef, state = nnx.split(decoder)
    return graphdef, nnx.to_pure_dict(state)


def abstract_block(config: BlockConfig, hidden: int, numerics: Numerics) -> tuple[nnx.GraphDef, dict]:
    """`abstract` of one block of width `hidden`."""
    block = nnx.eval_shape(lambda: Block(config, hidden, numerics=numerics, rngs=_rngs(jax.random.key(0))))
    graphdef, state = nnx.split(block)
    return graphdef, nnx.to_pure_dict(state)


def shardings_of(shardings: Shardings, paths: Iterable[str]) -> dict[str, jax.sharding.Sharding | None]:
    """The sharding of each path; None is the default device."""
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(paths, shardings)
    if isinstance(shardings, Mapping):
        given = flatten(shardings)
        absent = [path for path in paths if path not in given]
        if absent:
            raise ValueError(f"the shardings lack {some(absent)}; give one sharding for each parameter")
        return {path: given[path] for path in paths}
    return {path: shardings(path) for path in paths}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _random_block(config: BlockConfig, hidden: int, numerics: Numerics, key: jax.Array) -> dict:
    block = Block(config, hidden, numerics=numerics, rngs=_rngs(key))
    return nnx.to_pure_dict(nnx.state(block))


@partial(jax.jit, static_argnums=(0, 1))
def _random_rest(config: ModelConfig, numerics: Numerics, key: jax.Array) -> dict:
    decoder = Decoder(replace(config, blocks=()), numerics=numerics, rngs=_rngs(key))
    return nnx.to_pure_dict(nnx.state(decoder))


def random_params(config: ModelConfig, numerics: Numerics = Numerics(), seed: int = 0) -> dict:
    """Params of random weights; equal blocks share one compiled initialiser, so deep models start fast."""
    if config.quantised:
        raise ValueError(
            "this config describes quantised weights, which are not drawn; draw the original model and transform it"
        )
    key = jax.random.key(seed, impl="rbg")
    params = _random_rest(config, numerics, jax.random.fold_in(key, 0))
    params["blocks"] = {
        index: _random_block(block, config.hidden_size, numerics, jax.random.fold_in(key, index + 1))
        for index, block in enumerate(config.blocks)
    }
    return params


def some(names: list[str]) -> str:
    """The first few of many names, for a message."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
