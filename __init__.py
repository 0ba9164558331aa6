"""Tokenloom: a JAX/XLA inference stack for language models. See README.md.

Nothing is imported until it is used, so `import tokenloom` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .serve.llm import LLM
    from .serve.outputs import CompletionOutput, RequestOutput
    from .serve.sampling.params import SamplingParams

_HOMES = {
    "LLM": "serve.llm",
    "SamplingParams": "serve.sampling.params",
    "RequestOutput": "serve.outputs",
    "CompletionOutput": "serve.outputs",
}

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"tokenloom has no {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
