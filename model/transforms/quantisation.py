"""Weights rounded to a format: what Int8, Fp8 and Int4 share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax

from ..config import BlockConfig, ModelConfig, QuantConfig
from ..decoder import Decoder
from ..layers import Numerics
from ..params import abstract, abstract_block, flatten
from ..quantised import Parts, quantise
from .transform import Calibration, leaves_of, rebuilt

rounded: Callable[[jax.Array, QuantConfig], Parts] = jax.jit(quantise, static_argnums=1)
"""`quantise`, compiled once a shape."""


@dataclass(frozen=True)
class Quantisation:
    """Rounds the linear layers of some blocks, and the token table and the output head.

    layers: the blocks (None: all of them). embeddings: whether the table and the head are rounded too. Norms,
    biases, routers, convolutions and learned positions keep their numbers.
    """

    layers: Sequence[int] | None = None
    embeddings: bool = True

    @property
    def calibrated(self) -> bool:
        return False

    def stored(self) -> QuantConfig:
        """How the linear layers of the blocks are stored."""
        raise NotImplementedError

    def stored_embeddings(self) -> QuantConfig:
        """How the table and the head are stored."""
        return self.stored()

    def config(self, config: ModelConfig) -> ModelConfig:
        """The config of the rounded model. ValueError where it is rounded already or has no such layers."""
        if config.quantised:
            raise ValueError(
                f"{type(self).__name__} needs weights that are not quantised yet, but this model's are: begin with "
                f"the original checkpoint"
            )
        chosen = range(config.num_layers) if self.layers is None else self.layers
        unknown = [layer for layer in chosen if layer not in range(config.num_layers)]
        if unknown:
            raise ValueError(
                f"{type(self).__name__}(layers={self.layers}) names the layers {unknown}, but the model has "
                f"{config.num_layers}; name some of 0..{config.num_layers - 1}"
            )
        blocks = tuple(
            self._block(block) if layer in chosen else block for layer, block in enumerate(config.blocks)
        )
        table = self.stored_embeddings() if self.embeddings else None
        head = None if config.tie_embeddings else table
        return replace(config, blocks=blocks, embedding_weights=table, head_weights=head)

    def _block(self, block: BlockConfig) -> BlockConfig:
        channel = None if block.channel is None else self.stored()
        return replace(block, mixer_weights=self.stored(), channel_weights=channel)

    def __call__(self, model: Decoder, calibration: Calibration | None = None) -> Decoder:
        del calibration
        config = self.config(model.config)
        return rounded_to(config, model.numerics, leaves_of(model))


def rounded_to(config: ModelConfig, numerics: Numerics, leaves: dict[str, jax.Array]) -> Decoder:
    """The decoder of a quantised config from the leaves of the model before."""
    return rebuilt(config, numerics, round_leaves(leaves, weight_formats(config, numerics)))


def round_leaves(leaves: Mapping[str, jax.Array], formats: Mapping[str, QuantConfig]) -> dict[str, jax.Array]:
    """The leaves, by path, with the parts of those weights that have a format in their place."""
    found: dict[str, jax.Array] = {}
    for path, leaf in leaves.items():
        if path in formats:
            parts = rounded(leaf, formats[path])
            found |= {f"{path}.{name}": part for name, part in parts.items()}
        else:
            found[path] = leaf
    return found


def weight_formats(config: ModelConfig, numerics: Numerics) -> dict[str, QuantConfig]:
    """{dotted path of a weight: how it is stored} for the weights that a config has quantised."""
    found: dict[str, QuantConfig] = {}
    for path in _coded(abstract(config, numerics)[1]):
        first, _, rest = path.partition(".")
        if first == "blocks":
            index, _, rest = rest.partition(".")
            found[path] = _format(config.blocks[int(index)], rest)
        else:
            table = config.head_weights if first == "lm_head" else config.embedding_weights
            assert table is not None, path
            found[path] = table
    return found


def formats_of_block(block: BlockConfig, hidden: int, numerics: Numerics) -> dict[str, QuantConfig]:
    """`weight_formats` of one block, by paths inside it ("mixer.q.weight")."""
    return {path: _format(block, path) for path in _coded(abstract_block(block, hidden, numerics)[1])}


def _coded(specs: Mapping) -> list[str]:
    end = ".codes"
    return [path.removesuffix(end) for path in flatten(specs) if path.endswith(end)]


def _format(block: BlockConfig, path: str) -> QuantConfig:
    found = block.mixer_weights if path.startswith("mixer.") else block.channel_weights
    assert found is not None, path
    return found


def parameter_count(config: ModelConfig) -> int:
    """Weights of the model, however many codes share a byte."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(plain_config(config))[1]))


def plain_config(config: ModelConfig) -> ModelConfig:
    """The config of the model before it was quantised."""
    blocks = tuple(replace(block, mixer_weights=None, channel_weights=None) for block in config.blocks)
    return replace(config, blocks=blocks, embedding_weights=None, head_weights=None)
