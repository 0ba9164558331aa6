"""A report as a picture: memory of a device, floors of the programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import Report

GiB = 1 << 30
COLOURS = {
    "weights": "#1f77b4", "state": "#2ca02c", "sampler": "#9467bd", "temporaries": "#ff9f1c", "bandwidth": "#1f77b4",
    "compute": "#2ca02c", "interconnect": "#d62728",
}  # fmt: skip


def draw(report: Report, path: Path) -> None:
    """Write the picture; ValueError without matplotlib (the `plots` extra)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install 'tokenloom[plots]'") from None
    figure = Figure(figsize=(10, 6), layout="constrained")
    figure.suptitle(
        f"{report.model.name} on {report.slice.name} ({report.slice.cloud}), {report.plan}: {report.max_num_seqs} "
        f"sequences of {report.max_model_len:,} tokens"
    )
    memory, floors = figure.subplots(2, 1, height_ratios=[1, 2])
    _memory(memory, report)
    _floors(floors, report)
    figure.savefig(path, dpi=120)


def _memory(axes: Any, report: Report) -> None:
    left = 0.0
    for name in ("weights", "state", "sampler", "temporaries"):
        size = getattr(report.memory, name) / GiB
        axes.barh(0, size, left=left, color=COLOURS[name], label=f"{name} {size:.2f}")
        left += size
    available = report.memory.available / GiB
    axes.axvline(available, color="black", label=f"available {available:.2f}")
    axes.set_yticks([])
    axes.set_xlabel("GiB of one device")
    axes.legend(ncols=5, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.35))


def _floors(axes: Any, report: Report) -> None:
    works = report.floors
    for at, name in enumerate(("bandwidth", "compute", "interconnect")):
        heights = [1e3 * getattr(work, f"{name}_s") for work in works]
        places = [place + 0.27 * (at - 1) for place in range(len(works))]
        axes.bar(places, heights, 0.25, color=COLOURS[name], label=name)
    axes.set_xticks(range(len(works)), [work.program for work in works])
    axes.set_yscale("log")
    axes.set_ylabel("floor, ms")
    axes.legend()
