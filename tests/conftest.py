"""Programs are compiled quickly, and given back before the process runs out of memory mappings.

Compiling is most of what tests do, so they ask XLA for little optimisation, unless XLA_FLAGS is set: with `XLA_FLAGS=`
pytest runs the programs that users run, in about three times the time.

XLA on CPU maps each compiled function by itself: an engine holds thousands of mappings, Linux allows a process
65,530, and behind that compiling crashes. So the caches that test modules keep are emptied when many are in use.
"""

import functools
import gc
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from tokenloom.tests.devices import LITTLE, QUICK

os.environ.setdefault("XLA_FLAGS", QUICK)

HERE = Path(__file__).resolve().parent
MAPPINGS = Path("/proc/self/maps")
ENOUGH = 34_000
TESTS_BETWEEN_LOOKS = 2


def forget() -> None:
    """Empty every `functools.cache` of the modules in this folder, and JAX's own."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file is None or Path(file).resolve().parent != HERE:
            continue
        for value in list(vars(module).values()):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def flags_are_read() -> None:
    """JAX reads XLA_FLAGS with its first array; libtpu and other processes, which read them later, get LITTLE."""
    jax.block_until_ready(jax.numpy.zeros(()))
    if os.environ["XLA_FLAGS"] == QUICK:
        os.environ["XLA_FLAGS"] = LITTLE


@pytest.fixture(scope="session")
def tests_ended() -> Iterator[int]:
    """1, 2, 3 ..., a number a test."""
    return itertools.count(1)


@pytest.fixture(autouse=True)
def few_mappings(tests_ended: Iterator[int]) -> Iterator[None]:
    yield
    # Looking costs some milliseconds, so not after every test.
    if next(tests_ended) % TESTS_BETWEEN_LOOKS == 0 and MAPPINGS.exists():
        with MAPPINGS.open() as maps:
            many = sum(1 for _ in maps) > ENOUGH
        if many:
            forget()
