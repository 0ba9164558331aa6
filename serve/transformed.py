"""Transforms around an engine: applied before it is built, and again to what each swap of weights brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from flax import nnx

from ..model import checkpoint
from ..model.config import ModelConfig, QuantConfig
from ..model.layers import Numerics
from ..model.orbax import orbax_config
from ..model.params import flatten
from ..model.quantised import part_shapes
from ..model.transforms.quantisation import plain_config, rounded, weight_formats
from ..model.transforms.transform import Transform, assemble, from_record, to_record
from ..sharding.placement import put
from .build import Build, Opened
from .tokenizer import Tokenizer

Read = Callable[[jax.sharding.Sharding | None], Any]
"""Reads a parameter onto a sharding."""
TRANSFORMS = "transforms"


@dataclass(frozen=True)
class Transforms:
    """What was applied to a model, oldest first."""

    applied: tuple[Transform, ...] = ()

    @staticmethod
    def of(opened: Opened) -> Transforms:
        """Those that the checkpoint's record names."""
        if opened.folder is None or not checkpoint.is_orbax(opened.folder):
            return Transforms()
        records = orbax_config(opened.folder)[0].get(TRANSFORMS, [])
        return Transforms(tuple(from_record(record) for record in records))

    def metadata(self) -> dict[str, Any]:
        """The record that goes with a checkpoint."""
        return {TRANSFORMS: [to_record(transform) for transform in self.applied]} if self.applied else {}

    def apply(
        self, opened: Opened, transforms: Sequence[Transform], texts: Sequence[str | Sequence[int]] | None,
        tokenizer: Tokenizer | None, build: Build,
    ) -> tuple[Opened, Transforms]:  # fmt: skip
        """The model after `transforms`, on the devices that `build` gives it. texts: what calibration looks at."""
        if not transforms:
            return opened, self
        model = assemble(opened.config, opened.numerics, opened.params)
        calibration = None if texts is None else [_tokens(text, tokenizer) for text in texts]
        for transform in transforms:
            model = transform(model, calibration)
        params = nnx.to_pure_dict(nnx.state(model))
        params = put(params, build.shardings(model.config, opened.numerics))
        return replace(opened, config=model.config, params=params), Transforms((*self.applied, *transforms))

    def readers(self, config: ModelConfig, reads: Mapping[str, Read]) -> dict[str, Read]:
        """Readers of the transformed model's parameters from those of the original's.

        ValueError where a transform depends on more than weights.
        """
        calibrated = [type(one).__name__ for one in self.applied if one.calibrated]
        if calibrated:
            raise ValueError(
                f"{', '.join(calibrated)} looked at texts to transform the running model, so the original's weights "
                f"cannot replace it in place, and nothing was changed: transform the new model the same way and hand "
                f"that over, or open it with LLM(..., transforms=...)"
            )
        found: dict[str, Read] = {}
        formats = weight_formats(config, Numerics())
        for path, read in reads.items():
            if path not in formats:
                found[path] = read
                continue
            names = part_shapes((1, formats[path].group_size or 1), formats[path])
            found |= {f"{path}.{name}": partial(_part, read, formats[path], name) for name in names}
        return found


def original_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{dotted path: shape} of the model before its weights were quantised."""
    return {path: leaf.shape for path, leaf in flatten(checkpoint.abstract(plain_config(config))[1]).items()}


def _part(read: Read, stored: QuantConfig, name: str, sharding: jax.sharding.Sharding | None) -> jax.Array:
    part = rounded(read(None), stored)[name]
    return part if sharding is None else put(part, sharding)


def _tokens(text: str | Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(text, str):
        return list(text)
    if tokenizer is None:
        raise ValueError("calibration came as text, but this LLM has no tokenizer; give lists of token ids")
    return tokenizer.encode(text)
