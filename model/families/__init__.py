"""One file a checkpoint `model_type`: facts only. `find` imports the file of that name; there is no registry."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Protocol, cast

from ..config import ModelConfig
from .common import Weights


class Family(Protocol):
    """What a family module exports."""

    IGNORED: tuple[str, ...]
    """Regular expressions of stored names that the decoder never needs (vision towers), matched whole."""

    def config(self, raw: dict) -> ModelConfig:
        """The facts of a `config.json`, a dict with keys of either generation of transformers."""
        ...

    def weights(self, config: ModelConfig) -> Weights:
        """Where the checkpoint keeps each parameter, by its dotted path ("blocks.0.mixer.q.weight")."""
        ...


def supported() -> tuple[str, ...]:
    """Every `model_type` that can be read: the names of the files in this folder."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if name != "common"))


def find(model_type: object) -> Family:
    """The family of a checkpoint's `model_type`; ValueError with the supported list when there is none."""
    name = model_type if isinstance(model_type, str) else ""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name not in supported():
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(supported())}. A new family is "
            "one file in model/families with config() and weights()."
        )
    return cast(Family, importlib.import_module(f".{name}", __name__))
