"""A picture of a run: what it did over time, and what bound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bound import BOUNDS
from .lines import Record, Step, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "host": "#d62728", "pages": "#9467bd", "compute": "#2ca02c", "seats": "#ff9f1c", "bandwidth": "#1f77b4",
    "idle": "#c7c7c7",
}  # fmt: skip
KINDS = {"prefill": "#1f77b4", "mixed": "#ff9f1c", "decode": "#2ca02c", "verify": "#9467bd"}


def timeline(source: str | Path | Record) -> Figure:
    """A Figure of a run (of a file: the newest): tokens a step by kind, step time and host gap, shares of the
    ceilings, pages, requests, and what binds as a coloured strip; all over seconds since the first step.

    Needs matplotlib (`pip install 'tokenloom[plots]'`); ValueError without it, or when the run has no steps.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a timeline needs matplotlib: pip install 'tokenloom[plots]'") from None
    record = source if isinstance(source, Record) else read(source)[-1]
    run, steps = record.run, record.steps
    if not steps:
        raise ValueError(f"the newest run of {source} has no steps yet, so there is nothing to draw")
    at = [step.time - steps[0].time for step in steps]
    figure = Figure(figsize=(11, 11), layout="constrained")
    figure.suptitle(f"{run.model} on {run.device}, {run.dtype}: {len(steps)} steps")
    axes = figure.subplots(6, 1, sharex=True, height_ratios=[3, 3, 3, 2, 2, 1])
    _tokens(axes[0], at, steps)
    axes[1].plot(at, [1e3 * step.step_s for step in steps], lw=0.8, label="step")
    axes[1].fill_between(
        at, [1e3 * step.host_gap_s for step in steps], color=COLOURS["host"], label="host gap"
    )
    axes[1].set_ylabel("ms")
    axes[2].plot(
        at, [step.bandwidth_share for step in steps], color=COLOURS["bandwidth"], lw=0.8, label="bandwidth"
    )
    axes[2].plot(
        at, [step.compute_share for step in steps], color=COLOURS["compute"], lw=0.8, label="compute"
    )
    axes[2].axhline(1, color="black", lw=0.5)
    axes[2].set_ylabel("share of ceiling")
    axes[3].plot(at, [step.pages_used for step in steps], label="used")
    axes[3].plot(at, [step.pages_cached for step in steps], label="cached", ls="--")
    axes[3].axhline(run.pages, color="black", lw=0.5)
    axes[3].set_ylabel("pages")
    axes[4].plot(at, [step.running for step in steps], label="running")
    axes[4].plot(at, [step.waiting for step in steps], label="waiting")
    axes[4].set_ylabel("requests")
    _strip(axes[5], at, steps)
    for axis in axes[:5]:
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper right", fontsize="small", ncols=4)
    axes[5].set_xlabel("s since the first step")
    return figure


def _tokens(axis: Any, at: list[float], steps: list[Step]) -> None:
    for kind, colour in KINDS.items():
        places = [place for place, step in enumerate(steps) if step.kind == kind]
        if places:
            heights = [steps[place].tokens for place in places]
            axis.vlines([at[place] for place in places], 0, heights, color=colour, lw=1, label=kind)
    axis.set_ylabel("tokens a step")


def _strip(axis: Any, at: list[float], steps: list[Step]) -> None:
    """Each step as a bar in the colour of what bound it."""
    for name in BOUNDS:
        spans = [(start, step.step_s) for start, step in zip(at, steps) if step.bound == name]
        if spans:
            axis.broken_barh(spans, (0, 1), color=COLOURS[name], label=name)
    axis.set_yticks([])
    axis.set_ylabel("binds")
    axis.legend(loc="upper right", fontsize="small", ncols=6)
