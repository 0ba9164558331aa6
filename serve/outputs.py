"""What a request gives back: texts, tokens, log-probabilities and times.

Field names and meanings are vLLM's, so that programs written for it read these objects unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Logprob:
    """One candidate token: its log-probability (natural log), its 1-based rank, and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request: seconds on one clock (`time.time`), None: not yet.

    `queue_time` (s) is the time that it waited before its first step; `preemptions` counts how often its
    pages were taken away.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    preemptions: int = 0

    @property
    def queue_time(self) -> float | None:
        return _elapsed(self.arrival_time, self.first_scheduled_time)

    @property
    def time_to_first_token(self) -> float | None:
        return _elapsed(self.arrival_time, self.first_token_time)

    @property
    def latency(self) -> float | None:
        return _elapsed(self.arrival_time, self.finished_time)


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt.

    logprobs: a dict for each token of `token_ids`, from token id to its `Logprob`, or None if not asked for.
    finish_reason: "stop" (end-of-sequence token, stop token or stop string), "length", "abort", "error";
    None while it is still running. stop_reason: the stop string or the stop token's id; None when an
    end-of-sequence token ended it, or nothing did.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None

    def __repr__(self) -> str:
        shown = [f"index={self.index}", f"text={self.text!r}", f"token_ids={list(self.token_ids)}"]
        if self.cumulative_logprob is not None:
            shown.append(f"cumulative_logprob={self.cumulative_logprob:.4f}")
        if self.logprobs is not None:
            shown.append(f"logprobs=<{len(self.logprobs)} tokens>")
        shown.append(f"finish_reason={self.finish_reason!r}")
        if self.stop_reason is not None:
            shown.append(f"stop_reason={self.stop_reason!r}")
        return f"CompletionOutput({', '.join(shown)})"


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its continuations, so far (`finished=False`) or for good.

    prompt: None when the request came as token ids. prompt_logprobs: an entry a prompt token, None for the
    first (nothing predicts it), or None if not asked for. error: what went wrong, when a completion's
    finish_reason is "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    error: str | None = None

    def __repr__(self) -> str:
        shown = [f"request_id={self.request_id!r}", f"prompt={self.prompt!r}"]
        shown.append(f"prompt_token_ids=<{len(self.prompt_token_ids)} tokens>")
        shown += [f"outputs={self.outputs!r}", f"finished={self.finished}"]
        if self.metrics is not None and self.metrics.latency is not None:
            shown.append(f"latency={self.metrics.latency:.3f}s")
        if self.error is not None:
            shown.append(f"error={self.error!r}")
        return f"RequestOutput({', '.join(shown)})"


def _elapsed(start: float, end: float | None) -> float | None:
    return None if end is None else end - start
