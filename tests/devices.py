"""Processes of their own, whose CPU pretends to be several devices."""

import os
import subprocess
import sys


def run_on(devices: int, *arguments: str) -> str:
    """What `python ARGUMENTS` prints in a process with so many CPU devices; it must end well."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
