"""tokenloom.plan: a model on a slice of TPUs that is not here, from its config alone.

    report = tokenloom.plan("llama-3.1-70b", "v5e:4x4")
    report.fits, report.advice, report.memory, report.programs

Sizes are predicted from shapes; then the engine's own programs are compiled for the slice by libtpu, and what they
take is compared with the prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...model.config import ModelConfig, MoEConfig
from ...sharding.division import Division, divisions
from ...sharding.topology import GENERATIONS, Topology
from ..build import Build
from . import models
from .choose import choose, decode_work, prefill_work
from .compiled import TooLarge, compile_programs
from .memory import Case
from .report import Alternative, Model, Report, Room, Slice

MOST_SEATS = 256
EIGHT_BITS = ("int8", "fp8", "fp8_e4m3")


def plan(
    model: str | Path | dict[str, Any] | ModelConfig,
    topology: str,
    *,
    plan: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int = 512,
    kv_cache_dtype: str | None = None,
    dtype: str | None = None,
    compile: bool = True,
    full: bool = False,
) -> Report:
    """What `model` needs on `topology`, and how fast it could be at best.

    model: a known name, a config.json (its path or what it holds) or a checkpoint's folder; topology: "v5e:4x4" or
    "v5e-16"; plan: "auto", or factors as in `sharding/division.py`. Sizes are an engine's settings, of one replica;
    max_num_seqs None: as many, in powers of two up to 256, as fit at max_model_len (None: 8,192, or what the model
    can). compile: also compile the widest decode and the largest prefill, or with `full` every program.

    ValueError for what cannot be, naming the nearest that can; a model that does not fit is a report with advice.
    """
    name, config = models.find(model)
    where = Topology.parse(topology)
    build = Build(
        max_model_len=max_model_len, max_num_seqs=max_num_seqs or 1, kv_cache_dtype=kv_cache_dtype,
        max_num_batched_tokens=max_num_batched_tokens,
    )  # fmt: skip
    works = list(_working(config, where, build, dtype, max_num_seqs is None))
    if plan == "auto":
        case, why = choose(works)
    else:
        division = Division.parse(plan, where.devices)
        case, why = _case(config, where, division, build, dtype, works, max_num_seqs is None), ()
    report = _report(name, case, works, why)
    if not compile or not case.fits:
        return report
    return _with_programs(report, case, full)


def _with_programs(report: Report, case: Case, full: bool) -> Report:
    """The report with what the compiler says; a program that it finds no room for is a no after all."""
    programs, notes = [], list(report.notes)
    try:
        programs.extend(compile_programs(case, full))
    except TooLarge as error:
        notes.append(f"a program does not compile: {error}")
        report = replace(report, fits=False, advice=tuple(_advice(case)))
    hungry = [one.name for one in programs if one.temporaries > 2 * case.memory.temporaries + (64 << 20)]
    if hungry:
        notes.append(
            f"{', '.join(hungry)}: temporaries far above the estimate; the compiler copies weights or pages every time"
        )
    return replace(report, notes=tuple(notes), programs=tuple(programs))


def _case(
    config: ModelConfig,
    where: Topology,
    division: Division,
    build: Build,
    dtype: str | None,
    works: list[Case],
    automatic: bool,
) -> Case:
    """The case of a division; ValueError, naming some of those that work, where the shapes do not split so."""
    found = [case for case in works if case.division == division]
    if found:
        return found[0]
    try:
        return _sized(Case.of(config, where, division, build, dtype), automatic)
    except ValueError as error:
        near = ", ".join(case.division.name for case in works[:4])
        raise ValueError(f"{error}. Plans of {where} that work: {near}") from error


def _working(
    config: ModelConfig, where: Topology, build: Build, dtype: str | None, automatic: bool, split: bool = True
) -> Iterator[Case]:
    """Every division of a slice that the model's shapes allow, widest first; `split`: those of texts too. ValueError
    for settings that no division can have."""
    mixture = any(isinstance(block.channel, MoEConfig) for block in config.blocks)
    Case.of(config, where, Division(where.devices, 1), build, dtype)  # what no plan can do is an error
    for division in divisions(where.devices, mixture, split):
        try:
            yield _sized(Case.of(config, where, division, build, dtype), automatic)
        except ValueError:
            continue


def _sized(case: Case, automatic: bool) -> Case:
    """The case, with as many seats as fit (in powers of two) where nobody said how many. ValueError where the model's
    shapes do not split."""
    seats = MOST_SEATS if automatic else case.seats
    while True:
        sized = replace(case, build=replace(case.build, max_num_seqs=seats))
        if sized.fits or not automatic or seats == 1:
            return sized
        seats = min(seats // 2, 1 << max(0, sized.sequences_that_fit.bit_length() - 1))


def _report(name: str, case: Case, works: list[Case], why: tuple[str, ...]) -> Report:
    config, where, build = case.config, case.topology, case.build
    parameters, stored = sum(leaf.size for leaf in case.leaves.values()), str(case.numerics.param_dtype)
    runs, notes = _notes(case)
    return Report(
        Model(name, parameters, config.num_layers, tuple(sorted(config.attention_heads)), stored),
        Slice(where.name, where.cloud, where.chips, where.devices, where.hosts),
        case.division.name, case.fits, runs, case.length, case.seats, build.max_num_batched_tokens, str(case.kv_dtype),
        case.memory,
        Room(case.kv_bytes, case.token_bytes, case.sequences_that_fit, case.pages, case.page_size),
        (*decode_work(case), prefill_work(case)), tuple(_alternative(one) for one in works),
        () if case.fits else tuple(_advice(case)), notes, why=why,
    )  # fmt: skip


def _alternative(case: Case) -> Alternative:
    floor = sum(work.seconds for work in decode_work(case))
    data = case.division.data
    speed = data * case.seats / floor if case.fits else 0.0
    return Alternative(case.division.name, case.runs, case.fits, data * case.sequences_that_fit, floor, speed)


def _notes(case: Case) -> tuple[bool, tuple[str, ...]]:
    """Whether the engine can be started so, and what to know about it."""
    notes = []
    size, place = case.division.size, case.place
    if place.repeats > 1 and case.kv_bytes:
        notes.append(
            f"{place.repeats} devices repeat the keys and values of each KV head: {size} devices share "
            f"{size // place.repeats}"
        )
    if place.contexts > 1:
        notes.append(
            f"{place.contexts} devices share the keys and values of each KV head token by token "
            f"(decode_context_parallel_size={place.contexts})"
        )
    if case.division.seq > 1:
        notes.append(
            f"every text is split over {case.division.seq} groups of devices "
            f"(sequence_parallel_size={case.division.seq}); each reads all weights in every step"
        )
    if case.division.data > 1:
        notes.append(
            f"{case.division.data} replicas share the requests of one engine (data_parallel_size={case.division.data}, "
            f"tensor_parallel_size={size}); sizes and programs are one replica's"
        )
    if case.division.experts:
        count = "/".join(str(experts // size) for experts in sorted(case.config.expert_counts))
        notes.append(
            f"each device has {count} experts of a layer, whole (tensor_parallel_size={size}, "
            f"enable_expert_parallel=True)"
        )
    if case.topology.hosts > 1 and case.division.data > 1:
        notes.append(
            f"planned only: {case.topology} spans {case.topology.hosts} hosts, which together run one replica, not "
            f"{case.division.data}"
        )
    elif case.topology.hosts > 1:
        notes.append(
            f"{case.topology} spans {case.topology.hosts} hosts: run the same script on each (tokenloom.initialize, or "
            f"--coordinator auto on the command line)"
        )
    if case.kv_bytes and case.fits and case.default_pages < case.pages:
        notes.append(
            f"start it with num_pages={case.pages}: by itself an engine leaves a tenth of the memory and 1 GiB free "
            f"and takes {case.default_pages} pages"
        )
    return case.runs, tuple(notes)


def _advice(case: Case) -> Iterator[str]:
    """What would make it fit; each was tried. Where a program does not compile though all was predicted to fit, what
    needs less of the same is no advice."""
    build, where, dtype = case.build, case.topology, str(case.numerics.param_dtype)
    if 0 < case.sequences_that_fit < case.seats:
        yield f"fewer sequences: max_num_seqs={case.sequences_that_fit}"
    shorter = (case.pages_that_fit - 1) // case.seats * case.page_size if case.width else 0
    if not case.fits and 0 < shorter < case.length:
        yield f"shorter sequences: max_model_len={shorter}"
    if not case.fits and case.kv_bytes and build.kv_cache_dtype not in EIGHT_BITS:
        smaller = replace(case, build=replace(build, kv_cache_dtype="int8"))
        if smaller.fits:
            yield "keys and values in 8 bits: kv_cache_dtype=int8"
    others = (
        one
        for one in _working(case.config, where, build, dtype, False)
        if one.fits and not one.division.experts and one.division != replace(case.division, experts=False)
    )
    if (found := next(others, None)) is not None:
        yield f"another plan: {found.division.name}"
    if (larger := _first_that_fits(case, where.larger(), dtype)) is not None:
        yield f"a larger slice: {larger.topology} with plan {larger.division.name}"
    for generation in GENERATIONS:
        if generation != where.generation:
            other = _first_that_fits(case, generation.topologies(), dtype)
            if other is not None and other.topology.chips <= where.chips:
                yield f"another generation: {other.topology} with plan {other.division.name}"


def _first_that_fits(case: Case, slices: Iterator[Topology], dtype: str | None) -> Case | None:
    """The first slice on which some plan holds the same seats at the same length in one replica."""
    for where in slices:
        for one in _working(case.config, where, case.build, dtype, False, split=False):
            if one.fits and not one.division.experts:
                return one
    return None
