"""How processes meet: JAX's multi-controller runtime, and one TCP connection from each process to process 0.

Process 0 leaves the port and a random token in JAX's key-value store, where the others find them.
"""

from __future__ import annotations

import atexit
import json
import sys
import time
from typing import Any

import jax
from jax._src import distributed

from .channel import Door, Message, Wire, enter

TIMEOUT = 60.0
LEAVE_SECONDS = 300
CHANNEL, TIMEOUT_KEY, END = "tokenloom/channel", "tokenloom/timeout", "tokenloom/end"


class ProcessLost(RuntimeError):
    """Another process of this model ended or fell silent: nothing can be computed any more."""


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None, *,
    timeout: float = TIMEOUT, initialization_timeout: float = 300,
) -> None:  # fmt: skip
    """Join the other processes; call it once, before anything else of JAX.

    coordinator_address: "host:port" of process 0, the same everywhere; num_processes: how many there are; process_id:
    which this is, from 0. All may be left out where JAX finds them itself (TPU VMs, Slurm, Open MPI). timeout: after
    so many seconds of silence a process counts as lost (process 0's figure holds for all). initialization_timeout:
    how long to wait for the others to start. ValueError for arguments that cannot be.
    """
    known = coordinator_address, num_processes, process_id
    if coordinator_address is not None and not coordinator_address.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator_address={coordinator_address!r} must be host:port of process 0")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id={process_id} must be from 0 to num_processes - 1 = {num_processes - 1}: each has its own"
        )
    if any(value is None for value in known) and any(value is not None for value in known):
        raise ValueError(
            f"coordinator_address, num_processes and process_id go together, got {known}; give all, or none where JAX "
            f"finds them itself (TPU VMs, Slurm, Open MPI)"
        )
    if not timeout > 0:
        raise ValueError(
            f"timeout={timeout} must be above 0: seconds of silence after which a process is lost"
        )
    # JAX would end every process itself some time after one is lost; the channel says sooner who, and why.
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(
            *known, initialization_timeout=int(initialization_timeout),
            heartbeat_timeout_seconds=max(10, int(timeout)), shutdown_timeout_seconds=max(10, int(timeout)),
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(
            f"the processes could not join ({error}); call tokenloom.initialize once, before anything else of JAX, "
            f"and start all {num_processes or ''} processes within {initialization_timeout:g} s"
        ) from error
    if jax.process_index() == 0:
        _client().key_value_set(TIMEOUT_KEY, repr(float(timeout)))
    atexit.register(_leave)


def _leave() -> None:
    """At exit wait for the others: JAX ends a process whose coordinator, which lives in process 0, is gone."""
    client = distributed.global_state.client
    if client is not None:
        try:
            client.wait_at_barrier(END, 1000 * LEAVE_SECONDS)
            if jax.process_index() == 0:  # returns when all others have left
                client.get_live_nodes(list(range(jax.process_count())))
        except jax.errors.JaxRuntimeError as error:
            print(f"tokenloom: not all processes came to their end: {error}", file=sys.stderr)


def leave_alone() -> None:
    """A process was lost: wait for nobody at exit."""
    atexit.unregister(_leave)


def _client() -> Any:
    client = distributed.global_state.client
    if client is None:
        raise ValueError("the processes have not joined; call tokenloom.initialize first, in every process")
    return client


def gather(count: int) -> tuple[dict[int, Wire], float]:
    """Process 0's connections to the others, once all are there, and the time-out that holds for all."""
    client = _client()
    try:
        timeout = float(client.key_value_try_get(TIMEOUT_KEY))
    except jax.errors.JaxRuntimeError:  # jax.distributed.initialize was called by somebody else
        timeout = TIMEOUT
    door, wires, until = Door(_coordinator()), {}, time.monotonic() + timeout
    client.key_value_set(CHANNEL, json.dumps({"port": door.port, "token": door.token, "timeout": timeout}))
    try:
        while len(wires) < count - 1 and (left := until - time.monotonic()) > 0:
            found = door.admit(left, timeout)
            wires |= {} if found is None else {found[0]: found[1]}
    finally:
        client.key_value_delete(CHANNEL)
        door.close()
    missing = sorted(set(range(1, count)) - wires.keys())
    for wire in wires.values():
        wire.close() if missing else wire.send(Message("welcome").encode())
    if missing:
        raise ProcessLost(
            f"of {count} processes {', '.join(map(str, missing))} did not open the model within {timeout:g} s; run the "
            f"same script in every process (one that still follows another LLM cannot open the next)"
        )
    return wires, timeout


def reach(index: int) -> tuple[dict[int, Wire], float]:
    """A follower's connection to process 0, and the time-out that holds for all."""
    client, host = _client(), _coordinator()
    try:
        told = json.loads(client.blocking_key_value_get(CHANNEL, int(1000 * 10 * TIMEOUT)))
        wire = enter(host, told["port"], told["token"], index, told["timeout"])
        welcome = wire.receive()
    except (OSError, jax.errors.JaxRuntimeError) as error:
        raise ProcessLost(
            f"process {index} does not reach process 0 on {host} ({error}); run the same script in every process, and "
            f"let them open TCP connections to each other"
        ) from error
    if welcome is None:
        raise ProcessLost(
            f"process 0 gave up before all processes had opened the model; this is process {index}"
        )
    return {0: wire}, told["timeout"]


def _coordinator() -> str:
    """The name of process 0's host."""
    return (distributed.global_state.coordinator_address or "").rpartition(":")[0].strip("[]")
