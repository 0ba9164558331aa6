"""The live view of a run: in a terminal (`tokenloom watch run.jsonl`) or in a notebook (`with live("run.jsonl"):`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .bound import REMEDIES
from .lines import Follower, Record, Step, Totals

WINDOW_SECONDS = 2.0
REFRESH_SECONDS = 0.5
KEPT_STEPS = 20_000
COLOURS = {
    "host": "red", "pages": "magenta", "compute": "green", "seats": "yellow", "bandwidth": "blue", "idle": "white"
}  # fmt: skip


def recent(steps: list[Step], seconds: float = WINDOW_SECONDS) -> list[Step]:
    """The steps of the last `seconds` before the newest one: at least that one."""
    first = len(steps)
    while first and steps[first - 1].time >= steps[-1].time - seconds:
        first -= 1
    return steps[first:]


def view(records: list[Record], now: float | None = None) -> RenderableType:
    """The newest run as a rich renderable: speed, batch, ceilings, what binds, pages, queue. now: s since 1970."""
    if not records:
        return Text("waiting for a run")
    record = records[-1]
    run, steps = record.run, record.steps
    title = f"{run.model} on {run.device}, {run.dtype}"
    if not steps:
        return Panel(Text("no step yet"), title=title)
    last, window = steps[-1], recent(steps)
    sums = Totals.of(window, run)
    quiet = 0.0 if now is None else now - last.time - last.step_s
    state = (
        "closed" if record.summary else f"quiet for {quiet:.0f} s" if quiet > WINDOW_SECONDS else "running"
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(width=30)
    grid.add_column()
    span = sums.step_s or 1.0
    grid.add_row(
        "speed",
        f"{sums.generated / span:,.1f} tokens/s",
        f"prompts {sums.prompt_tokens / span:,.1f} tokens/s",
    )
    grid.add_row("step", f"{last.step} ({last.kind})", f"{1e3 * span / sums.steps:.2f} ms; {state}")
    _bar(
        grid, "batch", last.running, run.seats, f"{last.running} of {run.seats} seats, {last.waiting} waiting"
    )
    _bar(
        grid, "bandwidth", sums.bandwidth_share, 1, _share(sums.bandwidth_share, run.bandwidth / 1e9, "GB/s")
    )
    _bar(grid, "compute", sums.compute_share, 1, _share(sums.compute_share, run.compute / 1e9, "GFLOP/s"))
    gap = sums.host_gap_s / span
    _bar(grid, "host gap", gap, 1, f"{gap:.1%} of the time the device waited for the host")
    cached = f"{last.pages_used} of {run.pages} pages, {last.pages_cached} cached"
    _bar(grid, "pages", last.pages_used, run.pages, f"{cached}, {last.preemptions} preemptions")
    hits = f"{last.hit_tokens} of {last.lookup_tokens} prompt tokens"
    _bar(grid, "prefix cache", last.hit_tokens, max(1, last.lookup_tokens), hits)
    _bar(grid, "padding", sums.waste, 1, f"{sums.waste:.1%} of the computed tokens")
    name = sums.bound or last.bound
    binds = Text.assemble(("binds: ", "bold"), (name, f"bold {COLOURS[name]}"), f"  {REMEDIES[name]}")  # type: ignore[index]
    return Panel(Group(grid, binds, _strip(window)), title=title)


def _share(share: float, ceiling: float, unit: str) -> str:
    return f"{share:.1%} of {ceiling:,.1f} {unit}"


def _bar(grid: Table, name: str, value: float, whole: float, words: str) -> None:
    grid.add_row(name, ProgressBar(total=whole, completed=min(value, whole), width=30), words)


def _strip(steps: list[Step], width: int = 60) -> Text:
    """What bound in the last steps, a coloured letter each."""
    return Text.assemble(*((step.bound[0], COLOURS[step.bound]) for step in steps[-width:]))


def watch(
    path: str | Path, *, once: bool = False, refresh: float = REFRESH_SECONDS, console: Console | None = None
) -> None:
    """Show the newest run of a file in the terminal, and follow it until it is closed or interrupted.

    once: print what is there and return. ValueError when the file cannot be read or holds something else.
    """
    console, follower = console or Console(), Follower(path, KEPT_STEPS)
    if once:
        console.print(view(follower.poll(), time.time()))
        return
    with Live(view(follower.poll()), console=console, auto_refresh=False) as shown:
        while not (follower.records and follower.records[-1].summary):
            time.sleep(refresh)
            shown.update(view(follower.poll(), time.time()), refresh=True)


@contextmanager
def live(
    path: str | Path,
    *,
    refresh: float = REFRESH_SECONDS,
    show: Callable[[RenderableType], None] | None = None,
) -> Iterator[None]:
    """The same view in a notebook: while the body runs, an output area is kept up to date from the file.

        with live("run.jsonl"):
            llm.generate(...)

    show: what to do with each view; None: update an IPython output area, or, where there is no IPython, print the
    last view at the end.
    """
    follower, stop = Follower(path, KEPT_STEPS), threading.Event()
    during, last = _output() if show is None else (show, show)

    def follow() -> None:
        while not stop.wait(refresh):
            during(view(follower.poll(), time.time()))

    follower.poll()
    thread = threading.Thread(target=follow, name="tokenloom-live", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        last(view(follower.poll(), time.time()))


def _output() -> tuple[Callable[[RenderableType], None], Callable[[RenderableType], None]]:
    """What to do with a view while the run goes on, and with the last one."""
    try:
        from IPython.core.getipython import get_ipython  # type: ignore[import-not-found]
        from IPython.display import HTML, display  # type: ignore[import-not-found]
    except ImportError:
        return (lambda shown: None), Console().print
    if get_ipython() is None:
        return (lambda shown: None), Console().print
    area = display(HTML(""), display_id=True)

    def update(shown: RenderableType) -> None:
        area.update(HTML(html(shown)))

    return update, update


def html(renderable: RenderableType, width: int = 100) -> str:
    """A view as HTML, for an output area."""
    console = Console(
        record=True, file=StringIO(), width=width, force_terminal=True, color_system="truecolor"
    )
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format="<pre style='line-height:1.2'>{code}</pre>")
