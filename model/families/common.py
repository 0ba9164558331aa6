"""What families share: where a weight comes from, and how both generations of config keys are read.

A family is a module named by the checkpoint's `model_type` that exports two functions:

- `config(raw) -> ModelConfig`: the facts of a `config.json` (a dict)
- `weights(config) -> dict[str, Source | Stack]`: for each of our parameters, by its dotted path in the decoder
  ("blocks.0.mixer.q.weight"), where the checkpoint keeps it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Source:
    """One stored tensor, whole or in `part` (a function of the stored array: a slice, a transpose)."""

    name: str
    part: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Stack:
    """Several stored tensors stacked along a new leading axis (experts)."""

    sources: tuple[Source, ...]
