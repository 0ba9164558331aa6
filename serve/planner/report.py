"""What a plan says, as data: every figure of a table, of JSON and of a plot comes from here.

Bytes and FLOPs are of one device of one replica unless a name says otherwise; times are seconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .compiled import Program
from .floors import Work
from .memory import Memory


@dataclass(frozen=True)
class Model:
    """name, parameters (numbers, all of them), layers, heads as (query, KV), dtype of weights and activations."""

    name: str
    parameters: int
    layers: int
    heads: tuple[tuple[int, int], ...]
    dtype: str


@dataclass(frozen=True)
class Slice:
    """A topology by both names, with its chips, JAX devices and hosts."""

    name: str
    cloud: str
    chips: int
    devices: int
    hosts: int


@dataclass(frozen=True)
class Room:
    """kv_bytes_per_token of a whole replica, and of one device (padding included); how many sequences of max_model_len
    tokens fit into one replica at once; its pages, and tokens in each."""

    kv_bytes_per_token: int
    kv_bytes_per_token_per_device: int
    sequences: int
    pages: int
    page_size: int


@dataclass(frozen=True)
class Alternative:
    """Another plan of the same slice. runs: the engine has it today. sequences: that fit, over all replicas;
    decode_s: the floor of a decode step with every seat at max_model_len; tokens_per_second: of all replicas, at that
    floor (0 where it does not fit)."""

    plan: str
    runs: bool
    fits: bool
    sequences: int
    decode_s: float
    tokens_per_second: float


@dataclass(frozen=True)
class Report:
    """A model on a slice.

    plan: as `--plan` takes it. fits: weights, state and temporaries, with every seat at max_model_len. runs: the engine
    of today can be started so; `notes` says why not, and what else to know. why: what made `auto` choose the plan.
    advice: what would make it fit, each tried. memory is predicted; `programs` are compiled ones (empty without
    compiling), `work` the floors of a decode step, its head and the largest prefill.
    """

    model: Model
    slice: Slice
    plan: str
    fits: bool
    runs: bool
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_dtype: str
    memory: Memory
    room: Room
    work: tuple[Work, ...]
    alternatives: tuple[Alternative, ...]
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    programs: tuple[Program, ...] = ()
    why: tuple[str, ...] = ()

    @property
    def compiled_bytes(self) -> int | None:
        """Bytes of a device that weights, state and the hungriest compiled program need; None without compiling."""
        more = [one.temporaries + one.results + one.code for one in self.programs]
        resident = self.memory.needed - self.memory.temporaries
        return resident + max(more) if more else None

    @property
    def floors(self) -> tuple[Work, ...]:
        """Of compiled programs, with what they send; of those that were not compiled, as predicted."""
        compiled = [one.work for one in self.programs if one.work is not None]
        kinds = {one.program.split("_")[0] for one in compiled}
        return (*compiled, *(one for one in self.work if one.program not in kinds))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with what properties say of memory, floors and programs beside their figures."""
        found = asdict(self)
        found["memory"] |= {"needed": self.memory.needed, "free": self.memory.free}
        found["compiled_bytes"] = self.compiled_bytes
        for data, work in zip(found["work"], self.work, strict=True):
            data |= {"binds": work.binds, "seconds": work.seconds}
        for data, program in zip(found["programs"], self.programs, strict=True):
            data["deviation"] = program.deviation
            if program.work is not None:
                data["work"] |= {"binds": program.work.binds, "seconds": program.work.seconds}
            for one, collective in zip(data["collectives"] or (), program.collectives or (), strict=True):
                one["sent"] = collective.sent
        return found

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    def plot(self, path: str | Path) -> None:
        """Draw memory and floors to a .png, .svg or .pdf file; needs matplotlib (the `plots` extra)."""
        from .plot import draw

        draw(self, Path(path))

    def __str__(self) -> str:
        from .table import as_text

        return as_text(self)
