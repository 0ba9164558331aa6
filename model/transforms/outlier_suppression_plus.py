"""Outlier Suppression+ (Wei et al. 2023, arXiv 2304.09145): channels with outliers are shifted and scaled down before
weights and inputs are rounded, by factors that are folded into the norms and weights around them.

For a norm and the linear layers W that read it: inputs X become (X - z) / s, the norm's weight and bias absorb both,
and W becomes W diag(s), its bias b + W z. s_c = max(1, max X_c / t, -min X_c / t) touches only channels beyond t.
The threshold t is the one of a grid whose rounded half of the block (mixer or channel mixer, as it will run) comes
nearest to the original's output on calibration text. The paper compares after softmax(q k^T) v or act(gate) * up;
here it is the output of the half, one linear map later, so one loss serves every mixer, mixtures included.

The input of a gated MLP's last layer has no norm in front: its s is folded into the rows of `up`. Norms behind the
layers that they belong to (OLMo 2's wiring) cannot absorb anything, so those halves are only rounded. A shift needs a
bias in the norm and in every layer that reads it (GPT-2, OPT, GPT-NeoX), as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from ...attention.batch import rectangle
from ..config import AttentionConfig, BlockConfig, MLPConfig
from ..decoder import Block, Decoder
from ..layers import ACTIVATIONS, Numerics
from .calibration import Leaves, block_inputs, block_of, embedded, fresh, windows
from .quantisation import Quantisation, formats_of_block, round_leaves
from .transform import Calibration, leaves_of, rebuilt


@dataclass(frozen=True)
class Unit:
    """What shares a factor: weights whose inputs are scaled, and what stands before them and absorbs it."""

    half: Literal["mixer", "channel"]
    readers: tuple[str, ...]
    norm: str | None = None
    writer: str | None = None
    offset: float = 0.0


def units(block: BlockConfig) -> Iterator[Unit]:
    """The units of a block, in the order in which they are searched."""
    before = block.wiring in ("pre", "sandwich", "parallel") and block.norm.scale
    offset = block.norm.offset
    if before:
        attention = isinstance(block.mixer, AttentionConfig)
        names = ("mixer.q", "mixer.k", "mixer.v") if attention else ("mixer.in_proj",)
        yield Unit("mixer", tuple(f"{name}.weight" for name in names), "norms.0", offset=offset)
    if block.channel is None:
        return
    norm = "norms.2" if block.wiring == "sandwich" else "norms.1"
    if not isinstance(block.channel, MLPConfig):
        if before:
            yield Unit(
                "channel", ("channel.router.weight", "channel.gate", "channel.up"), norm, offset=offset
            )
        return
    names = ("channel.gate", "channel.up") if block.channel.gated else ("channel.up",)
    if before:
        yield Unit("channel", tuple(f"{name}.weight" for name in names), norm, offset=offset)
    if block.channel.gated:
        yield Unit("channel", ("channel.down.weight",), writer="channel.up")


@dataclass(frozen=True)
class OutlierSuppressionPlus:
    """then: how the scaled weights are rounded; the thresholds are searched for it. grid: thresholds tried, evenly
    spaced from the largest input down to `lowest` (the authors use 1.0 for OPT, 0.1 for Llama). window: tokens that
    see each other while calibrating. tokens: how many are looked at, at most."""

    then: Quantisation
    grid: int = 24
    lowest: float = 0.1
    window: int = 256
    tokens: int = 2048

    @property
    def calibrated(self) -> bool:
        return True

    def __call__(self, model: Decoder, calibration: Calibration | None = None) -> Decoder:
        target, leaves = self.then.config(model.config), leaves_of(model)
        length = min(self.window, model.config.max_position)
        tokens = windows(calibration, length, type(self).__name__)[: max(1, self.tokens // length)]
        x = embedded(model, tokens)
        for index, (block, goal) in enumerate(zip(model.config.blocks, target.blocks, strict=True)):
            start = f"blocks.{index}."
            held = {path.removeprefix(start): leaf for path, leaf in leaves.items() if path.startswith(start)}
            half, following = block_inputs(block, model.numerics, held, x, tokens)
            for unit in units(block):
                if (goal.mixer_weights if unit.half == "mixer" else goal.channel_weights) is not None:
                    inputs = x if unit.half == "mixer" or block.wiring == "parallel" else half
                    held = self._fold(unit, block, goal, model.numerics, held, inputs, tokens)
            leaves |= {f"{start}{path}": leaf for path, leaf in held.items()}
            x = following
        return self.then(rebuilt(model.config, model.numerics, leaves))

    def _fold(
        self, unit: Unit, block: BlockConfig, goal: BlockConfig, numerics: Numerics, held: Leaves, x: jax.Array,
        tokens: jax.Array,
    ) -> Leaves:  # fmt: skip
        """The block's leaves with the unit's best factors in them."""
        low, high = _extremes(unit, block, numerics, held, x, tokens)
        shift = (high + low) / 2 if can_shift(unit, held) else jnp.zeros_like(high)
        low, high = low - shift, high - shift
        largest = jnp.maximum(high, -low).max()
        thresholds = jnp.linspace(largest, min(self.lowest, float(largest)), self.grid)
        losses = _losses(unit, block, goal, numerics, held, x, tokens, (low, high, shift), thresholds)
        best = thresholds[jnp.argmin(losses)]
        return fold(held, unit, _factors(low, high, best), shift)


def _factors(low: jax.Array, high: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.maximum(1.0, jnp.maximum(high, -low) / threshold)


def can_shift(unit: Unit, held: Leaves) -> bool:
    """Whether a shift can be absorbed on both sides."""
    readers = [f"{path.removesuffix('.weight')}.bias" for path in unit.readers]
    return unit.norm is not None and all(path in held for path in (f"{unit.norm}.bias", *readers))


def fold(held: Leaves, unit: Unit, scale: jax.Array, shift: jax.Array) -> Leaves:
    """The leaves of the same function with (X - shift) / scale in the place of X [.., C] before the unit's readers."""
    found = dict(held)
    for path in unit.readers:
        weight = held[path].astype(jnp.float32)
        bias = f"{path.removesuffix('.weight')}.bias"
        if bias in held:
            found[bias] = (held[bias].astype(jnp.float32) + weight @ shift).astype(held[bias].dtype)
        found[path] = (weight * scale).astype(held[path].dtype)
    if unit.norm is not None:
        weight, bias = f"{unit.norm}.weight", f"{unit.norm}.bias"
        wide = held[weight].astype(jnp.float32)
        found[weight] = ((wide + unit.offset) / scale - unit.offset).astype(held[weight].dtype)
        if bias in held:
            moved = (held[bias].astype(jnp.float32) - shift) / scale
            found[bias] = moved.astype(held[bias].dtype)
        return found
    for path in (f"{unit.writer}.weight", f"{unit.writer}.bias"):
        if path in held:
            rows = scale[:, None] if held[path].ndim == 2 else scale
            found[path] = (held[path].astype(jnp.float32) / rows).astype(held[path].dtype)
    return found


def _half(block: Block, unit: Unit, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """The output of the unit's half for x [B*S,E] as it enters."""
    batch = rectangle(tokens)
    if unit.half == "mixer":
        return block.mixer(block.norms[0](x), batch, fresh(block.config))[0]
    assert block.channel is not None
    return block.channel(block.channel_norm(x) if block.normed_first else x, batch)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _extremes(
    unit: Unit, config: BlockConfig, numerics: Numerics, held: Leaves, x: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest input of each channel [C] of the unit's readers."""
    del tokens
    block = block_of(config, x.shape[-1], numerics, held)
    if unit.half == "mixer":
        seen = block.norms[0](x)
    else:
        seen = block.channel_norm(x) if block.normed_first else x
        if unit.norm is None:
            channel = block.channel
            seen = ACTIVATIONS[channel.config.activation](channel.gate(seen)) * channel.up(seen)  # type: ignore[union-attr]
    seen = seen.astype(jnp.float32)
    return seen.min(0), seen.max(0)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _losses(
    unit: Unit, config: BlockConfig, goal: BlockConfig, numerics: Numerics, held: Leaves, x: jax.Array,
    tokens: jax.Array, found: tuple[jax.Array, jax.Array, jax.Array], thresholds: jax.Array,
) -> jax.Array:  # fmt: skip
    """The mean squared error of the unit's half, rounded with each threshold, f32[grid]."""
    low, high, shift = found
    formats = formats_of_block(goal, x.shape[-1], numerics)
    exact = _half(block_of(config, x.shape[-1], numerics, held), unit, x, tokens)

    def loss(threshold: jax.Array) -> jax.Array:
        folded = fold(held, unit, _factors(low, high, threshold), shift)
        block = block_of(goal, x.shape[-1], numerics, round_leaves(folded, formats))
        return jnp.square((_half(block, unit, x, tokens) - exact).astype(jnp.float32)).mean()

    return jax.lax.map(loss, thresholds)
