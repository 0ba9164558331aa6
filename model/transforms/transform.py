"""The door of transforms: what changes a model once, before it runs.

    decoder = Int8()(decoder)
    decoder = OutlierSuppressionPlus(Int8())(decoder, calibration=tokens)

A transform is a frozen dataclass. It takes a decoder (separate layers, not stacked) and token ids to look at, if it
needs any, and returns another decoder: new weights, and a new config where parameters differ in kind. Settings that
ask for nothing return the weights as they are, to the bit. What was applied is recorded with a checkpoint as plain
JSON (`to_record`), and `from_record` imports the file that it names.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
from flax import nnx

from ..config import ModelConfig
from ..decoder import Decoder
from ..layers import Numerics
from ..params import abstract, flatten, unflatten

Calibration = Sequence[Sequence[int]]
"""Texts to look at, each as token ids."""


class Transform(Protocol):
    """A frozen dataclass with fields of plain values, tuples and other transforms."""

    @property
    def calibrated(self) -> bool:
        """Whether it needs texts to look at. What does not can be done again to other weights of the model."""
        ...

    def __call__(self, model: Decoder, calibration: Calibration | None = None) -> Decoder:
        """The transformed model; the given one is left as it is. ValueError where it does not fit the model or
        lacks its calibration."""
        ...


def leaves_of(model: nnx.Module) -> dict[str, jax.Array]:
    """{dotted path: array} of a decoder, or of a part of one."""
    return flatten(nnx.to_pure_dict(nnx.state(model)))


def assemble(config: ModelConfig, numerics: Numerics, params: Mapping[Any, Any]) -> Decoder:
    """The decoder of a config with these params (a pure dict)."""
    return nnx.merge(abstract(config, numerics)[0], params)


def rebuilt(config: ModelConfig, numerics: Numerics, leaves: Mapping[str, Any]) -> Decoder:
    """The decoder of a config with these leaves, of which there must be one for each of its parameters."""
    graphdef, specs = abstract(config, numerics)
    differing = sorted(leaves.keys() ^ flatten(specs).keys())
    assert not differing, differing
    return nnx.merge(graphdef, unflatten(leaves))


def to_record(transform: Transform) -> dict[str, Any]:
    """A transform as JSON values: its file, its class and its settings."""
    kind, settings = type(transform), {}
    for field in dataclasses.fields(transform):  # type: ignore[arg-type]
        value = getattr(transform, field.name)
        settings[field.name] = to_record(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    return {"file": kind.__module__.rpartition(".")[2], "class": kind.__name__, "settings": settings}


def from_record(record: Mapping[str, Any]) -> Transform:
    """The inverse of `to_record`; ValueError for a transform that this version does not have."""
    file, name, settings = record.get("file"), record.get("class"), record.get("settings", {})
    if not isinstance(file, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", file):
        raise ValueError(f"the checkpoint records a transform in file {file!r}, which is no name of a file")
    try:
        kind = getattr(importlib.import_module(f".{file}", __package__), str(name))
        values = {key: _plain(value) for key, value in settings.items()}
        return kind(**values)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the checkpoint records the transform {name} of {file} ({error}); update"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_record(value)
    return tuple(value) if isinstance(value, list) else value
