"""A report as tables for people."""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.table import Table

from .compiled import Program
from .floors import Work
from .report import Report

GiB = 1 << 30


def as_text(report: Report, width: int = 120) -> str:
    """The tables without colours."""
    console = Console(file=io.StringIO(), width=width)
    console.print(as_tables(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def as_tables(report: Report) -> RenderableType:
    """All that a report says, one table a subject."""
    parts: list[RenderableType] = [_summary(report), _memory(report), _floors(report)]
    if report.programs:
        parts += [_programs(report), _collectives(report)]
    parts.append(_alternatives(report))
    return Group(*parts)


def _summary(report: Report) -> Table:
    table = Table(show_header=False, box=None, title_justify="left")
    model, where, room = report.model, report.slice, report.room
    heads = ", ".join(f"{query} query heads with {kv} KV heads" for query, kv in model.heads)
    verdict = "[green]fits[/]" if report.fits else "[red]does not fit[/]"
    rows = [
        ("model", f"{model.name}: {model.parameters:,} parameters, {model.layers} layers, {heads}, {model.dtype}"),
        ("slice", f"{where.name}, in Google Cloud {where.cloud}: {where.chips} chips, {where.devices} JAX devices, "
                  f"{where.hosts} host{'s' if where.hosts > 1 else ''}"),
        ("plan", f"{report.plan}{'' if report.runs else ' (planned only)'}"),
        ("settings", f"max_model_len {report.max_model_len:,}, max_num_seqs {report.max_num_seqs}, "
                     f"max_num_batched_tokens {report.max_num_batched_tokens}, kv_cache_dtype {report.kv_cache_dtype}"),
        ("verdict", f"{verdict}: {room.sequences:,} sequences of {report.max_model_len:,} tokens at once in a "
                    f"replica; "
                    f"a token takes {room.kv_bytes_per_token:,} bytes, {room.kv_bytes_per_token_per_device:,} "
                    f"of each device"),
        *(("why", line) for line in report.why),
        *(("would fit", line) for line in report.advice),
        *(("note", line) for line in report.notes),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return table


def _memory(report: Report) -> Table:
    memory = report.memory
    table = Table(title="memory of one device, GiB", title_justify="left")
    names = ("weights", "state", "sampler", "temporaries")
    for name in (*names, "needed", "available", "free"):
        table.add_column(name, justify="right")
    sizes = [getattr(memory, name) for name in (*names, "needed", "available", "free")]
    table.add_row(*(f"{size / GiB:.3f}" for size in sizes))
    return table


def _floors(report: Report) -> Table:
    table = Table(
        title="floors, ms: every seat at max_model_len; links as compiled, else as predicted",
        title_justify="left",
    )
    for name in ("program", "GB", "GFLOP", "sent MB", "bandwidth", "compute", "links", "binds"):
        table.add_column(name, justify="left" if name in ("program", "binds") else "right")
    for work in report.floors:
        table.add_row(*_floor(work))
    return table


def _floor(work: Work) -> tuple[str, ...]:
    times = (work.bandwidth_s, work.compute_s, work.interconnect_s)
    return (
        work.program, f"{work.bytes / 1e9:.3f}", f"{work.flops / 1e9:.1f}", f"{work.sent / 1e6:.2f}",
        *(f"{1e3 * seconds:.3f}" for seconds in times), work.binds,
    )  # fmt: skip


def _programs(report: Report) -> Table:
    table = Table(title="compiled programs, MB of one device", title_justify="left")
    for name in (
        "program",
        "compiled in s",
        "arguments",
        "predicted",
        "off by",
        "temporaries",
        "results",
        "code",
    ):
        table.add_column(name, justify="left" if name == "program" else "right")
    for one in report.programs:
        table.add_row(*_program(one))
    return table


def _program(one: Program) -> tuple[str, ...]:
    known, deviation = one.predicted_arguments, one.deviation
    return (
        one.name, f"{one.seconds:.1f}", f"{one.arguments / 1e6:.1f}", "" if known is None else f"{known / 1e6:.1f}",
        "" if deviation is None else f"{deviation:+.3%}",
        *(f"{size / 1e6:.1f}" for size in (one.temporaries, one.results, one.code)),
    )  # fmt: skip


def _collectives(report: Report) -> Table:
    table = Table(title="collectives of one run", title_justify="left")
    for name in ("program", "kind", "axis", "devices", "times", "KB each", "MB sent", ""):
        table.add_column(name, justify="left" if name in ("program", "kind", "axis", "") else "right")
    for program in report.programs:
        for one in program.collectives or ():
            table.add_row(
                program.name, one.kind, one.axis, str(one.group), str(one.times), f"{one.bytes / 1e3:.1f}",
                f"{one.sent / 1e6:.3f}", "hidden behind compute" if one.hidden else "exposed",
            )  # fmt: skip
        if program.collectives is None:
            table.add_row(program.name, "not known: the compiler's text cannot be read")
    return table


def _alternatives(report: Report) -> Table:
    table = Table(title="plans of this slice", title_justify="left")
    for name in ("plan", "", "sequences at once", "decode step at least, ms", "tokens/s at most"):
        table.add_column(name, justify="left" if name in ("plan", "") else "right")
    for one in report.alternatives:
        state = "does not fit" if not one.fits else "" if one.runs else "planned only"
        speed = f"{one.tokens_per_second:,.0f}" if one.fits else ""
        chosen = f"[bold]{one.plan}[/]" if one.plan == report.plan else one.plan
        table.add_row(chosen, state, f"{one.sequences:,}", f"{1e3 * one.decode_s:.2f}", speed)
    return table
