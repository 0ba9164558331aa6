"""Slot compaction for a dense cache [slots, max_len]: the memory shuffler of Flover (arXiv 2305.13484)."""

from __future__ import annotations

from collections.abc import Sequence


def compact(live: Sequence[bool]) -> tuple[int, list[tuple[int, int]]]:
    """(first, moves): after the moves (source slot, target slot) the n live slots are first..first + n - 1.

    A window of n slots slides over all; the one with the fewest live slots outside it is best, the lowest of them
    if there are several, and the outsiders go to its holes in order. O(slots). The moves are as few as can be:
    whatever run of n slots is chosen, each live slot outside it has to move.
    """
    count = sum(live)
    inside = most = sum(live[:count])
    first = 0
    for start in range(1, len(live) - count + 1):
        inside += live[start + count - 1] - live[start - 1]
        if inside > most:
            most, first = inside, start
    window = range(first, first + count)
    outside = [slot for slot, taken in enumerate(live) if taken and slot not in window]
    holes = [slot for slot in window if not live[slot]]
    return first, list(zip(outside, holes, strict=True))
