"""What a request gives back: texts, tokens, log-probabilities and times.

Field names and meanings are vLLM's, so that programs written for it read these objects unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import inf
from typing import Any, Literal

from .sampling.params import SamplingParams

FinishReason = Literal["stop", "length", "repetition", "segment", "timeout", "abort", "error"]
# What ended before its end: `LLM.resume` goes on from there.
RESUMABLE = (None, "segment", "timeout", "abort")
SNAPSHOT_FORMAT = 1


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
    finish_reason: "stop" (end-of-sequence token, stop token or stop string), "length", "repetition", "segment"
    (its quota is used up; the text is what is certain by then), "timeout", "abort", "error"; None while it is
    still running. stop_reason: the stop string or the stop token's id, or "repetition_detected"; None when an
    end-of-sequence token ended it, or nothing did. weight_versions: for each token of `token_ids` the
    `LLM.weight_version` of the weights that chose it; it never falls. carry: numbers of logits processors that
    `LLM.resume` needs besides the tokens (Mirostat's mu); None where the tokens say all.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    weight_versions: Sequence[int] = ()
    carry: list[float] | None = None

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
    finish_reason is "error". sampling_params, seed (the engine's choice where the request brought none) and
    cache_salt are what `LLM.resume` continues with. `metrics` are those of the last segment. num_cached_tokens:
    tokens that the first sample found in the prefix cache when it started.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    error: str | None = None
    sampling_params: SamplingParams | None = None
    seed: int | None = None
    num_cached_tokens: int | None = None
    cache_salt: str | None = None

    @property
    def resumable(self) -> bool:
        """Whether a sample was stopped before its end ("segment", "timeout", "abort"): `LLM.resume` goes on."""
        return any(completion.finish_reason in RESUMABLE for completion in self.outputs)

    def snapshot(self) -> dict[str, Any]:
        """All that `LLM.resume` needs, as JSON values: another process can go on. ValueError for an output
        without its sampling parameters and seed."""
        if self.sampling_params is None or self.seed is None:
            raise ValueError(
                f"the output of request {self.request_id!r} has no sampling_params or no seed, so nothing could "
                "go on from it; take a snapshot of an output that an LLM returned"
            )
        return {
            "format": SNAPSHOT_FORMAT,
            "request_id": self.request_id,
            "prompt": self.prompt,
            "prompt_token_ids": list(self.prompt_token_ids),
            "sampling_params": _params_to_plain(self.sampling_params),
            "seed": self.seed,
            "cache_salt": self.cache_salt,
            "error": self.error,
            "prompt_logprobs": _logprobs_to_plain(self.prompt_logprobs),
            "outputs": [
                {
                    **{item.name: getattr(completion, item.name) for item in fields(completion)},
                    "token_ids": list(completion.token_ids),
                    "weight_versions": list(completion.weight_versions),
                    "logprobs": _logprobs_to_plain(completion.logprobs),
                }
                for completion in self.outputs
            ],
        }

    @staticmethod
    def from_snapshot(snapshot: Mapping[str, Any]) -> RequestOutput:
        """The inverse of `snapshot`, also after JSON. ValueError for anything else."""
        found = snapshot.get("format") if isinstance(snapshot, Mapping) else type(snapshot).__name__
        if found != SNAPSHOT_FORMAT:
            raise ValueError(
                f"this is no snapshot that this version reads: its format is {found!r}, not {SNAPSHOT_FORMAT}; "
                "pass what RequestOutput.snapshot() returned"
            )
        plain = {key: value for key, value in snapshot.items() if key != "format"}
        try:
            outputs = [
                CompletionOutput(**{**one, "logprobs": _logprobs_from_plain(one["logprobs"])})
                for one in plain["outputs"]
            ]
            plain["sampling_params"] = _params_from_plain(plain["sampling_params"])
            plain["prompt_logprobs"] = _logprobs_from_plain(plain["prompt_logprobs"])
            finished = all(one.finish_reason is not None for one in outputs)
            return RequestOutput(**{**plain, "outputs": outputs, "finished": finished})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the snapshot is damaged or of another version ({type(error).__name__}: {error}); pass what "
                "RequestOutput.snapshot() returned"
            ) from error

    def __repr__(self) -> str:
        shown = [f"request_id={self.request_id!r}", f"prompt={self.prompt!r}"]
        shown.append(f"prompt_token_ids=<{len(self.prompt_token_ids)} tokens>")
        shown += [f"outputs={self.outputs!r}", f"finished={self.finished}"]
        if self.metrics is not None and self.metrics.latency is not None:
            shown.append(f"latency={self.metrics.latency:.3f}s")
        if self.error is not None:
            shown.append(f"error={self.error!r}")
        return f"RequestOutput({', '.join(shown)})"


def _params_to_plain(params: SamplingParams) -> dict[str, Any]:
    plain = asdict(params)
    if plain["logit_bias"] is not None:
        plain["logit_bias"] = [list(pair) for pair in plain["logit_bias"].items()]  # JSON has no integer keys
    return plain


def _params_from_plain(plain: Mapping[str, Any]) -> SamplingParams:
    bias = plain["logit_bias"]
    return SamplingParams(**{**plain, "logit_bias": None if bias is None else {k: v for k, v in bias}})


def _logprobs_to_plain(entries: list[dict[int, Logprob] | None] | list[dict[int, Logprob]] | None) -> Any:
    """A token's candidates as rows [id, log-probability, rank, text]; null stands for minus infinity."""
    if entries is None:
        return None
    return [
        entry
        and [[i, None if p.logprob == -inf else p.logprob, p.rank, p.decoded_token] for i, p in entry.items()]
        for entry in entries
    ]


def _logprobs_from_plain(plain: Any) -> Any:
    if plain is None:
        return None
    return [
        entry and {i: Logprob(-inf if p is None else p, rank, text) for i, p, rank, text in entry}
        for entry in plain
    ]


def _elapsed(start: float, end: float | None) -> float | None:
    return None if end is None else end - start
