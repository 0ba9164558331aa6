"""SmartSpec (Liu et al. 2024, arXiv 2406.14066): draft as much as gives the most accepted tokens a second.

The goodput of a shape is the tokens that a row is expected to emit over the seconds that a step takes. The paper fits
the seconds by regression over batch sizes and contexts; here every shape and width is a compiled program, so they are a
table, measured once. Lines of k tokens share one acceptance a: (1 - a^(k+1)) / (1 - a) tokens; a tree has its own
average. Off, one step in `probe` drafts, or nobody would ever see that acceptance has come back.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .draft import DraftShape

FIRST = 10.0
"""Tries that the first estimate counts for."""


def expected(acceptance: float, tokens: int) -> float:
    """Tokens that verifying a line of `tokens` drafts emits on average, the target's own included."""
    if acceptance >= 1.0:
        return tokens + 1.0
    return (1.0 - acceptance ** (tokens + 1)) / (1.0 - acceptance)


@dataclass
class Seen:
    """A share of tries that came off: counts that fade, so that the last steps weigh most."""

    tries: float
    hits: float

    def add(self, tries: float, hits: float, fade: float) -> None:
        self.tries, self.hits = self.tries * fade + tries, self.hits * fade + hits

    @property
    def mean(self) -> float:
        return self.hits / self.tries


@dataclass
class SmartSpec:
    """acceptance: the first estimate, worth ten tries; keep: what is left of what was seen when a step later is seen
    (of a silence, up to five steps later); margin: by how much speculation must win over plain decoding; every: steps
    between decisions; probe: one step in so many drafts while it is off."""

    acceptance: float = 0.7
    keep: float = 0.98
    margin: float = 1.02
    every: int = 20
    probe: int = 50
    seconds: dict[tuple[DraftShape | None, int], float] = field(default_factory=dict, repr=False)
    _lines: Seen = field(init=False, repr=False)
    _trees: dict[DraftShape, Seen] = field(default_factory=dict, repr=False)
    _widths: tuple[int, ...] = field(default=(), repr=False)
    _steps: int = field(default=0, repr=False)
    _seen: int = field(default=0, repr=False)
    _decided: dict[int, DraftShape | None] = field(default_factory=dict, repr=False)
    _off: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance <= 1 or not 0 <= self.keep < 1:
            raise ValueError(f"acceptance={self.acceptance} and keep={self.keep} must lie in 0 to 1")
        if self.margin < 1 or self.every < 1 or self.probe < 1:
            raise ValueError(
                f"margin={self.margin}, every={self.every} and probe={self.probe} must be at least 1"
            )
        self._lines = Seen(FIRST, FIRST * self.acceptance)

    def calibrate(
        self, shapes: Sequence[DraftShape], widths: Sequence[int],
        seconds: Callable[[DraftShape | None, int], float],
    ) -> None:  # fmt: skip
        if self.seconds:
            raise ValueError("this SmartSpec serves another engine already; make one for each")
        self._widths = tuple(sorted(widths))
        self._trees = {
            shape: Seen(FIRST, FIRST * expected(self.acceptance, shape.depth))
            for shape in shapes
            if not shape.chain
        }
        self.seconds = {
            (shape, width): seconds(shape, width) for shape in (None, *shapes) for width in widths
        }

    def tokens(self, shape: DraftShape | None) -> float:
        """Tokens that a row is expected to emit in a step of this shape."""
        if shape is None:
            return 1.0
        return expected(self._lines.mean, shape.depth) if shape.chain else self._trees[shape].mean

    def best(self, width: int) -> DraftShape | None:
        """The shape of the highest goodput; None unless a draft wins by the margin."""

        def goodput(shape: DraftShape | None) -> float:
            return self.tokens(shape) / self.seconds[shape, width] * (self.margin if shape is None else 1.0)

        return max((shape for shape, at in self.seconds if at == width), key=goodput)

    def choose(self, rows: int) -> DraftShape | None:
        width = self._widths[min(bisect.bisect_left(self._widths, rows), len(self._widths) - 1)]
        if self._steps % self.every == 0:
            self._decided.clear()
        self._steps += 1
        if width not in self._decided:
            self._decided[width] = self.best(width)
        shape = self._decided[width]
        self._off = self._off + 1 if shape is None else 0
        if shape is None and self._off % self.probe == 0:
            return min(drafted for drafted, at in self.seconds if drafted is not None and at == width)
        return shape

    def observe(self, shape: DraftShape, emitted: Sequence[int]) -> None:
        if not emitted:
            return
        fade = self.keep ** min(max(1, self._steps - self._seen), 5)
        self._seen = self._steps
        if not shape.chain:
            self._trees[shape].add(len(emitted), sum(emitted), fade)
            return
        accepted = sum(count - 1 for count in emitted)
        self._lines.add(accepted + sum(count - 1 < shape.depth for count in emitted), accepted, fade)
