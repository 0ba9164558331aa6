"""Seven published models on six TPU slices that are not here: what fits, what `auto` chooses and why, and what the
compiler says.

    python benchmarks/plan_matrix.py --predict-only
    python benchmarks/plan_matrix.py [--models llama-3.1-70b ...] [--topologies v5e:4x4 ...] [--json | --markdown]

Compiling needs libtpu, no TPU. Nothing is timed but the compiler; floors are arithmetic on the chips' data sheets. Exit
code 1: a prediction was off by 3 % or more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

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
COLUMNS = (
    "model",
    "slice",
    "plan",
    "seqs",
    "decode ms",
    "prefill ms",
    "binds",
    "off by",
    "compiled in s",
    "",
)


@dataclass(frozen=True)
class Cell:
    """A model on a slice: a report, or what cannot be; and how long the answer took, in seconds."""

    model: str
    topology: str
    report: Report | None
    error: str
    seconds: float

    @property
    def off(self) -> float | None:
        """The largest deviation of predicted arguments; None: nothing was compiled."""
        programs = () if self.report is None else self.report.programs
        return max((abs(one.deviation) for one in programs if one.deviation is not None), default=None)

    @property
    def row(self) -> tuple[str, ...]:
        """A line of the table: floors are those of a decode step with every seat at max_model_len, its head included,
        and of the largest prompt chunk."""
        report, off = self.report, self.off
        if report is None:
            return self.model, self.topology, "", "no", "", "", "", "", "", self.error
        if not report.fits:
            advice = "; ".join(report.advice[:2]) or "nothing that was tried would"
            return self.model, self.topology, report.plan, "no", "", "", "", "", "", advice
        decode, prefill = sum(work.seconds for work in report.work[:2]), report.work[2].seconds
        return (
            self.model, self.topology, report.plan, str(report.max_num_seqs), f"{1e3 * decode:.2f}",
            f"{1e3 * prefill:.2f}", f"{report.work[0].binds}, {report.work[2].binds}",
            "" if off is None else f"{off:.3%}", "" if off is None else f"{self.seconds:.0f}",
            "" if report.runs else "planned only",
        )  # fmt: skip

    def to_json(self) -> str:
        report = None if self.report is None else self.report.to_dict()
        facts = {"model": self.model, "topology": self.topology, "seconds": self.seconds, "error": self.error}
        return json.dumps(facts | {"report": report})


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    for model in arguments.models:
        for topology in arguments.topologies:
            report, error, started = None, "", time.perf_counter()
            try:
                report = tokenloom.plan(
                    model, topology, max_model_len=arguments.max_model_len, compile=not arguments.predict_only
                )
            except ValueError as problem:
                error = str(problem)
            yield Cell(model, topology, report, error, time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--predict-only", action="store_true", help="compile nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object a cell instead")
    parser.add_argument("--markdown", action="store_true", help="print the rows of a Markdown table instead")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    table, wrong = Table(*COLUMNS, header_style="bold"), 0
    for cell in cells(arguments):
        wrong += (cell.off or 0.0) >= 0.03
        if arguments.json:
            print(cell.to_json(), flush=True)
        elif arguments.markdown:
            print("|", " | ".join(cell.row), "|", flush=True)
        else:
            table.add_row(*cell.row)
            print(*cell.row, sep=" | ", file=sys.stderr, flush=True)
    if not (arguments.json or arguments.markdown):
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
