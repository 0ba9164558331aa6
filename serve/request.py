"""A request and its samples: what the host knows about a generation besides its place in the schedule."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from .detokenizer import Detokenizer
from .outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from .sampling.params import SamplingParams
from .sampling.sampler import Scores
from .scheduler import Sequence
from .tokenizer import Tokenizer


@dataclass(eq=False)
class Request:
    """One prompt with its parameters; `samples` has n generations. `error` ends it before it ran."""

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    bad_word_ids: list[list[int]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(arrival_time=time.time()))
    error: str | None = None
    cache_salt: str | None = None

    @property
    def finished(self) -> bool:
        return self.error is not None or all(sample.finish_reason for sample in self.samples)

    def output(self) -> RequestOutput:
        """What the user sees now; final when `finished`."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_ids),
            prompt_logprobs=self.prompt_logprobs,
            outputs=[sample.output() for sample in self.samples],
            finished=self.finished,
            metrics=self.metrics,
            error=self.error,
            num_cached_tokens=self.samples[0].sequence.cached if self.samples else None,
        )


@dataclass(eq=False)
class Sample:
    """One of a request's n generations: its sequence, its text, its log-probabilities, and why it ended."""

    request: Request
    index: int
    sequence: Sequence
    detokenizer: Detokenizer | None
    stop_ids: frozenset[int]
    eos_ids: frozenset[int]
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        return "" if self.detokenizer is None else self.detokenizer.text

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.tokens[len(self.request.prompt_ids) :]

    def accept(self, token: int, logprobs: dict[int, Logprob] | None) -> None:
        """Take the next token; sets `finish_reason` when it ends the generation."""
        sequence, params = self.sequence, self.request.params
        sequence.tokens.append(token)
        if logprobs is not None and self.logprobs is not None:
            self.logprobs.append(logprobs)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + logprobs[token].logprob
        generated = len(sequence.tokens) - len(self.request.prompt_ids)
        ended = generated > params.min_tokens and (token in self.eos_ids or token in self.stop_ids)
        if ended:
            self.finish_reason = "stop"
            self.stop_reason = None if token in self.eos_ids else token
        if self.detokenizer is not None and (not ended or params.include_stop_str_in_output):
            self.detokenizer.push(token)
            if self.detokenizer.stop_reason is not None and self.finish_reason is None:
                self.finish_reason, self.stop_reason = "stop", self.detokenizer.stop_reason
        if self.finish_reason is None and len(sequence.tokens) >= sequence.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self.close()

    def ready(self) -> Sequence:
        """The sequence, marked for the prefix cache: requests with another salt never meet its blocks, and a
        sample that scores its prompt looks nothing up, because it needs every row."""
        self.sequence.chain.root = (None, self.request.cache_salt)
        self.sequence.lookup = self.index > 0 or self.request.prompt_logprobs is None
        return self.sequence

    def close(self) -> None:
        """Release the text that was held back."""
        if self.detokenizer is not None:
            self.detokenizer.finish()

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=self.token_ids,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def bad_word_ids(tokenizer: Tokenizer, words: Iterable[str]) -> list[list[int]]:
    """Each word as it stands at a beginning and after a space: two token sequences, where they differ."""
    found = []
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and ids not in found:
                found.append(ids)
    return found


def make_logprobs(
    tokenizer: Tokenizer | None, token: int, scores: Scores, row: int, count: int
) -> dict[int, Logprob]:
    """The chosen token's entry, then those of the `count` most likely tokens."""

    def text(index: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(index)

    entries = {token: Logprob(float(scores.logprob[row]), int(scores.rank[row]), text(token))}
    for place in range(count):
        index = int(scores.top_ids[row, place])
        entries.setdefault(index, Logprob(float(scores.top_logprobs[row, place]), place + 1, text(index)))
    return entries
