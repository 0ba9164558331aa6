"""Traces by jax.profiler."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax


@contextmanager
def trace(path: str | Path) -> Iterator[None]:
    """Profile what runs inside into the folder `path`.

    ValueError on a CPU where JAX has loaded libtpu beside it: its profiler may end the process there (seen with
    jaxlib 0.10.2 and libtpu 0.0.52: their plug-in interfaces differ in size).
    """
    asked = jax.config.jax_platforms  # type: ignore[attr-defined]
    loaded = importlib.util.find_spec("libtpu") is not None and (not asked or "tpu" in asked)
    if jax.devices()[0].platform == "cpu" and loaded:
        raise ValueError(
            "libtpu is installed, and its profiler may crash a process that runs on the CPU; start Python with the "
            "environment variable JAX_PLATFORMS=cpu to leave it out"
        )
    with jax.profiler.trace(str(path)):
        yield
