"""The lines of a telemetry file: one JSON object each, `{"line": "run" | "step" | "summary", ...}`.

A run begins with a "run" line, goes on with a "step" line for each step, and ends with a "summary" line if it was
closed. A file may hold several runs, one after the other.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from .bound import BOUNDS

FORMAT = "tokenloom telemetry 1"


class Step(NamedTuple):
    """One step. Counts of requests, pages and cache are those when it was dispatched.

    time            s since 1970, when it was dispatched
    kind, shape     "prefill", "decode", "mixed" or "verify", and the program's (B, q, R, C)
    decodes         rows that computed one token
    prompt_tokens   prompt tokens computed
    tokens          the real ones: decodes + prompt_tokens
    padded_tokens   those that the program computed
    sampled         rows that sampled; generated: tokens that reached a request when the step was read
    pages_used      pages that someone owns; pages_cached: those in the prefix cache, owned or not
    lookup_tokens, hit_tokens, preemptions   since the engine began
    bytes, flops    see `counters`
    step_s          from the end of the step before (or from its own dispatch after a rest) to its end
    device_s        the part of it in which the device had this step to do; host_gap_s: the rest, in which it
                    waited for the host
    bandwidth_share, compute_share           of the measured ceilings, over step_s; 0 where step_s is, which
                    happens when the host wakes late and finds two steps done: their sum is right
    bound           what binds (`bound`)
    """

    step: int
    time: float
    kind: str
    shape: list[int]
    decodes: int
    prompt_tokens: int
    tokens: int
    padded_tokens: int
    sampled: int
    generated: int
    waiting: int
    running: int
    pages_free: int
    pages_used: int
    pages_cached: int
    lookup_tokens: int
    hit_tokens: int
    preemptions: int
    bytes: int
    flops: int
    step_s: float
    device_s: float
    host_gap_s: float
    bandwidth_share: float
    compute_share: float
    bound: str


@dataclass(frozen=True)
class Run:
    """What a run is about: the model, the device, its ceilings (bytes/s, FLOP/s), and the engine's sizes."""

    time: float
    model: str
    device: str
    dtype: str
    bandwidth: float
    compute: float
    seats: int
    budget: int
    pages: int
    page_size: int
    weight_bytes: int
    format: str = FORMAT


@dataclass
class Totals:
    """Sums over steps, and what they say. Times in seconds; `bound_s` is the time that each bound held."""

    steps: int = 0
    decodes: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    generated: int = 0
    bytes: int = 0
    flops: int = 0
    step_s: float = 0.0
    device_s: float = 0.0
    host_gap_s: float = 0.0
    bandwidth_share: float = 0.0
    compute_share: float = 0.0
    waste: float = 0.0
    bound_s: dict[str, float] = field(default_factory=dict)

    def add(self, step: Step, run: Run) -> None:
        """Take in a step of `run`."""
        self.steps += 1
        self.decodes += step.decodes
        self.prompt_tokens += step.prompt_tokens
        self.tokens += step.tokens
        self.padded_tokens += step.padded_tokens
        self.generated += step.generated
        self.bytes += step.bytes
        self.flops += step.flops
        self.step_s += step.step_s
        self.device_s += step.device_s
        self.host_gap_s += step.host_gap_s
        if self.step_s > 0:
            self.bandwidth_share = self.bytes / run.bandwidth / self.step_s
            self.compute_share = self.flops / run.compute / self.step_s
        self.waste = 1 - self.tokens / self.padded_tokens
        self.bound_s[step.bound] = self.bound_s.get(step.bound, 0.0) + step.step_s

    @staticmethod
    def of(steps: list[Step], run: Run) -> Totals:
        totals = Totals()
        for step in steps:
            totals.add(step, run)
        return totals

    @property
    def bound(self) -> str | None:
        """What bound for most of the time."""
        return max(self.bound_s, key=self.bound_s.__getitem__) if self.bound_s else None


@dataclass
class Record:
    """A run as read back: its header, its steps, and its summary if it was closed."""

    run: Run
    steps: list[Step] = field(default_factory=list)
    summary: Totals | None = None


_KINDS = get_type_hints(Step)
_FORMS = {int: "%d", float: "%.9g", str: '"%s"'}
_SPECIAL = {"time": "%.6f", "shape": "[%d,%d,%d,%d]"}
_PARTS = [f'"{name}":{_SPECIAL.get(name) or _FORMS[kind]}' for name, kind in _KINDS.items()]
_TEMPLATE = '{"line":"step",' + ",".join(_PARTS) + "}\n"
_PLACE = Step._fields.index("shape")


def step_line(step: Step) -> str:
    """The step as a line of JSON (json.dumps would take five times as long)."""
    return _TEMPLATE % (*step[:_PLACE], *step.shape, *step[_PLACE + 1 :])


def line(kind: str, facts: Run | Totals) -> str:
    """A "run" or "summary" line."""
    return json.dumps({"line": kind, **asdict(facts)}) + "\n"


class Follower:
    """Reads a telemetry file as it grows: `poll` takes in what was added and returns the runs so far.

    A last line that is not complete yet is left for later. ValueError for a line that is not telemetry, naming
    file and line. keep: how many steps of a run stay in memory, or twice as many; None: all.
    """

    def __init__(self, path: str | Path, keep: int | None = None):
        self.path, self.keep, self.records = Path(path), keep, list[Record]()
        self._offset = self._number = 0
        self._rest = b""

    def poll(self) -> list[Record]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError as error:
            raise ValueError(f"cannot read telemetry from {self.path}: {error.strerror}") from None
        self._offset += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        for text in whole:
            self._number += 1
            self._take(text)
        return self.records

    def _take(self, text: bytes) -> None:
        try:
            facts = json.loads(text)
            kind = facts.pop("line")
            if kind == "run":
                self.records.append(Record(_run(facts)))
            elif kind == "step":
                steps = self.records[-1].steps
                steps.append(_step(facts))
                if self.keep is not None and len(steps) > 2 * self.keep:
                    del steps[: -self.keep]
            elif kind == "summary":
                self.records[-1].summary = Totals(**facts)
            else:
                raise ValueError(f"line {kind!r}")
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{self.path}, line {self._number} is not telemetry of this version ({FORMAT!r}; "
                f"{type(error).__name__}: {error}): {text[:60].decode(errors='replace')!r}; give a file that "
                f"LLM(telemetry=...) wrote"
            ) from None


def read(path: str | Path) -> list[Record]:
    """The runs of a telemetry file, the newest last. A torn last line (a crash) is skipped; ValueError, naming file
    and line, for lines that are not telemetry and for a file without any."""
    records = Follower(path).poll()
    if not records:
        raise ValueError(f"{path} holds no telemetry yet; give a file that LLM(telemetry=...) wrote")
    return records


def _run(facts: dict[str, Any]) -> Run:
    if facts.get("format") != FORMAT:
        raise ValueError(f"format {facts.get('format')!r}")
    return Run(**facts)


def _step(facts: dict[str, Any]) -> Step:
    step = Step(**facts)
    for name, value, kind in zip(Step._fields, step, _KINDS.values()):
        wanted = {int: int, float: (int, float), str: str}.get(kind, list)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r}")
    if step.bound not in BOUNDS or len(step.shape) != 4:
        raise ValueError(f"bound={step.bound!r}, shape={step.shape}")
    return step
