"""Seven published models on six TPU slices that are not here: what fits, and what the compiler says.

    python benchmarks/plan_matrix.py --predict-only
    python benchmarks/plan_matrix.py [--models llama-3.1-70b ...] [--topologies v5e:4x4 ...] [--json]

Compiling needs libtpu, no TPU. Nothing is timed but the compiler; floors are arithmetic on the chips' data sheets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import jax
import tokenloom
from rich.console import Console
from rich.table import Table
from tokenloom.serve.planner.report import Report

MODELS = (
    "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "qwen3-30b-a3b", "qwen3-235b-a22b", "gemma-3-27b",
    "mixtral-8x7b",
)  # fmt: skip
TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1", "v5p:4x4x4")


def reports(arguments: argparse.Namespace) -> Iterator[Report]:
    for model in arguments.models:
        for topology in arguments.topologies:
            yield tokenloom.plan(
                model, topology, max_model_len=arguments.max_model_len, compile=not arguments.predict_only
            )


def row(report: Report) -> tuple[str, ...]:
    """A line of the table."""
    if not report.fits:
        return report.model.name, report.slice.name, report.plan, "no", "", "", "", "", report.advice[0]
    decode = sum(work.seconds for work in report.work[:2])
    deviations = [abs(one.deviation) for one in report.programs if one.deviation is not None]
    seconds = sum(one.seconds for one in report.programs)
    return (
        report.model.name, report.slice.name, report.plan, str(report.max_num_seqs), f"{1e3 * decode:.2f}",
        report.work[0].binds, f"{max(deviations):.3%}" if deviations else "", f"{seconds:.0f}" if seconds else "",
        "" if report.runs else "planned only",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--predict-only", action="store_true", help="compile nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object a cell instead")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    columns = (
        "model",
        "slice",
        "plan",
        "seqs",
        "decode ms, floor",
        "binds",
        "arguments off by",
        "compiled in s",
        "",
    )
    table = Table(*columns, header_style="bold")
    wrong = 0
    for report in reports(arguments):
        wrong += any(abs(one.deviation or 0.0) >= 0.03 for one in report.programs)
        if arguments.json:
            print(report.to_json(), flush=True)
        else:
            table.add_row(*row(report))
            print(*row(report), sep=" | ", file=sys.stderr, flush=True)
    if not arguments.json:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
