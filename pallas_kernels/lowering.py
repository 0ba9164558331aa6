"""Lowering of programs with Pallas kernels for chips that are not here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


def lower_for_gpu(function: Callable[..., Any], *specs: Any, kind: str = "NVIDIA H200") -> jax.stages.Lowered:
    """`function` lowered for one GPU of a device kind, on any machine; specs: pytrees of `jax.ShapeDtypeStruct`.

    Pallas kernels go through their whole lowering to Triton, down to the module that the driver's compiler takes;
    that compiler itself needs a GPU. What it cannot express raises here. The compute capability follows the kind
    from JAX 0.12 on; before, it is the one of the GPU at hand, or 9.0.
    """
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    mesh = AbstractMesh((1,), ("device",), abstract_device=device)
    with use_abstract_mesh(mesh):
        return jax.jit(function).trace(*specs).lower(lowering_platforms=("cuda",))
