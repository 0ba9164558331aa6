"""An LLM's place among several processes: they meet, compare what they were started with, and open one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import flax
import jax
import jaxlib.version
import numpy as np

from .. import __version__
from ..model.config import ModelConfig
from .build import Build, Opened, pool_bytes
from .engine import Engine
from .followers import Follower, LedPrograms
from .processes import Group
from .programs import Programs
from .tokenizer import Tokenizer
from .weights import plan_swap

# What only the process that schedules looks at.
HOST_ONLY = ("policy", "telemetry", "bounds", "overlap", "controller", "pool_bytes")
JAX_SETTINGS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
)  # fmt: skip


def meet(build: Build, **more: Any) -> Group | None:
    """The group of all processes that open this model; None where there is one process only.

    more: further settings that must be the same. ValueError where the settings cannot be, or differ: it names them.
    """
    if jax.process_count() == 1:
        return None
    if build.compiled is not None:
        raise ValueError(
            f"compiled={str(build.compiled)!r} holds the programs of one process, and this is one of "
            f"{jax.process_count()}: leave it out"
        )
    _check_devices(build.devices)
    group = Group.join()
    settings = {
        field.name: getattr(build, field.name) for field in fields(build) if field.name not in HOST_ONLY
    }
    versions = {"tokenloom": __version__, "jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
    versions |= {"flax": flax.__version__, "numpy": np.__version__}
    devices = {"device": jax.local_devices()[0].device_kind, "devices a process": jax.local_device_count()}
    flags = {name: getattr(jax.config, name) for name in JAX_SETTINGS}
    group.agree(_facts(settings | versions | devices | flags | more))
    return group


@contextmanager
def together(group: Group | None) -> Iterator[None]:
    """Around the opening of a model: when it fails here the others hear why, and when it fails there this one does."""
    if group is None:
        yield
        return
    try:
        with group.guard():
            yield
    except BaseException as error:
        group.fail(error)
        raise
    group.stage = "open"


def guarded(group: Group | None) -> AbstractContextManager[None]:
    """Around what may wait for other processes (`Group.guard`)."""
    return nullcontext() if group is None else group.guard()


def confirm(group: Group | None, build: Build, opened: Opened, tokenizer: Tokenizer | None) -> Build:
    """The settings to build the engine with, after the processes have found that they opened the same model."""
    if group is None:
        return build
    config = {f"config.{field.name}": getattr(opened.config, field.name) for field in fields(opened.config)}
    vocabulary = None if tokenizer is None else tokenizer.vocab_size
    rest = {"numerics": opened.numerics, "tokenizer of": vocabulary, "attention back ends": build.backends()}
    group.agree(_facts(config | rest))
    build = replace(build, pool_bytes=group.least(pool_bytes(build.device)))
    return build if group.leads else replace(build, telemetry=None)


def programs_of(group: Group | None) -> Any:
    """What makes the programs of an engine in this process."""
    return Programs if group is None or not group.leads else partial(LedPrograms, group=group)


def calibrate(group: Group | None, engine: Engine) -> None:
    """Let the policy and the speculation controller measure the compiled programs, in the process that schedules.

    Several processes wait for each other first and make a step with idle rows together: what connects devices is set
    up by their first collective, which does not wait as long as a compilation may take.
    """
    programs = engine.programs
    if group is not None:
        group.agree({})
        if group.leads:
            programs.measure(programs.plan.chunks[-1], repeats=0)
        else:
            Follower(group, programs).once()
    if group is None or group.leads:
        engine.scheduler.policy.calibrate(programs.plan.chunks, programs.measure)
        if programs.speculation is not None:
            programs.speculation.calibrate(programs)


def follow(group: Group | None, engine: Engine, config: ModelConfig, positions: int) -> bool:
    """Take part in what process 0 computes until it closes; False at once where there is nobody to follow.
    positions: how long texts may become."""
    if group is None or group.leads:
        return False
    Follower(group, engine.programs, partial(plan_swap, engine.programs, config, positions)).run()
    return True


def refuse_requests(group: Group | None) -> None:
    """ValueError in a process that follows."""
    if group is not None and not group.leads:
        raise ValueError(
            f"this is process {group.index} of {group.count}: process 0 alone takes requests, this one takes part "
            f"through llm.follow(), which returns False in process 0 (if not llm.follow(): llm.generate(...))"
        )


def _facts(settings: dict[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in settings.items()}


def _check_devices(size: int) -> None:
    """ValueError unless the first `size` devices are shared evenly by all processes."""
    count, total = jax.process_count(), jax.device_count()
    taken = Counter(device.process_index for device in jax.devices()[:size])
    if size > total or len(taken) != count or len(set(taken.values())) != 1:
        having = Counter(device.process_index for device in jax.devices())
        shown = ", ".join(f"process {process} has {having[process]}" for process in sorted(having))
        raise ValueError(
            f"a model over {size} devices (tensor_parallel_size times sequence_parallel_size) does not take the same "
            f"number from each of {count} processes ({shown}); split it over all {total}, or start fewer processes"
        )
