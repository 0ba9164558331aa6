"""Tensors as a checkpoint folder stores them: safetensors, read through a memory map, never a pickle.

The format is 8 bytes of header length, a JSON header that gives each tensor's dtype, shape and place, then the
bytes (https://huggingface.co/docs/safetensors). A folder has one `model.safetensors`, or shards that
`model.safetensors.index.json` lists. Nothing is read until a view of it is copied.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError naming the file and the place where it breaks."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a JSON {type(value).__name__}, but an object is needed; fetch it again"
        )
    return value


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes start..stop of the file, of a stored dtype's name and a shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _header(file: Path) -> dict[str, Entry]:
    """The entries of one safetensors file, checked against the file's size."""
    broken = f"{file} is not a whole safetensors file"
    again = "fetch the file again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{broken}: it has {size} bytes, its header alone needs {8 + length}; {again}")
        try:
            table = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{broken}: its header is not JSON ({error}); {again}") from error
    entries = {}
    try:
        for name, fact in table.items():
            if name != "__metadata__":
                start, stop = (8 + length + int(offset) for offset in fact["data_offsets"])
                shape = tuple(int(extent) for extent in fact["shape"])
                entries[name] = Entry(file, str(fact["dtype"]), shape, start, stop)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{broken}: its header is malformed ({error!r}); {again}") from error
    for name, entry in entries.items():
        if entry.stop > size:
            raise ValueError(
                f"{broken}: it has {size} bytes, tensor {name} ends at byte {entry.stop} (a download that broke "
                f"off?); {again}"
            )
        stored = DTYPES.get(entry.dtype)
        if stored and math.prod(entry.shape) * stored.itemsize != entry.stop - entry.start:
            raise ValueError(
                f"{broken}: tensor {name} of shape {entry.shape} and dtype {entry.dtype} has "
                f"{entry.stop - entry.start} bytes; {again}"
            )
    return entries


class Reader:
    """The tensors of a folder by name. Headers are read when a tensor of their file is first asked for."""

    def __init__(self, folder: Path, weight_map: dict[str, Path]):
        self.folder, self._files = folder, weight_map
        self._headers: dict[Path, dict[str, Entry]] = {}

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def entry(self, name: str) -> Entry:
        file = self._files[name]
        if file not in self._headers:
            self._headers[file] = _header(file)
        if name not in self._headers[file]:
            raise ValueError(
                f"{self.folder / INDEX} says that {file.name} holds {name}, but it does not; fetch both again"
            )
        return self._headers[file][name]

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file: nothing is read until it is copied."""
        entry = self.entry(name)
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{entry.file}: tensor {name} is stored as {entry.dtype}; weights are read from "
                f"{', '.join(DTYPES)}. Load the unquantised checkpoint and quantise it with a transform."
            )
        if entry.start == entry.stop:
            return np.zeros(entry.shape, DTYPES[entry.dtype])
        data = np.memmap(entry.file, np.uint8, "r", entry.start, (entry.stop - entry.start,))
        return data.view(np.ndarray).view(DTYPES[entry.dtype]).reshape(entry.shape)


def open_checkpoint(folder: str | Path) -> Reader:
    """A reader of `folder`'s tensors; ValueError with the remedy where there is nothing that we read."""
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return Reader(folder, dict.fromkeys(_header(folder / SINGLE), folder / SINGLE))
    if not (folder / INDEX).is_file():
        raise ValueError(_nothing_to_read(folder))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of tensor names to files; fetch it again")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{folder / INDEX} names the shard {file!r}, which is not in {folder}; fetch it")
    return Reader(folder, {name: folder / file for name, file in weight_map.items()})


def _nothing_to_read(folder: Path) -> str:
    """Why a folder has no tensors for us, and what to do."""
    if not folder.is_dir():
        return f"{folder} is not a folder; give a checkpoint's folder or a Hub name such as 'org/name'"
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    wanted = f"{folder} has neither {SINGLE} nor {INDEX}"
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        return (
            f"{wanted}, only pickled weights ({', '.join(pickles[:3])}); a pickle can run code and is never read. "
            "Convert it where you trust it: transformers' save_pretrained writes safetensors."
        )
    if any(name.endswith(".gguf") for name in files):
        return (
            f"{wanted}, only GGUF files, which are not read; fetch the safetensors checkpoint they came from"
        )
    others = [name for name in files if name.endswith(".safetensors")]
    if others:
        return f"{wanted}, but {', '.join(others[:3])}; rename a whole model's file to {SINGLE}"
    return (
        f"{wanted}; it holds {', '.join(files[:8]) or 'no files'}. Fetch the checkpoint's safetensors files."
    )
