"""Telemetry: turns what the engine saw of its steps into lines of a file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import jax

from ...attention.batch import Shape
from ...model.config import ModelConfig
from ...model.transforms.quantisation import parameter_count
from .bound import bound
from .ceilings import Ceilings, measure
from .counters import Counters, Widths
from .lines import Run, Step, Totals, line, step_line

if TYPE_CHECKING:
    from .engine import MeasuredEngine

FLUSH_SECONDS = 0.5
SMOOTHING = 0.1
NEVER = float("inf")


@dataclass(slots=True)
class Flight:
    """A dispatched step, as the host sees it. Times are s of `time.perf_counter`.

    sent: when it was dispatched. The device finished between busy_at, when the host last saw it at work, and
    ready_at, when the host first knew that it was done; `waited` says that the host was waiting then, so ready_at
    is exact. rested: the engine had nothing to do before it.
    decodes, chunks and heads are what `Counters.count` takes; room: more tokens would have fitted.
    """

    token: Any
    step: int
    time: float
    shape: Shape
    decodes: list[int]
    chunks: list[tuple[int, int]]
    heads: int
    sampled: int
    waiting: int
    running: int
    room: bool
    pages: tuple[int, int, int]
    lookup_tokens: int
    hit_tokens: int
    preemptions: int
    sent: float
    rested: bool
    busy_at: float = 0.0
    ready_at: float = NEVER
    waited: bool = False
    generated: int = 0

    def look(self) -> None:
        """Note whether the device is done, without waiting."""
        if self.ready_at == NEVER:
            if self.token.is_ready():
                self.ready_at = time.perf_counter()
            else:
                self.busy_at = time.perf_counter()


class Telemetry:
    """Writes a line a step to a file, for one LLM: `LLM(telemetry=Telemetry("run.jsonl"))`, or the path alone.

    Args:
        path: JSON lines (`lines`). A telemetry file that is there already gets a further run.
        ceilings: what the device can do; None: measured once a process, in about 0.6 s (`ceilings.measure`).
        flush_seconds: how long a line may stay in memory while steps go on.

    `totals` holds the sums so far. A step's line is made while the device computes the next one, so it costs time
    only where the host is late anyway. Raises ValueError where `path` cannot be written or holds something else.
    """

    def __init__(
        self, path: str | Path, *, ceilings: Ceilings | None = None, flush_seconds: float = FLUSH_SECONDS
    ):
        self.path, self.ceilings, self.flush_seconds = Path(path), ceilings, flush_seconds
        self.totals = Totals()
        self.run: Run | None = None
        self._file: TextIO = _open(self.path)
        self._pending: list[Flight] = []
        self._flushed = self._done = 0.0
        self._usual: dict[Shape, float] = {}  # s
        self._preemptions = 0

    @classmethod
    def of(cls, given: str | Path | Telemetry | None) -> Telemetry | None:
        """What `LLM(telemetry=...)` takes."""
        return given if given is None or isinstance(given, Telemetry) else cls(given)

    def replica(self, index: int) -> Telemetry:
        """For a further replica of the LLM: "run.jsonl" becomes "run.1.jsonl"."""
        path = self.path.with_name(f"{self.path.stem}.{index}{self.path.suffix}")
        return Telemetry(path, ceilings=self.ceilings, flush_seconds=self.flush_seconds)

    def start(self, name: str, config: ModelConfig, engine: MeasuredEngine) -> None:
        """Begin a run: measure the ceilings and write the header."""
        if self.run is not None:
            raise ValueError(
                f"this Telemetry writes {self.path} for {self.run.model} already; make one for each LLM"
            )
        programs, pages, scheduler = engine.programs, engine.pages, engine.scheduler
        leaves = jax.tree.leaves(programs.params)
        size, count = sum(leaf.nbytes for leaf in leaves), parameter_count(config)
        dtype = jax.tree.leaves(programs.state)[0].dtype  # what is remembered has the activations' dtype
        device = next(iter(leaves[0].devices()))
        self.ceilings = self.ceilings or measure(device, str(dtype))
        self._counters = Counters(config, Widths(size / count, dtype.itemsize, dtype.itemsize))
        self.run = Run(
            time.time(), name, device.device_kind, str(dtype), self.ceilings.bandwidth, self.ceilings.compute,
            scheduler.max_num_seqs, scheduler.budget, pages.num_pages - 1, pages.page_size, size,
        )  # fmt: skip
        self._file.write(line("run", self.run))
        self._file.flush()

    def add(self, flight: Flight) -> None:
        """A step was read; its line is made by the next `write`."""
        self._pending.append(flight)

    def write(self, flush: bool = False) -> None:
        """Make the lines of the steps that were read; they reach the file within `flush_seconds`, or now."""
        for flight in self._pending:
            assert self.run is not None
            step = self._step(flight)
            self.totals.add(step, self.run)
            self._file.write(step_line(step))
        self._pending.clear()
        now = time.perf_counter()
        if flush or now - self._flushed > self.flush_seconds:
            self._flushed = now
            self._file.flush()

    def close(self) -> None:
        """Write what is left and the summary; nothing when it is closed already."""
        if not self._file.closed:
            self.write()
            if self.run is not None:
                self._file.write(line("summary", self.totals))
            self._file.close()

    def _times(self, flight: Flight) -> tuple[float, float]:
        """(seconds the device had this step, seconds it waited for the host before it).

        The device begins a step when it was dispatched and the one before is done. Where the host waited for its
        end, that is known. Else it lies between two looks, and the usual time of this shape says where; without
        such a time, when it was first seen done: then the gap is at least what is said.
        """
        start = max(flight.sent, self._done)
        gap = 0.0 if flight.rested else max(0.0, flight.sent - self._done)
        shape = flight.shape
        usual, took = self._usual.get(shape), flight.ready_at - start
        if flight.waited:
            self._usual[shape] = took if usual is None else usual + SMOOTHING * (took - usual)
        elif usual is not None:
            took = min(took, max(usual, flight.busy_at - start))
        self._done = start + max(took, 0.0)
        return self._done - start, gap

    def _step(self, flight: Flight) -> Step:
        assert self.run is not None and self.ceilings is not None
        device_s, gap = self._times(flight)
        step_s = device_s + gap
        moved, flops = self._counters.count(flight.decodes, flight.chunks, flight.heads)
        over = 1 / step_s if step_s > 0 else 0.0
        bandwidth, compute = moved * over / self.ceilings.bandwidth, flops * over / self.ceilings.compute
        preempted, self._preemptions = flight.preemptions - self._preemptions, flight.preemptions
        shape, decodes = flight.shape, len(flight.decodes)
        prompt = sum(count for _, count in flight.chunks)
        binds = bound(
            step_s=step_s, host_gap_s=gap, bandwidth_share=bandwidth, compute_share=compute,
            waiting=flight.waiting, running=flight.running, seats=self.run.seats, room=flight.room,
            preempted=preempted,
        )  # fmt: skip
        return Step(
            flight.step, flight.time, shape.kind, [shape.B, shape.q, shape.R, shape.C], decodes, prompt,
            decodes + prompt, shape.T, flight.sampled, flight.generated, flight.waiting, flight.running,
            *flight.pages, flight.lookup_tokens, flight.hit_tokens, flight.preemptions, moved, flops, step_s,
            device_s, gap, bandwidth, compute, binds,
        )  # fmt: skip


def _open(path: Path) -> TextIO:
    """The file to append to; a torn last line is cut off. ValueError when it holds something else."""
    try:
        if path.exists() and path.stat().st_size:
            with path.open("rb+") as file:
                head = file.readline()
                if not head.startswith(b'{"line": "run"'):
                    raise ValueError(
                        f"{path} is there already and holds no telemetry, so nothing is appended; give telemetry "
                        f"another path"
                    )
                file.truncate(_whole(file))
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write telemetry to {path}: {error.strerror}; give another path") from None


def _whole(file: BinaryIO) -> int:
    """Bytes up to the end of the last complete line; lines are far shorter than what is read here."""
    at = max(0, file.seek(0, 2) - (1 << 16))
    file.seek(at)
    return at + file.read().rfind(b"\n") + 1
