"""Compile every attention kernel for every chip, with none of them here.

    python benchmarks/compile_grid.py [--full] [--chips v5e h200] [--json]

Without --full: what differs from bfloat16, head dim 128, causal in one thing. TPUs go through libtpu's whole
compiler, GPUs down to the module that the driver's compiler takes. A cell is ok, refused (with the kernel's reason)
or failed; the exit code is 1 when one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console
from rich.table import Table
from tokenloom.tests.compile_grid import GPU_KINDS, TOPOLOGIES, Cell, Outcome, available, cells, compile_cell

COLOURS = {"ok": "green", "refused": "yellow", "failed": "bold red"}


def mib(size: int | None) -> str:
    return "" if size is None else f"{size / (1 << 20):.2f}"


def as_table(outcomes: list[Outcome]) -> Table:
    """A line a cell. Step: what the kernel needs by its own estimate, and the chip's limit (VMEM, shared memory)."""
    columns = (
        "kernel",
        "chip",
        "part",
        "head dim",
        "KV",
        "mask",
        "share",
        "",
        "step MiB",
        "of",
        "temporary MiB",
        "s",
    )
    table = Table(*columns, header_style="bold")
    for one in outcomes:
        cell = one.cell
        shown = f"[{COLOURS[one.status]}]{one.status}[/] {one.reason}"
        table.add_row(
            cell.kernel, cell.chip, cell.part, str(cell.head_dim), cell.dtype, cell.mask,
            f"1/{cell.parts}", shown,
            mib(one.needs), mib(one.limit), mib(one.temporary), f"{one.seconds:.1f}",
        )  # fmt: skip
    return table


def chosen(arguments: argparse.Namespace, console: Console) -> list[Cell]:
    """The cells that can be compiled here; the reason why others are left out is printed."""
    found, missing = [], {}
    for cell in cells(arguments.full, tuple(arguments.chips)):
        reason = available(cell.chip)
        if reason:
            missing[cell.chip] = reason
        elif not arguments.kernels or cell.kernel in arguments.kernels:
            found.append(cell)
    for chip, reason in missing.items():
        console.print(f"{chip} is left out: {reason}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="the whole grid: an hour or two")
    parser.add_argument("--chips", nargs="+", default=[], choices=[*TOPOLOGIES, *GPU_KINDS])
    parser.add_argument("--kernels", nargs="+", default=[], choices=["tpu", "triton", "twin"])
    parser.add_argument("--json", action="store_true", help="print one JSON object a cell instead")
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json, width=None if sys.stdout.isatty() else 160)
    outcomes = []
    found = chosen(arguments, console)
    for number, cell in enumerate(found):
        with console.status(f"{number + 1} of {len(found)}: {cell}"):
            outcomes.append(compile_cell(cell))
        if arguments.json:
            print(json.dumps(asdict(outcomes[-1])), flush=True)
    if not arguments.json:
        console.print(as_table(outcomes))
    counts = Counter(one.status for one in outcomes)
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
