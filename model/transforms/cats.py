"""CATS (Lee et al. 2024, arXiv 2404.08763): gates of a gated MLP whose magnitude is below a threshold become zero.

act(gate(x)) keeps the values with |value| > theta, one theta a layer: the `sparsity` quantile of the magnitudes on
calibration text. A neuron that is cut needs neither its row of `up` nor its column of `down`, so a third of the MLP is
read whole and two thirds in part. Here the values are computed and cut, as the authors evaluate; nothing is skipped
yet: XLA has no product that leaves out rows picked at run time without copying the others, and half of the neurons
cut one by one leave next to no block of 16 empty (`benchmarks/quantised.py --quality` prints the shares).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from ..channels.mlp import MLP
from ..config import BlockConfig, MLPConfig
from ..decoder import Decoder
from ..layers import Numerics
from .calibration import Leaves, block_inputs, block_of, embedded, windows
from .transform import Calibration, leaves_of, rebuilt


@dataclass(frozen=True)
class CATS:
    """sparsity: the share of gates that become zero (0: the model stays as it is). window and tokens: as in
    `OutlierSuppressionPlus`."""

    sparsity: float = 0.5
    window: int = 256
    tokens: int = 4096

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity={self.sparsity} must be a share of the gates, from 0 to below 1")

    @property
    def calibrated(self) -> bool:
        return True

    def __call__(self, model: Decoder, calibration: Calibration | None = None) -> Decoder:
        if self.sparsity == 0.0:
            return model
        if not any(_gated(block) for block in model.config.blocks):
            raise ValueError(
                f"CATS cuts gates of gated MLPs, but {model.config.model_type} has none; leave it out"
            )
        leaves, blocks = leaves_of(model), list(model.config.blocks)
        length = min(self.window, model.config.max_position)
        tokens = windows(calibration, length, "CATS")[: max(1, self.tokens // length)]
        x = embedded(model, tokens)
        for index, block in enumerate(model.config.blocks):
            start = f"blocks.{index}."
            held = {path.removeprefix(start): leaf for path, leaf in leaves.items() if path.startswith(start)}
            half, following = block_inputs(block, model.numerics, held, x, tokens)
            if _gated(block):
                magnitudes = gate_magnitudes(block, model.numerics, held, half)
                leaves[f"{start}channel.threshold"] = threshold(magnitudes, self.sparsity)
                blocks[index] = replace(block, channel=replace(block.channel, thresholded=True))  # type: ignore[type-var]
            x = following
        return rebuilt(replace(model.config, blocks=tuple(blocks)), model.numerics, leaves)


def _gated(block: BlockConfig) -> bool:
    return isinstance(block.channel, MLPConfig) and block.channel.gated


@partial(jax.jit, static_argnums=(0, 1))
def gate_magnitudes(block: BlockConfig, numerics: Numerics, held: Leaves, x: jax.Array) -> jax.Array:
    """|act(gate(x))| f32[T,I] of a block's MLP for x [T,E] as it enters that half."""
    one = block_of(block, x.shape[-1], numerics, held)
    assert isinstance(one.channel, MLP)
    return jnp.abs(one.channel.gates(one.channel_norm(x) if one.normed_first else x)).astype(jnp.float32)


def threshold(magnitudes: jax.Array, sparsity: float) -> jax.Array:
    """f32[1]: the value that this share of the magnitudes does not exceed."""
    values = jnp.sort(magnitudes.reshape(-1))
    return values[max(0, int(sparsity * values.size) - 1)][None]


def empty_blocks(magnitudes: jax.Array, cut: jax.Array, size: int) -> float:
    """The share of blocks of `size` neighbouring neurons that one token does not need at all: what a kernel that
    skips blocks could save."""
    tokens, neurons = magnitudes.shape
    needed = (magnitudes > cut)[:, : neurons - neurons % size].reshape(tokens, -1, size).any(-1)
    return float(1.0 - needed.mean())
