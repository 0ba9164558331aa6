"""The device's ceilings, measured: how fast it reads memory, and how fast it multiplies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

PROBE_SECONDS = 0.3
BURST_SECONDS = 0.02


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes read a second; compute: FLOPs a second (a multiply-add is two) of products in `dtype`."""

    bandwidth: float
    compute: float
    device: str = ""
    dtype: str = ""

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.compute > 0):
            raise ValueError(
                f"ceilings must be above 0: bandwidth={self.bandwidth} bytes/s, compute={self.compute} FLOP/s"
            )


@cache
def measure(device: Any, dtype: str) -> Ceilings:
    """Probe a `jax.Device` for about 0.6 s, once a process: the sum of an array that no cache holds (256 MB of float32
    on CPU, 512 MB elsewhere, a row a core or more), and a square product in `dtype`. The best burst counts.

    The figures are what this device does now: a machine that others load, or one that is throttled, measures
    lower, and shares may then exceed 1.
    """
    cpu = device.platform == "cpu"
    rows, size = (os.cpu_count() or 1, 64 << 20) if cpu else (4096, 128 << 20)
    side = 1024 if cpu else 8192
    with jax.default_device(device):
        data = jnp.ones((rows, size // rows), jnp.float32)
        total = jax.jit(lambda a: a.sum(1))
        read = _fastest(lambda: total(data))
        bandwidth = data.nbytes / read
        data.delete()
        matrix = jnp.ones((side, side), dtype)
        product = jax.jit(lambda a: a @ a)
        compute = 2 * side**3 / _fastest(lambda: product(matrix))
    return Ceilings(bandwidth, compute, device.device_kind, dtype)


def _fastest(run: Callable[[], jax.Array]) -> float:
    """Seconds a run, of the best burst: runs dispatched back to back, so that dispatching costs nothing."""

    def burst(count: int) -> float:
        start = time.perf_counter()
        last = [run() for _ in range(count)][-1]
        last.block_until_ready()
        return (time.perf_counter() - start) / count

    burst(1)  # compiles
    count = max(1, min(64, int(BURST_SECONDS / burst(1))))
    best, end = float("inf"), time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < end:
        best = min(best, burst(count))
    return best if best < float("inf") else burst(count)
