"""From what people call a model to a folder: a path, a packaged model, or a name on the Hugging Face Hub."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

PACKAGED = {"demo": "demo", "demo-draft": "demo_draft"}
"""Models that ship with the package, and their folders beside this file."""

WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
UNWANTED = ("*/*", "consolidated*", "*.gguf", "*.bin", "*.pt", "*.pth")


def resolve(model: str | Path) -> Path:
    """The folder of a model: "demo", a local folder, or "org/name" fetched from the Hub (or its cache).

    A local folder wins over a Hub name; only a folder called "demo" must be written as a path ("./demo").
    """
    if isinstance(model, str) and model in PACKAGED:
        folder = Path(str(resources.files("tokenloom.model") / PACKAGED[model]))
        if not folder.is_dir():
            raise ValueError(f"the packaged model {model!r} is not in {folder.parent}; reinstall the package")
        return folder
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"{path} is a file; give the folder that holds config.json and the weights: {path.parent}"
        )
    if isinstance(model, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
        return _fetch(model)
    raise ValueError(
        f"there is no folder {str(model)!r}; give a checkpoint's folder, a Hub name such as 'org/name', or one of "
        f"the packaged models: {', '.join(PACKAGED)}"
    )


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except Exception as error:  # every layer below (http, cache, permissions) raises its own kinds
        raise ValueError(
            f"{name!r} is no local folder, and fetching it from the Hub failed ({type(error).__name__}: {error}); "
            "check the name and the connection (private models need a login), or download the checkpoint "
            "elsewhere and give its folder"
        ) from error
