"""Several processes, or hosts, that run one model: who they are, and what happens when one of them is lost.

Process 0 has the driver; the others take part in what it announces (`followers`). Every process but the first holds
one TCP connection to process 0. A death is seen by the connection, which closes, or falls silent for `timeout`
seconds; process 0 tells the others. A thread that waits in a collective for a process that is gone may wait for ever
(on TPU and GPU no error comes), so a process whose threads do not come back is ended from outside of them.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax._src import distributed

from .channel import Door, Message, Wire, enter

TIMEOUT = 60.0
EXIT_CODE = 70
"""With which a process ends that waits in a collective for one that is gone."""
EXPLAIN_SECONDS = 2.0
GRACE_SECONDS = 5.0
LEAVE_SECONDS = 300
CHANNEL, TIMEOUT_KEY = "tokenloom/channel", "tokenloom/timeout"
END, LOST = "tokenloom/end", "tokenloom/lost"


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


def _leave(barrier: str = END, seconds: float = LEAVE_SECONDS) -> None:
    """At exit wait for the others: JAX ends a process whose coordinator, which lives in process 0, is gone."""
    client = distributed.global_state.client
    if client is not None:
        try:
            client.wait_at_barrier(barrier, int(1000 * seconds))
            if jax.process_index() == 0:  # returns when all others have left
                client.get_live_nodes(list(range(jax.process_count())))
        except jax.errors.JaxRuntimeError as error:
            if barrier == END:
                print(f"tokenloom: not all processes came to their end: {error}", file=sys.stderr)


def _leave_soon() -> None:
    """Wait at exit for those that are left to say what they have to say, no longer."""
    atexit.unregister(_leave)
    atexit.register(_leave, LOST, GRACE_SECONDS)


def _client() -> Any:
    client = distributed.global_state.client
    if client is None:
        raise ValueError("the processes have not joined; call tokenloom.initialize first, in every process")
    return client


class Group:
    """This process (`index`) among the `count` that run one model. `wires`: its connections, by process. `stage`:
    "opening" the model, "open", or "following" what process 0 announces."""

    def __init__(self, index: int, count: int, wires: Mapping[int, Wire], timeout: float):
        self.index, self.count, self.timeout, self.wires = index, count, timeout, dict(wires)
        self.lost: str | None = None
        self.ended, self.stage = False, "opening"
        self._gone, self._lock = threading.Event(), threading.Lock()
        self._inside, self._lost_at, self._commanded_at = 0, 0.0, 0.0
        self._stages = dict.fromkeys(wires, ("opening", 0.0))
        self._inboxes: dict[int, queue.SimpleQueue[Message | None]] = {i: queue.SimpleQueue() for i in wires}
        self._listeners = [
            threading.Thread(target=self._listen, args=(other,), name=f"process-{other}", daemon=True)
            for other in wires
        ]
        for thread in (*self._listeners, threading.Thread(target=self._beat, name="processes", daemon=True)):
            thread.start()
        atexit.register(self.close)

    @staticmethod
    def join() -> Group:
        """Meet the other processes; ProcessLost, naming them, when some do not come in time."""
        index, count = jax.process_index(), jax.process_count()
        if index:
            return Group(index, count, *_enter(index))
        return Group(0, count, *_gather(count))

    # -- messages ------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        return self.index == 0

    def announce(
        self,
        kind: str,
        values: Mapping[str, Any] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Tell all others; ProcessLost when one is gone."""
        self.check()
        payload = Message(kind, values or {}, arrays or {}).encode()
        for other in self.wires:
            self._send(other, payload)
        self.check()

    def command(
        self,
        name: str,
        values: Mapping[str, Any] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Announce what only a process that follows will do."""
        self._commanded_at = time.monotonic()
        self.announce(name, values, arrays)

    def reply(self, values: Mapping[str, Any]) -> None:
        """Answer process 0."""
        self._send(0, Message("reply", values).encode())

    def replies(self) -> dict[int, Mapping[str, Any]]:
        """What each follower answers to what was announced."""
        return {other: self._next(other).values for other in self.wires}

    def next(self) -> Message | None:
        """The next message of process 0; None: it has closed."""
        message = self._next(0)
        return None if message.kind == "close" else message

    def _next(self, other: int) -> Message:
        message = None if self.lost else self._inboxes[other].get()
        if message is None:
            raise ProcessLost(self.lost)
        return message

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers, in every process."""
        if self.leads:
            number = min(number, *(reply["number"] for reply in self.replies().values()))
            self.announce("least", {"number": number})
            return number
        self.reply({"number": number})
        return self._next(0).values["number"]

    def agree(self, facts: Mapping[str, str]) -> None:
        """ValueError, in every process, where the processes' facts differ; it names the facts."""
        if self.leads:
            differing = {other: theirs for other, theirs in self.replies().items() if theirs != facts}
            problem = "; ".join(_differences(facts, other, theirs) for other, theirs in differing.items())
            self.announce("agreed", {"problem": problem})
        else:
            self.reply(facts)
            problem = self._next(0).values["problem"]
        if problem:
            self.close()
            raise ValueError(f"{problem}. Start every process with the same settings, files and versions")

    # -- losses --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """ProcessLost when a process is gone."""
        if self.lost is not None:
            raise ProcessLost(self.lost)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around what may wait for other processes: an error becomes ProcessLost where a lost process explains it,
        and where no error comes this process is ended."""
        self.check()
        with self._lock:
            self._inside += 1
        try:
            yield
        except ProcessLost:
            raise
        except Exception as error:
            self.explain(error)
            raise
        finally:
            with self._lock:
                self._inside -= 1

    def explain(self, error: Exception) -> None:
        """Raise ProcessLost where a lost process is the reason of an error: it may be noted a moment later."""
        if self._gone.wait(0 if self.ended else EXPLAIN_SECONDS):
            raise ProcessLost(self.lost) from error

    def fail(self, error: BaseException) -> None:
        """This process cannot go on: tell the others why."""
        if not self.ended and self.lost is None:
            self.ended = True
            self.lost = f"process {self.index} of {self.count}, this one, failed ({error}); start all again"
            reason = f"failed ({type(error).__name__}: {str(error)[:2000]})"
            _leave_soon()
            self._tell(Message("failed", {"process": self.index, "reason": reason}))
            self.close()

    def _lose(self, process: int, reason: str) -> None:
        """Note that a process is gone, say so, tell the others, and wake whoever waits for a message."""
        with self._lock:
            if self.ended or self.lost is not None:
                return
            self._lost_at = time.monotonic()
            self.lost = (
                f"process {process} of {self.count} {reason}. The model is split over all processes (this is process "
                f"{self.index}), so none can go on: see that process's output for the reason, and start all again"
            )
        self._gone.set()
        print(f"tokenloom: {self.lost}", file=sys.stderr, flush=True)
        _leave_soon()
        self._tell(Message("failed", {"process": process, "reason": reason}))
        for inbox in self._inboxes.values():
            inbox.put(None)

    def _send(self, other: int, payload: bytes) -> None:
        try:
            self.wires[other].send(payload)
        except OSError as error:
            self._lose(other, _reason(error, self.timeout))

    def _tell(self, message: Message) -> None:
        """Send to whoever still listens."""
        for wire in self.wires.values():
            with suppress(OSError):
                wire.send(message.encode())

    # -- threads -------------------------------------------------------------------------------------------

    def _listen(self, other: int) -> None:
        """Receive from one process until its connection ends."""
        try:
            while (message := self.wires[other].receive()) is not None:
                if message.kind == "beat":
                    stage, before = message.values["stage"], self._stages[other]
                    self._stages[other] = before if before[0] == stage else (stage, time.monotonic())
                elif message.kind == "failed":
                    self._lose(message.values["process"], message.values["reason"])
                else:
                    self.ended |= message.kind == "close"
                    self._inboxes[other].put(message)
            self._lose(other, "has ended (its connection was closed)")
        except (OSError, ValueError) as error:
            self._lose(other, _reason(error, self.timeout))
        finally:
            self.wires[other].close()

    def _beat(self) -> None:
        """Say that this process lives, a few times a `timeout`; end it where a thread never comes back."""
        while not self.ended:
            time.sleep(min(5.0, self.timeout / 6))
            if self.lost is not None:
                if time.monotonic() - self._lost_at > GRACE_SECONDS:
                    return self._end_stuck()
                continue
            for other in self.wires:
                self._send(other, Message("beat", {"stage": self.stage}).encode())
                stage, since = self._stages[other]
                waited = time.monotonic() - max(since, self._commanded_at)
                if self._commanded_at and stage == "open" and waited > self.timeout:
                    self._lose(other, f"has not followed for {self.timeout:g} s (it must call llm.follow())")

    def _end_stuck(self) -> None:
        """End the process if a thread of it still waits for the one that was lost."""
        if self._inside:
            print(
                f"tokenloom: a computation still waits for the lost process; this one, {self.index}, ends with exit "
                f"code {EXIT_CODE}", file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(EXIT_CODE)

    def close(self) -> None:
        """Leave in order; process 0 sends the others away."""
        if not self.ended and self.lost is None and self.leads:
            self._tell(Message("close"))
        self.ended = True
        for wire in self.wires.values():
            wire.finish()
        for thread in self._listeners if self.lost is None and self.leads else ():
            thread.join(min(GRACE_SECONDS, self.timeout))
        atexit.unregister(self.close)


def _gather(count: int) -> tuple[dict[int, Wire], float]:
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


def _enter(index: int) -> tuple[dict[int, Wire], float]:
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


def _differences(mine: Mapping[str, str], other: int, theirs: Mapping[str, str]) -> str:
    names = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    shown = [
        f"{name}: {_short(theirs.get(name))} there, {_short(mine.get(name))} in process 0" for name in names
    ]
    return f"process {other} runs other settings than process 0: {'; '.join(shown)}"


def _short(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) <= 200 else f"{value[:200]}..."


def _reason(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"has not answered for {timeout:g} s (stopped, overloaded, or its host cannot be reached)"
    return f"has ended (its connection broke: {error})"
