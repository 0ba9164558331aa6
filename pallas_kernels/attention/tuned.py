"""Measured tiles: a table a chip, kept in the user's cache directory and carried by back ends as static data.

A table is read where back ends are chosen, never by an import. It is one JSON file,
<cache>/tokenloom/tiles/<chip>-v<VERSION>.json, where <cache> is XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..chips import Chip
from .tiles import Case

T = TypeVar("T")
VERSION = 1


@dataclass(frozen=True)
class Tuned(Generic[T]):
    """Pairs of a case and the tiles measured for it. The hash ignores them, because jit hashes static data at every
    call and a process has one table or two."""

    entries: tuple[tuple[Case, T], ...] = field(default=(), hash=False)

    def lookup(self, case: Case) -> T | None:
        """The tiles measured for this case, else those of the nearest (`distance`; the smaller case of two equally
        near), else None."""
        near = [(distance(case, other), other, tiles) for other, tiles in self.entries]
        near = [found for found in near if found[0] < math.inf]
        return min(near, key=lambda found: found[:2])[2] if near else None


def distance(case: Case, other: Case) -> float:
    """How far a measured case lies from another, in doublings of prompt tokens, KV heads and table width.

    Infinite where tiles would not fit, or mean something else: another part, query tokens a row, group, head dim,
    page size or dtype.
    """
    alike = ("part", "group", "head_dim", "page_size", "q_dtype", "kv_dtype")
    if case.part == "rows":
        alike += ("tokens",)
    if any(getattr(case, name) != getattr(other, name) for name in alike):
        return math.inf
    sizes = ("tokens", "kv_heads", "width")
    return sum(abs(math.log2(getattr(case, name) / getattr(other, name))) for name in sizes)


def tiles_folder() -> Path:
    """Where this user's tables lie."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tokenloom" / "tiles"


def table_path(folder: Path, chip: Chip) -> Path:
    """The file of this chip and of this version of tables."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', chip.name.lower()).strip('-')}-v{VERSION}.json"


def load(folder: Path, chip: Chip, kind: type[T]) -> Tuned[T]:
    """The table of tiles of this kind; empty when there is no file, or one of another version.

    Entries whose tiles have other fields than `kind` has now are left out: they were measured for another kernel.
    ValueError for a file that cannot be read.
    """
    path = table_path(folder, chip)
    names = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    mine = [one for one in _entries(path) if one["kernel"] == kind.__name__ and set(one["tiles"]) == names]
    try:
        pairs = [(_made(Case, one["case"], 1), _made(kind, one["tiles"], 0)) for one in mine]
    except ValueError as error:
        raise _broken(path, error) from None
    return Tuned(tuple(sorted(pairs, key=lambda pair: pair[0])))


def save(folder: Path, chip: Chip, measured: Iterable[tuple[Case, Any, dict[str, float]]]) -> Path:
    """Add measured cases, (case, tiles, figures), to the chip's table, in place of what it says of the same cases.

    Written beside the file and moved over it, so that a reader sees the old table or the new one. ValueError when
    the folder cannot be written, or when the present file is broken.
    """
    path = table_path(folder, chip)
    measured = list(measured)
    new = [
        {"kernel": type(tiles).__name__, "case": asdict(case), "tiles": asdict(tiles), "figures": figures}
        for case, tiles, figures in measured
    ]
    again = [(one["kernel"], one["case"]) for one in new]
    kept = [one for one in _entries(path) if (one["kernel"], one["case"]) not in again]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json.new", delete=False) as file:
            json.dump({"version": VERSION, "chip": chip.name, "entries": kept + new}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        raise ValueError(
            f"the table of tiles {path} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that "
            "can be"
        ) from None
    return path


def _entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file as they are; none where there is no file of this version."""
    try:
        table = json.loads(path.read_text())
        if table["version"] != VERSION:
            return []
        for one in table["entries"]:
            if not isinstance(one["kernel"], str) or not isinstance(one["tiles"], dict):
                raise TypeError("an entry names a kernel and has tiles")
            _made(Case, one["case"], 1)
        return table["entries"]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _broken(path, error) from None


def _made(kind: type[T], values: dict[str, Any], least: int) -> T:
    """A `Case` or tiles from JSON; ValueError when a field is missing, of another type, or under `least`."""
    for one in fields(kind):  # type: ignore[arg-type]
        wanted = {"str": str, "int": int}[str(one.type)]
        value = values.get(one.name)
        if type(value) is not wanted or (isinstance(value, int) and value < least):
            raise ValueError(
                f"{one.name}={value!r} of {kind.__name__} must be {wanted.__name__}, {least} or more"
            )
    return kind(**values)


def _broken(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is not a readable table of tiles ({type(error).__name__}: {error}); delete it, and measure again "
        "with `tokenloom tune`"
    )
