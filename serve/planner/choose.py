"""Which plan of a slice `auto` takes, and why: the planner's own floors and memory decide.

The widest tensor plan that fits, in as few replicas as it can, so that many devices work on each text. Where that ends
(nothing fits, or query heads do not split further), splitting each text over groups of devices goes on. Experts stay
whole where that sends less. What can be started today goes before what is planned only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .floors import Work, backbone_work, head_work
from .memory import Case

MARGIN = 0.9
"""A plan that splits texts must need at most so much of the time: floors leave out what each transfer costs at
least."""


def decode_work(case: Case) -> tuple[Work, Work]:
    """A decode step with every seat at max_model_len: its backbone and its head."""
    return backbone_work(case, "decode", [case.length] * case.seats, []), head_work(case, "head", case.seats)


def prefill_work(case: Case) -> Work:
    """The largest prompt chunk, at the beginning of a text."""
    return backbone_work(case, "prefill", [], [(0, case.buckets.chunks[-1])])


def seconds(case: Case) -> float:
    """The floor of a prompt token and a generated one, with every seat of all replicas taken."""
    decode = sum(work.seconds for work in decode_work(case)) / case.seats
    return (decode + prefill_work(case).seconds / case.buckets.chunks[-1]) / case.division.data


def choose(works: Sequence[Case]) -> tuple[Case, tuple[str, ...]]:
    """The case to take of those whose shapes split, widest first, and the reasons."""
    fitting = [case for case in works if case.fits]
    running = [case for case in fitting if case.runs] or fitting
    cut = [case for case in running if not case.division.experts]
    if not cut:
        plain = next(case for case in works if not case.division.experts and case.division.seq == 1)
        return plain, ("no plan of this slice fits; this is the widest",)
    best, why = _by_time(cut)
    best, more = _by_bytes(best, running)
    return best, (*why, *more, *_throughput(best, fitting))


def _by_time(cases: Sequence[Case]) -> tuple[Case, list[str]]:
    """The widest plan that leaves texts whole, unless splitting them is quicker by the margin."""
    usual = [case for case in cases if case.division.seq == 1]
    split = [case for case in cases if case.division.seq > 1]
    if not usual:
        best = min(split, key=seconds)
        return best, [
            f"{best.division.name}: no plan that leaves texts whole fits and can be started; of the others the quickest"
        ]
    widest = best = usual[0]
    for case in split:
        if seconds(case) < MARGIN * seconds(best):
            best = case
    if best is widest:
        return best, [f"{widest.division.name}: the widest plan that fits"]
    less, more = 1e6 * seconds(best), 1e6 * seconds(widest)
    room = [case.division.data * case.sequences_that_fit for case in (best, widest)]
    return best, [
        f"{best.division.name} rather than {widest.division.name}: a prompt token and a generated one take {less:.1f} "
        f"us instead of {more:.1f} us at least, and {room[0]} sequences fit instead of {room[1]}"
    ]


def _by_bytes(best: Case, cases: Sequence[Case]) -> tuple[Case, list[str]]:
    """The same division with whole experts, where it sends less and holds as much."""
    division = best.division
    for case in cases:
        if case.division != replace(division, experts=True) or case.seats < best.seats:
            continue
        less, more = (decode_work(one)[0].sent + prefill_work(one).sent for one in (case, best))
        if less < more:
            return case, [
                f"experts whole on their devices: a decode step and a prompt chunk send {less / 1e6:.1f} MB instead of "
                f"{more / 1e6:.1f} MB of {division.name} (a step takes as long as the device whose experts get most "
                f"rows)"
            ]
    return best, []


def _throughput(best: Case, cases: Sequence[Case]) -> list[str]:
    """Which plan would generate more, if latency were no matter."""

    def speed(case: Case) -> float:
        return case.division.data * case.seats / sum(work.seconds for work in decode_work(case))

    quickest = max(cases, key=speed)
    if speed(quickest) <= speed(best) / MARGIN:
        return []
    return [
        f"for throughput alone {quickest.division.name}: {speed(quickest):,.0f} tokens/s at most instead of "
        f"{speed(best):,.0f}, each text at {quickest.seats / speed(quickest) * quickest.division.data * 1e3:.1f} ms a "
        f"token instead of {best.seats / speed(best) * best.division.data * 1e3:.1f} ms"
    ]
