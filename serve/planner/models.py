"""The models that can be planned by name: `sharding/models/NAME.json`, as publishers' config.json files say."""

from __future__ import annotations

import difflib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ... import sharding
from ...model import checkpoint
from ...model.config import ModelConfig

PUBLISHED = files(sharding) / "models"


def names() -> list[str]:
    """Every model that is known by name."""
    return sorted(
        entry.name.removesuffix(".json") for entry in PUBLISHED.iterdir() if entry.name.endswith(".json")
    )


def find(model: str | Path | dict[str, Any] | ModelConfig) -> tuple[str, ModelConfig]:
    """(name, config) of a known model's name (with or without its publisher), of a checkpoint's folder, of a path of a
    config.json, or of what such a file holds. Nothing is downloaded. ValueError with the nearest name."""
    if isinstance(model, ModelConfig):
        return model.model_type, model
    if isinstance(model, dict):
        return str(model.get("model_type")), checkpoint.read_config(model)
    path = Path(model)
    if path.is_dir():
        return path.name, checkpoint.load_config(path)[1]
    if path.is_file():
        return path.stem, checkpoint.read_config(json.loads(path.read_text()))
    name = path.name.lower()
    entry = PUBLISHED / f"{name}.json"
    if name and entry.is_file():
        return name, checkpoint.read_config(json.loads(entry.read_text()))
    known = names()
    near = difflib.get_close_matches(name, known, 1, 0.0)
    raise ValueError(
        f"model {str(model)!r} is neither a folder nor a config.json, nor known by name; the nearest is {near[0]}. "
        f"Known: {', '.join(known)}. Fetch the config.json of any other and give its path."
    )
