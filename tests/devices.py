"""Processes of their own, whose CPU pretends to be several devices, and XLA options for programs that run once."""

import os
import subprocess
import sys
from importlib.metadata import version

OLDER = tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11)
QUICK = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Later versions have one emitter only, and end the process when they are told to choose.
        *(("--xla_cpu_use_fusion_emitters=false",) if OLDER else ()),
    )
)
"""An engine on the CPU compiles three times as fast with these; what it computes is the same program, less optimised
by LLVM."""


def run_on(devices: int, *arguments: str) -> str:
    """What `python ARGUMENTS` prints in a process with so many CPU devices; it must end well."""
    flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
