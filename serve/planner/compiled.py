"""The engine's own programs, compiled for a slice that is not here: what they take, and what they send."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from ...attention.batch import Shape
from ..compiled import Job
from ..programs import Programs
from ..sampling.sampler import Sampler, SamplerState, Starter
from .floors import Work, backbone_work, head_work
from .memory import Case
from .schedule import Collective, collectives


@dataclass(frozen=True)
class Program:
    """A compiled program. Bytes are one device's: arguments as predicted (None: not predicted) and as the executable
    has them, temporaries, results that are not written in place, code. collectives: None where the compiler's text
    cannot be read."""

    name: str
    seconds: float
    predicted_arguments: int | None
    arguments: int
    temporaries: int
    results: int
    code: int
    collectives: tuple[Collective, ...] | None
    work: Work | None = None

    @property
    def deviation(self) -> float | None:
        """Predicted arguments over actual ones, minus 1."""
        return None if self.predicted_arguments is None else self.predicted_arguments / self.arguments - 1


@dataclass(frozen=True)
class PlannedSampler(Sampler):
    """A sampler whose state has shapes and places, but no numbers."""

    def start(self, compiler: Starter, sharding: jax.sharding.Sharding | None) -> SamplerState:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self.init),
        )


class TooLarge(ValueError):
    """The compiler found no room for a program; the message is its own."""


class PlannedPrograms(Programs):
    """The programs of an engine that is not built: they lower and compile, and there is nothing to run them on."""

    @staticmethod
    def of(case: Case) -> PlannedPrograms:
        sampler = PlannedSampler(case.config.vocab_size, case.seats, case.sampler.processors)
        return PlannedPrograms(
            case.graphdef, case.params, case.state(case.pages), sampler, case.buckets,
            page_size=case.page_size, width=case.width, period=case.period, whole=case.place.whole,
            tokens=case.step_tokens,
        )  # fmt: skip

    def chosen(self, full: bool) -> dict[Any, Any]:
        """Jobs by key: the backbones of the widest decode and of the largest prefill, or all programs."""
        jobs, plan = self._jobs(), self.plan
        wanted = (plan.shape(plan.max_num_seqs, 0), plan.shape(0, plan.chunks[-1]))
        return jobs if full else {key: jobs[key] for key in wanted}


def compile_programs(case: Case, full: bool) -> Iterator[Program]:
    """The programs of a case, one after the other; `TooLarge` where one has no room."""
    case = replace(case, devices=tuple(case.topology.compile_only()))
    for key, job in PlannedPrograms.of(case).chosen(full).items():
        yield compile_program(case, key, job)


def compile_program(case: Case, key: Any, job: Job) -> Program:
    """One of the programs of a case on compile-only devices; `TooLarge` where it has no room."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        executable = _compile(job, Path(folder))
        seconds, text = time.perf_counter() - started, _text(executable, Path(folder))
    return _read(case, key, executable, text, seconds)


def _compile(job: Job, folder: Path) -> Any:
    """The executable; libtpu writes what it makes of the program to `folder`."""
    try:
        return job.compile(xla_dump_to=str(folder), xla_dump_hlo_as_text=True)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(str(error).splitlines()[0]) from error


def _read(case: Case, key: Any, executable: Any, text: str | None, seconds: float) -> Program:
    """What a report says of one executable; `text`, its schedule."""
    memory, mesh = executable.memory_analysis(), dict(case.place.mesh.shape)
    found = None if text is None else tuple(collectives(text, mesh))
    sent = None if found is None else sum(one.sent for one in found)
    name, predicted, floor = str(key), None, None
    if isinstance(key, Shape):
        name, predicted = _name(key), case.arguments(head=False)
        floor = backbone_work(case, name, [case.length] * key.B, [(0, key.C)] if key.C else [], sent)
    elif isinstance(key, tuple):
        name = f"{key[0]}_{key[1]}"
        if key[0] == "head":
            predicted, floor = case.arguments(head=True), head_work(case, name, key[1], sent or 0.0)
    return Program(
        name, seconds, predicted, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes, memory.generated_code_size_in_bytes, found, floor,
    )  # fmt: skip


def _name(shape: Shape) -> str:
    return f"{shape.kind}_B{shape.B}_C{shape.C}"


def _text(executable: Any, folder: Path) -> str | None:
    """The scheduled program as libtpu wrote it to `folder`. What it hands over in memory says the same, but JAX's own
    XLA, of another version, cannot always read that; None when neither can be had."""
    files = list(folder.glob("*after_optimizations_after_buffer_assignment.txt"))
    if files:
        return files[0].read_text()
    try:
        return executable.as_text()
    except jax.errors.JaxRuntimeError:
        return None
