"""Process 0's programs, whose calls are announced, and what the other processes do with the announcements.

Every device program is called through `Programs`, with arrays of the host that are whole on every device. So a
follower that makes the same calls with the same arrays, in the same order, takes part in all that process 0 computes;
it neither schedules nor reads anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..attention.batch import Shape
from .channel import Message
from .compilations import Compilations
from .drafters.draft import DraftShape
from .joining import ProcessLost
from .processes import Group
from .programs import Programs
from .sampling.sampler import Sampled
from .weights import Weights


class LedPrograms(Programs):
    """The programs of process 0 of `group`: each call is announced before it is made."""

    def __init__(self, *args: Any, group: Group, **settings: Any):
        super().__init__(*args, **settings)
        self.group = group
        self.compilations = GuardedCompilations(self.compilations.strict, self.compilations.plan, group)

    def copy(self, source: int, target: int) -> None:
        self.group.command("copy", {"source": source, "target": target})
        with self._together():
            super().copy(source, target)

    def admit(self, seat: int, row: dict[str, np.ndarray]) -> None:
        self.group.command("admit", {"seat": seat}, row)
        with self._together():
            super().admit(seat, row)

    def constrain(self, seats: np.ndarray, masks: np.ndarray) -> None:
        self.group.command("constrain", arrays={"seats": seats, "masks": masks})
        with self._together():
            super().constrain(seats, masks)

    def step(
        self, shape: Shape, packed: np.ndarray,
        between: Callable[[jax.Array], Sampled | None] | None = None, draft: DraftShape | None = None,
    ) -> tuple[Sampled, jax.Array | None]:  # fmt: skip
        number = None if draft is None or self.speculation is None else self.speculation.shapes.index(draft)
        values = {"shape": astuple(shape), "draft": number, "between": between is not None}
        self.group.command("step", values, {"packed": packed})
        with self._together():
            return super().step(shape, packed, between and partial(self._between, between), draft)

    def _between(self, between: Callable[[jax.Array], Sampled | None], x: jax.Array) -> Sampled | None:
        """What is done behind a backbone; then the followers hear whether the head comes."""
        try:
            sampled = between(x)
        except Exception as error:
            self.group.command("leave")
            raise _Own(error) from error
        self.group.command("head" if sampled is None else "leave")
        return sampled

    def score(self, prompt_x: jax.Array, targets: np.ndarray, used: int) -> jax.Array:
        self.group.command("score", {"used": used}, {"targets": targets})
        with self._together():
            return super().score(prompt_x, targets, used)

    def close(self) -> None:
        self.group.close()
        super().close()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around a call that was announced: where it fails here, the others wait for it in vain."""
        try:
            yield
        except ProcessLost:
            raise
        except _Own as wrapped:  # the step was left in order
            raise wrapped.error from None
        except Exception as error:
            self.group.explain(error)
            self.group.fail(error)
            raise


class _Own(Exception):
    """An error of what is done between two programs, on its way through them."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class GuardedCompilations(Compilations):
    """`Compilations` whose `watch`, which surrounds each step, explains errors by lost processes."""

    def __init__(self, strict: bool, plan: str, group: Group):
        super().__init__(strict, plan)
        self.group = group

    @contextmanager
    def watch(self) -> Iterator[None]:
        with self.group.guard(), super().watch():
            yield


class Follower:
    """What a process that is not the first does: the calls that process 0 announces, on its own `programs`."""

    def __init__(
        self, group: Group, programs: Programs, plan_swap: Callable[[str], Callable[[], None]] | None = None
    ):
        """plan_swap: checks the weights in a folder and returns what puts them in place, or raises ValueError."""
        self.group, self.programs, self.plan_swap = group, programs, plan_swap
        self.prompt_x: Any = None
        self.swap: Callable[[], None] | None = None

    def once(self) -> None:
        """Make one call, and wait for it."""
        message = self.group.next()
        if message is not None:
            self.perform(message)
            jax.block_until_ready(self.programs.state)

    def run(self) -> None:
        """Follow until process 0 closes. ProcessLost when another process is gone."""
        self.group.stage = "following"
        try:
            while (message := self.group.next()) is not None:
                with self.group.guard():
                    self.perform(message)
        except BaseException as error:
            self.group.fail(error)
            raise
        finally:
            self.programs.close()
        self.group.close()

    def perform(self, message: Message) -> None:
        """Make one call."""
        programs, values, arrays = self.programs, message.values, message.arrays
        match message.kind:
            case "step":
                self.step(Shape(*values["shape"]), arrays["packed"], values["draft"], values["between"])
            case "admit":
                programs.admit(values["seat"], dict(arrays))
            case "constrain":
                programs.constrain(arrays["seats"], arrays["masks"])
            case "copy":
                programs.copy(values["source"], values["target"])
            case "score":
                programs.score(self.prompt_x, arrays["targets"], values["used"])
            case "plan swap" if self.plan_swap is not None:
                self.group.reply({"problem": self.planned(self.plan_swap, values["folder"])})
            case "swap" if self.swap is not None:
                self.swap()
            case kind:
                raise ValueError(
                    f"process 0 announced {kind!r}, which this process does not know; start every process with the "
                    f"same version of tokenloom"
                )

    def step(self, shape: Shape, packed: np.ndarray, draft: int | None, between: bool) -> None:
        """A step; behind its backbone, what process 0 does there."""
        speculation = self.programs.speculation
        drafted = None if draft is None or speculation is None else speculation.shapes[draft]
        _, self.prompt_x = self.programs.step(shape, packed, self.between if between else None, drafted)

    def between(self, x: jax.Array) -> Any:
        """Until process 0 says whether the head comes (None), or the step is left without it."""
        del x
        while (message := self.group.next()) is not None:
            if message.kind in ("head", "leave"):
                return None if message.kind == "head" else message
            self.perform(message)
        return "closed"

    def planned(self, plan: Callable[[str], Callable[[], None]], folder: str) -> str | None:
        """Plan a swap of the weights; why it cannot be, or None."""
        try:
            self.swap = plan(folder)
        except (ValueError, OSError) as error:
            return str(error)
        return None


def lead_swap(group: Group, source: Weights, swap: Callable[[], None]) -> Callable[[], None]:
    """`swap`, which puts the weights of `source` in place here, for all processes. ValueError, and nothing changed,
    where the others cannot do the same."""
    if not isinstance(source, str | Path):
        raise ValueError(
            f"weights of a {type(source).__name__} are in this process only, and {group.count} share the model: save "
            f"them, and give update_weights the folder's path, which every process must be able to read"
        )
    group.command("plan swap", {"folder": str(Path(source).absolute())})
    problems = [
        f"process {other}: {told['problem']}" for other, told in group.replies().items() if told["problem"]
    ]
    if problems:
        raise ValueError(f"{'; '.join(problems)}. Nothing was changed")

    def all_swap() -> None:
        group.command("swap")
        swap()

    return all_swap
