"""Requests driven to their end by the thread that wants their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tqdm.auto import tqdm

from .engine import Engine
from .interrupt import deferred_interrupt
from .locks import FairLock
from .replicas import Replicas
from .request import Request


def finish(
    engine: Engine | Replicas, lock: FairLock, requests: Sequence[Request], *, alone: bool, show: bool
) -> None:
    """Queue requests as room appears and step until all are done. An interrupt ends the requests. alone: what the
    engine refuses raises ValueError, else it becomes the request's error. show: a progress bar."""
    held = deque(request for request in requests if request.error is None)
    try:
        with deferred_interrupt() as interrupted, tqdm(
            total=len(requests), desc="generating", unit="prompt", disable=not show
        ) as bar:  # fmt: skip
            # Another thread's step may finish our requests, so the end is read from the requests.
            waiting, mine = deque(requests), {id(request) for request in requests}
            while waiting:
                while waiting and waiting[0].finished:
                    waiting.popleft()
                if not waiting:
                    break
                with lock:
                    _feed(engine, held, alone)
                    done = {id(sample.request) for sample in engine.step() if sample.request.finished}
                bar.update(len(done & mine))
                if interrupted():
                    raise KeyboardInterrupt
    except BaseException:
        abort(engine, lock, requests)
        raise


def _feed(engine: Engine | Replicas, held: deque[Request], alone: bool) -> None:
    """Queue the held requests that the waiting queue has room for."""
    while held and engine.room:
        request = held.popleft()
        try:
            engine.add(request)
        except ValueError as error:
            if alone:
                raise
            request.error = str(error)
        if request.cancelled:
            engine.abort(request)


def abort(engine: Engine | Replicas, lock: FairLock, requests: Sequence[Request]) -> None:
    """End requests between two steps, those that are held back too."""
    with lock:
        for request in requests:
            request.cancelled = True
            engine.abort(request)
