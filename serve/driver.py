"""The driver: a thread that steps an LLM's engine for everyone who hands it requests.

Callers never step and never wait for a step: they submit, and hear of new tokens through a callback. `generate`
and `stream` may run beside it, in other threads; then each steps for all, one step at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from .outputs import CompletionOutput, RequestOutput
from .prompts import Prompt, salt_of
from .request import Request, Sample
from .sampling.params import SamplingParams

if TYPE_CHECKING:
    from .llm import LLM


@dataclass(frozen=True)
class Update:
    """What happened to a request since the last update.

    deltas: new text, token ids and log-probabilities of each sample that advanced; in the first update, which
    says that the request was accepted, there are none. output: the whole result, in the last update. error: in
    the last update when there is no result: a ValueError (the request was refused, or failed on its way) or what
    broke the engine.
    """

    deltas: list[CompletionOutput] = field(default_factory=list)
    output: RequestOutput | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        return self.output is not None or self.error is not None


@dataclass(eq=False)
class Handle:
    """A submitted request. `shown` counts the tokens and characters of each sample that were told."""

    text: str | None
    prompt_ids: list[int]
    params: SamplingParams
    on_update: Callable[[Update], None]
    every_step: bool
    cache_salt: str | None = None
    request: Request | None = None
    shown: list[tuple[int, int]] = field(default_factory=list)
    cancelled: bool = False


class Driver:
    """Steps `llm.engine` while there is something to do; sleeps otherwise. Use as a context manager, or `stop`.

    `failure` is the exception that ended it, if one did: the engine cannot be trusted afterwards.
    """

    def __init__(self, llm: LLM):
        self.llm = llm
        self.failure: Exception | None = None
        self._incoming: list[Handle] = []
        self._live: list[Handle] = []
        self._wake = threading.Condition()
        self._stopping = self._aborting = False
        self._thread = threading.Thread(target=self._run, name="tokenloom-driver", daemon=True)
        self._thread.start()

    # -- what other threads call ---------------------------------------------------------------------------

    def submit(
        self, prompt: Prompt, params: SamplingParams, on_update: Callable[[Update], None], *,
        every_step: bool = True,
    ) -> Handle:  # fmt: skip
        """Queue a prompt; it is tokenized here, in the caller's thread.

        on_update is called in the driver's thread and must return at once; if it raises, the request is
        aborted. every_step=False: it is called with the last update only. Raises ValueError for a prompt that
        cannot be tokenized (other refusals come as an update) and RuntimeError when the driver has stopped.
        """
        text, ids = self.llm.tokens(prompt)
        handle = Handle(text, ids, params, on_update, every_step, salt_of(prompt))
        with self._wake:
            if self._stopping or self.failure is not None:
                raise RuntimeError(f"the driver has stopped: {self.failure or 'it was asked to'}")
            self._incoming.append(handle)
            self._wake.notify()
        return handle

    def cancel(self, handle: Handle) -> None:
        """Abort a request at the next step; it gets no further update."""
        handle.cancelled = True

    def stop(self, *, finish: bool = False) -> None:
        """Take no more requests and end the thread: first finish the requests at hand, or abort them."""
        with self._wake:
            self._stopping, self._aborting = True, self._aborting or not finish
            self._wake.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Generations that were submitted and do not run yet."""
        incoming = sum(handle.params.n for handle in self._incoming)
        return incoming + sum(len(one.scheduler.waiting) for one in self.llm.engine.replicas)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._incoming or self._live or self._stopping)
            try:
                with self.llm._lock:
                    told = self._admit()
                    self._drop()
                    if self._live:
                        self.llm.engine.step()
                    told += self._collect()
            except Exception as error:
                self._fail(error)
                return
            for handle, update in told:
                self._tell(handle, update)
            if self._stopping and not self._live and not self._incoming:
                return

    def _admit(self) -> list[tuple[Handle, Update]]:
        """Queue new requests in the engine; what it refuses is told so."""
        incoming = self._incoming[:]
        told = []
        for handle in incoming:
            if handle.cancelled:
                continue
            try:
                handle.request = self.llm.enqueue(
                    handle.text, handle.prompt_ids, handle.params, cache_salt=handle.cache_salt
                )
            except ValueError as error:
                told.append((handle, Update(error=error)))
                continue
            handle.shown = [(0, 0)] * handle.params.n
            self._live.append(handle)
            told.append((handle, Update()))
        with self._wake:  # not before: were the engine to break, they would never hear of it
            del self._incoming[: len(incoming)]
        return told

    def _drop(self) -> None:
        """Abort what was cancelled, or everything when the driver is to stop at once."""
        for handle in self._live:
            if (handle.cancelled or self._aborting) and handle.request is not None:
                self.llm.engine.abort(handle.request)
        self._live = [handle for handle in self._live if not handle.cancelled]

    def _collect(self) -> list[tuple[Handle, Update]]:
        """What is new of each live request, whoever made the step."""
        told, still = [], []
        for handle in self._live:
            request = handle.request
            assert request is not None
            finished = request.finished
            deltas = _deltas(handle, request) if handle.every_step else []
            if deltas or finished:
                failed = None if request.error is None else ValueError(request.error)
                output = request.output() if finished and failed is None else None
                told.append((handle, Update(deltas, output, failed)))
            if not finished:
                still.append(handle)
        self._live = still
        return told

    def _tell(self, handle: Handle, update: Update) -> None:
        if handle.cancelled or not (handle.every_step or update.last):
            return
        try:
            handle.on_update(update)
        except Exception:  # nobody listens any more (a closed event loop, for instance)
            handle.cancelled = True

    def _fail(self, error: Exception) -> None:
        """The engine broke: everyone is told, and nothing is taken any more."""
        with self._wake:
            self.failure = error
            everyone = dict.fromkeys([*self._live, *self._incoming])
            self._live, self._incoming = [], []
        for handle in everyone:
            self._tell(handle, Update(error=error))


def _deltas(handle: Handle, request: Request) -> list[CompletionOutput]:
    """New tokens and text of each sample, and its finish reason once."""
    found = []
    for place, sample in enumerate(request.samples):
        tokens, characters = handle.shown[place]
        count = len(sample.sequence.tokens) - len(request.prompt_ids)
        if tokens < 0 or (count == tokens and sample.finish_reason is None):
            continue
        found.append(_delta(sample, tokens, characters))
        done = sample.finish_reason is not None
        handle.shown[place] = (-1, 0) if done else (count, characters + len(found[-1].text))
    return found


def _delta(sample: Sample, tokens: int, characters: int) -> CompletionOutput:
    return CompletionOutput(
        index=sample.index,
        text=sample.text[characters:],
        token_ids=sample.sequence.tokens[len(sample.request.prompt_ids) + tokens :],
        logprobs=None if sample.logprobs is None else sample.logprobs[tokens:],
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
    )
