"""Processes of their own, whose CPU pretends to be several devices, and XLA options for programs that run once."""

import os
import subprocess
import sys
from importlib.metadata import version

LITTLE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
"""Options of every version of XLA with which programs for the CPU are optimised less by LLVM."""
TWO_EMITTERS = tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11)
QUICK = f"{LITTLE} --xla_cpu_use_fusion_emitters=false" if TWO_EMITTERS else LITTLE
"""With these an engine on the CPU compiles in a third of the time. Versions that do not know an option (libtpu's XLA,
and jaxlib from 0.11 on, the last) end the process."""


def run_on(devices: int, *arguments: str) -> str:
    """What `python ARGUMENTS` prints in a process with so many CPU devices; it must end well."""
    env = {
        **os.environ, "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
    }  # fmt: skip
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
