"""Running a model over calibration text, a block at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...attention.batch import rectangle
from ...attention.caches.recurrent import Stateless
from ...attention.caches.uncached import Uncached
from ..config import AttentionConfig, BlockConfig
from ..decoder import Block, Decoder
from ..depth import Depth
from ..layers import Numerics
from ..params import abstract_block, unflatten
from .transform import Calibration, leaves_of, rebuilt

Leaves = dict[str, jax.Array]


def windows(calibration: Calibration | None, length: int, name: str) -> jax.Array:
    """Texts end to end, cut into i32[B, length]; what is left over is dropped. ValueError without text."""
    tokens = [token for text in calibration or () for token in text]
    if not tokens:
        raise ValueError(
            f"{name} looks at texts, but got none; give calibration=[...], a few texts or lists of token ids"
        )
    length = min(length, len(tokens))
    count = len(tokens) // length
    return jnp.asarray(np.array(tokens[: count * length], np.int32).reshape(count, length))


def embedded(model: Decoder, tokens: jax.Array) -> jax.Array:
    """i32[B,S] -> x [B*S, E] as it enters the first block."""
    batch = rectangle(tokens)
    return model.embed(batch.tokens, batch)


def block_of(config: BlockConfig, hidden: int, numerics: Numerics, leaves: Leaves) -> Block:
    """The block of a config with these leaves ("mixer.q.weight")."""
    return nnx.merge(abstract_block(config, hidden, numerics)[0], unflatten(leaves))


def fresh(config: BlockConfig) -> Any:
    """The state of a layer that remembers nothing."""
    return Uncached() if isinstance(config.mixer, AttentionConfig) else Stateless()


@partial(jax.jit, static_argnums=(0, 1))
def block_inputs(
    config: BlockConfig, numerics: Numerics, leaves: Leaves, x: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(what the channel mixer's half takes, what the block gives) for x [B*S,E] of tokens [B,S]."""
    block, batch = block_of(config, x.shape[-1], numerics, leaves), rectangle(tokens)
    half = x if config.wiring == "parallel" else block.mixed(x, batch, fresh(config))[0]
    return half, block(x, batch, fresh(config))[0]


def with_depth(model: Decoder, depth: Depth) -> Decoder:
    """The model with a schedule of layers and the same weights. ValueError where layers remember what skipping would
    leave out of date."""
    if model.config.depth is not None:
        raise ValueError(
            f"this model skips layers already ({model.config.depth}); begin with the original checkpoint"
        )
    if model.config.recurrent:
        raise ValueError(
            f"{type(depth).__name__} skips layers of attention; {model.config.model_type} has recurrent layers, whose "
            f"state every token must pass: use another model"
        )
    return rebuilt(replace(model.config, depth=depth), model.numerics, leaves_of(model))
