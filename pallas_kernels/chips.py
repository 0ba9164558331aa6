"""Facts of chips that kernels need, found by the device kind of the target: never by what is plugged in here.

Sources: jax.experimental.pallas.tpu.get_tpu_info (VMEM, cores), NVIDIA's CUDA programming guide, table of compute
capabilities (shared memory a block), and the products' data sheets (multiprocessors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MiB, KiB = 1 << 20, 1 << 10


@dataclass(frozen=True)
class Chip:
    """`cores`: TensorCores behind one JAX device (2: megacore) or streaming multiprocessors; `memory`: bytes of VMEM
    of one core, or of shared memory that one block may use."""

    platform: str
    name: str
    cores: int
    memory: int

    @staticmethod
    def of(device: Any) -> Chip:
        """The chip of a `jax.Device`, also of a compile-only one; unknown kinds get the smallest of their platform."""
        kind = device.device_kind
        if device.platform == "tpu":
            return TPUS.get(kind, Chip("tpu", kind, 1, 16 * MiB))
        if device.platform in ("gpu", "cuda", "rocm"):
            found = [chip for part, chip in GPUS.items() if part in kind]
            return found[0] if found else Chip("gpu", kind, 58, 99 * KiB)
        return CPU


CPU = Chip("cpu", "cpu", 1, MiB)
TPUS = {
    "TPU v4": Chip("tpu", "v4", 2, 16 * MiB),
    "TPU v5 lite": Chip("tpu", "v5e", 1, 128 * MiB),
    "TPU v5e": Chip("tpu", "v5e", 1, 128 * MiB),
    "TPU v5": Chip("tpu", "v5p", 2, 64 * MiB),
    "TPU v5p": Chip("tpu", "v5p", 2, 64 * MiB),
    "TPU v6 lite": Chip("tpu", "v6e", 1, 128 * MiB),
    "TPU v6e": Chip("tpu", "v6e", 1, 128 * MiB),
    "TPU7x": Chip("tpu", "7x", 1, 64 * MiB),
}
# By a part of the device kind, the first that fits.
GPUS = {
    "H200": Chip("gpu", "h200", 132, 227 * KiB),
    "H100": Chip("gpu", "h100", 132, 227 * KiB),
    "A100": Chip("gpu", "a100", 108, 163 * KiB),
    "L40": Chip("gpu", "l40", 142, 99 * KiB),
    "L4": Chip("gpu", "l4", 58, 99 * KiB),
    "B200": Chip("gpu", "b200", 148, 227 * KiB),
}
