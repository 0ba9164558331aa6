"""Compilations after warm-up: counted, and an error in strict mode."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class Compilations:
    """Counts JAX's compile events inside `watch`; `plan` says, in an error, what was compiled beforehand."""

    def __init__(self, strict: bool, plan: str):
        self.strict, self.plan = strict, plan
        self.late = 0
        self._watching = False
        reference = weakref.ref(self)

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            del duration_secs, kwargs
            alive = reference()
            if alive is not None and alive._watching and event.endswith("backend_compile_duration"):
                alive.late += 1

        jax.monitoring.register_event_duration_secs_listener(listen)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Inside, nothing may compile: strict mode raises afterwards."""
        before, self._watching = self.late, True
        try:
            yield
        finally:
            self._watching = False
        if self.strict and self.late > before:
            raise RuntimeError(
                f"a step compiled {self.late - before} programs after warm-up (strict mode); the bucket plan is: "
                f"{self.plan}"
            )
