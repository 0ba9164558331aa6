"""Who decides, before each step of decodes, what is drafted: one of the drafter's shapes, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .draft import DraftShape


class Controller(Protocol):
    """An object of one engine; it sees load and past acceptance, never the tokens, so what is emitted keeps its law.

    calibrate: told once, after compilation, what there is: the shapes, the widths (rows a program is compiled for) and
    how to measure the seconds of a step of a shape (None: plain decoding) and a width.
    choose: the draft for so many rows; None decodes plainly. observe: what each row of a step with a draft emitted.
    """

    def calibrate(
        self, shapes: Sequence[DraftShape], widths: Sequence[int],
        seconds: Callable[[DraftShape | None, int], float],
    ) -> None: ...  # fmt: skip

    def choose(self, rows: int) -> DraftShape | None: ...

    def observe(self, shape: DraftShape, emitted: Sequence[int]) -> None: ...


@dataclass
class Always:
    """The drafter's largest shape, every step."""

    shape: DraftShape | None = None

    def calibrate(
        self, shapes: Sequence[DraftShape], widths: Sequence[int],
        seconds: Callable[[DraftShape | None, int], float],
    ) -> None:  # fmt: skip
        self.shape = max(shapes)

    def choose(self, rows: int) -> DraftShape | None:
        return self.shape

    def observe(self, shape: DraftShape, emitted: Sequence[int]) -> None:
        pass
