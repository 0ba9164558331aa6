"""A plan by its name, for the devices at hand: `LLM(plan="seq=2,tensor=4")`, `LLM(plan="auto")`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ..model import checkpoint
from ..model.config import ModelConfig
from ..sharding.division import Division, divisions
from ..sharding.placement import split_heads
from ..sharding.topology import GENERATIONS, Topology
from .planner import models
from .planner.plan import plan as planned

ALONE = {
    "tensor_parallel_size": 1, "sequence_parallel_size": 1, "data_parallel_size": 1, "enable_expert_parallel": False,
}  # fmt: skip
"""The settings that a plan stands for, as they are without one."""


def plan_sizes(
    plan: str | None, model: str | Path | ModelConfig | dict[str, Any], sizes: Mapping[str, Any], **settings: Any
) -> dict[str, Any]:  # fmt: skip
    """The `sizes` (of ALONE) that a plan's name stands for, over all devices (of all processes): `sizes` themselves
    where plan is None.

    "auto" on TPU asks the planner, which knows the chips' data sheets and these `settings` of an engine; elsewhere it
    is the widest tensor plan whose heads come out whole, in replicas. ValueError for a name that does not cover the
    devices, or beside sizes that say the same.
    """
    if plan is None:
        return dict(sizes)
    said = [f"{name}={value!r}" for name, value in sizes.items() if value != ALONE[name]]
    if said:
        raise ValueError(f"plan={plan!r} says what {', '.join(said)} says too; give one of them")
    devices = jax.devices()
    name = _auto(model, devices, settings) if plan == "auto" else plan
    division = Division.parse(name, len(devices))
    return {
        "tensor_parallel_size": division.size, "sequence_parallel_size": division.seq,
        "data_parallel_size": division.data, "enable_expert_parallel": division.experts,
    }  # fmt: skip


def _auto(
    model: str | Path | ModelConfig | dict[str, Any], devices: Sequence[Any], settings: Mapping[str, Any]
) -> str:
    """The name of the plan to take for a model on these devices."""
    if isinstance(model, str | Path):
        config = checkpoint.load_config(checkpoint.resolve(model))[1]
    else:
        config = models.find(model)[1]
    if (topology := slice_of(devices)) is not None:
        return planned(config, topology.name, compile=False, **settings).plan
    heads = config.attention_heads
    return next(
        one.name for one in divisions(len(devices), experts=False) if split_heads(one.size, heads) is not None
    )


def slice_of(devices: Sequence[Any]) -> Topology | None:
    """The slice of TPUs that these devices are, as far as its kind and size tell; None for other devices."""
    for generation in GENERATIONS:
        if generation.kind == devices[0].device_kind:
            fitting = [one for one in generation.topologies() if one.devices == len(devices)]
            return fitting[0] if fitting else None
    return None
