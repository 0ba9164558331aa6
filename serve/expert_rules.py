"""Expert parallelism in an engine: what it does not go together with, and the model that is told of its devices."""

from __future__ import annotations

from dataclasses import replace

from ..model.expert_parallel import ExpertSplit
from ..model.layers import Numerics
from ..sharding.placement import SEQUENCE, Placement


def check_expert_parallel(enabled: bool, devices: int) -> None:
    """ValueError where experts are to be whole on their devices and there is one; `devices`: tensor_parallel_size."""
    if not isinstance(enabled, bool):
        raise ValueError(f"enable_expert_parallel={enabled!r} must be True or False")
    if enabled and devices == 1:
        raise ValueError(
            "enable_expert_parallel=True splits a model's experts over tensor_parallel_size devices, but "
            "tensor_parallel_size=1; choose at least 2, or enable_expert_parallel=False"
        )


def with_experts(numerics: Numerics, place: Placement | None) -> Numerics:
    """The numerics of a model that lives at `place`: its mixtures know which devices have which experts."""
    if place is None or not place.expert_axes:
        return numerics
    tokens = SEQUENCE if place.sequence > 1 else None
    return replace(numerics, experts=ExpertSplit(place.mesh, place.expert_axes, tokens))
