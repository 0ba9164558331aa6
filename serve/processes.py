"""Several processes, or hosts, that run one model: who they are, and what happens when one of them is lost.

Process 0 has the driver; the others take part in what it announces (`followers`). Every process but the first holds
one TCP connection to process 0. A death is seen by the connection, which closes, or falls silent for `timeout`
seconds; process 0 tells the others. A thread that waits in a collective for a process that is gone may wait for ever
(on TPU and GPU no error comes), so a process whose threads do not come back is ended from outside of them.
"""

from __future__ import annotations

import atexit
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

from .channel import Message, Wire
from .joining import ProcessLost, gather, leave_alone, reach

EXIT_CODE = 70
"""With which a process ends that waits in a collective for one that is gone."""
EXPLAIN_SECONDS = 2.0
GRACE_SECONDS = 5.0


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
        atexit.register(self._leave)

    @staticmethod
    def join() -> Group:
        """Meet the other processes; ProcessLost, naming them, when some do not come in time."""
        index, count = jax.process_index(), jax.process_count()
        if index:
            return Group(index, count, *reach(index))
        return Group(0, count, *gather(count))

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
            if problem:
                self.close(problem)
            else:
                self.announce("agreed")
        else:
            self.reply(facts)
            problem = self._next(0).values.get("problem")
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
            leave_alone()
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
        leave_alone()
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
                # Process 0 last: where others end, its collectives may fail, and then it can raise.
                if time.monotonic() - self._lost_at > GRACE_SECONDS * (3 if self.leads else 1):
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

    def close(self, problem: str = "") -> None:
        """Leave in order; process 0 sends the others away, and says what the problem is."""
        first, self.ended = not self.ended, True  # first of all: those who are sent away are not lost
        if first and self.lost is None and self.leads:
            self._tell(Message("close", {"problem": problem}))
        for wire in self.wires.values():
            wire.finish()

    def _leave(self) -> None:
        """At exit. JAX ends the others when process 0 is gone, so it lets them speak first, for a moment."""
        self.close()
        until = time.monotonic() + GRACE_SECONDS
        for thread in self._listeners if self.leads else ():
            thread.join(max(0.0, until - time.monotonic()))


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
