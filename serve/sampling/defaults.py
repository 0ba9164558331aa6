"""What a checkpoint's generation_config.json asks of requests that say nothing themselves, as in vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...model.checkpoint import load_generation_config
from .params import SamplingParams

NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def default_sampling_params(folder: Path | None) -> SamplingParams:
    """The file's temperature, top_k, top_p, min_p, repetition_penalty and max_new_tokens; `do_sample` false: greedy.
    Neutral without a folder or a file. ValueError for values that cannot be."""
    found = {} if folder is None else load_generation_config(folder)
    settings: dict[str, Any] = {name: found[name] for name in NAMES if name in found}
    if found.get("do_sample") is False:
        settings = {"temperature": 0.0} | {
            name: value for name, value in settings.items() if name == "repetition_penalty"
        }
    if "max_new_tokens" in found:
        settings["max_tokens"] = found["max_new_tokens"]
    try:
        return SamplingParams(**settings)
    except ValueError as error:
        raise ValueError(f"{folder}: generation_config.json: {error}") from error


def asked(defaults: SamplingParams, settings: Mapping[str, Any]) -> SamplingParams:
    """Parameters of a request that names `settings` alone. Mirostat takes the place of top_k, top_p and min_p."""
    given = dict(settings)
    if given.get("mirostat_mode"):
        given = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | given
    return replace(defaults, **given)
