"""A request and its samples: what the host knows about a generation besides its place in the schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from .detokenizer import Detokenizer
from .gang import Gang
from .outputs import RESUMABLE, CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from .repetition import RepetitionDetectionParams, RepetitionDetector
from .sampling.params import SamplingParams
from .sampling.sampler import Scores
from .sampling.structured import Grammars, Matcher, StructuredOutputs
from .scheduler import Chunk, Sequence
from .tokenizer import Tokenizer


@dataclass(eq=False)
class Request:
    """One prompt with its parameters; `samples` has n generations once the engine took it.

    `error` ends it before it ran. `carried` are the outputs that it continues (`LLM.resume`). `arrival` (s,
    `time.monotonic`) is what its deadline counts from. `cancelled`: to end as soon as the engine has it.
    `matcher` stands at the beginning of the grammar that it asked for. `until` is told of the samples that ended in
    a step, by index; when it says True the others end at once ("abort"). `gang`: its samples run in lock-step.
    """

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
    carried: list[CompletionOutput] | None = None
    arrival: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    cache_salt: str | None = None
    priority: int = 0
    tenant: str | None = None
    matcher: Matcher | None = None
    until: Callable[[list[Sample]], bool] | None = None
    gang: Gang | None = None

    def prepare(self, tokenizer: Tokenizer | None, grammars: Grammars) -> None:
        """What follows from the parameters once tokenizer and vocabulary are known. ValueError: a grammar that does not
        compile."""
        params = self.params
        if params.bad_words and tokenizer is not None:
            self.bad_word_ids = bad_word_ids(tokenizer, params.bad_words)
        if params.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = [None for _ in self.prompt_ids]
        asked = StructuredOutputs.of(params.structured_outputs)
        if asked is not None:
            self.matcher = grammars.matcher(asked)

    @property
    def finished(self) -> bool:
        if self.error is not None:
            return True
        return bool(self.samples) and all(sample.finish_reason for sample in self.samples)

    def enough(self, ended: list[Sample]) -> bool:
        """Whether, after these samples ended, nobody waits for the others; an exception of `until` is its error."""
        try:
            return self.until is not None and self.until(ended)
        except Exception as error:
            self.error = (
                f"`until` failed on samples {[one.index for one in ended]}: {type(error).__name__}: {error}"
            )
            return True

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether log-probabilities of the prompt were asked for and are not there yet."""
        entries = self.prompt_logprobs
        return entries is not None and len(entries) > 1 and entries[-1] is None

    def output(self) -> RequestOutput:
        """What the user sees now; final when `finished`."""
        self.metrics.preemptions = sum(sample.sequence.epoch for sample in self.samples)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_ids),
            prompt_logprobs=self.prompt_logprobs,
            outputs=[sample.output() for sample in self.samples] or list(self.carried or ()),
            finished=self.finished,
            metrics=self.metrics,
            error=self.error,
            num_cached_tokens=self.samples[0].sequence.cached if self.samples else None,
            sampling_params=self.params,
            seed=self.seed,
            cache_salt=self.cache_salt,
        )

    @staticmethod
    def resuming(output: RequestOutput, segment_tokens: int | None) -> Request:
        """The request that goes on where `output` was stopped, with a new quota."""
        if output.sampling_params is None or output.seed is None:
            raise ValueError(
                f"the output of request {output.request_id!r} has no sampling_params or no seed, so nothing can "
                "go on from it; pass outputs or snapshots that an LLM returned"
            )
        params = replace(output.sampling_params, segment_tokens=segment_tokens)
        if len(output.outputs) != params.n:
            raise ValueError(
                f"request {output.request_id!r} asked for n={params.n} samples, but its output holds "
                f"{len(output.outputs)}; pass it whole"
            )
        scores = output.prompt_logprobs
        return Request(
            output.request_id, output.prompt, list(output.prompt_token_ids), params, output.seed,
            prompt_logprobs=None if scores is None else list(scores), carried=output.outputs,
            cache_salt=output.cache_salt,
        )  # fmt: skip


@dataclass(eq=False)
class Sample:
    """One of a request's n generations: its sequence, its text, its log-probabilities, and why it ended.

    `end` is the length (tokens) at which it is complete; its sequence's `limit` may come earlier (the quota of a
    segment). All else is a function of the tokens accepted so far, so a sample is continued by replaying them;
    but `carry` (`Sampled.carry` of the last one) is not, where a logits processor remembers more.
    """

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
    end: int = 0
    repetition: RepetitionDetector | None = None
    weight_versions: list[int] = field(default_factory=list)
    carry: list[float] | None = None
    matcher: Matcher | None = None

    @property
    def text(self) -> str:
        return "" if self.detokenizer is None else self.detokenizer.text

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.tokens[len(self.request.prompt_ids) :]

    def accept(self, token: int, logprobs: dict[int, Logprob] | None, weight_version: int = 0) -> None:
        """Take the next token; sets `finish_reason` when it ends the generation or the segment."""
        sequence, params = self.sequence, self.request.params
        sequence.tokens.append(token)
        self.weight_versions.append(weight_version)
        if logprobs is not None and self.logprobs is not None:
            self.logprobs.append(logprobs)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + logprobs[token].logprob
        generated = len(sequence.tokens) - len(self.request.prompt_ids)
        ended = generated > params.min_tokens and (token in self.eos_ids or token in self.stop_ids)
        if self.matcher is not None:
            self.matcher.accept(token)
            ended = ended or self.matcher.ended
        if ended:
            self.finish_reason = "stop"
            self.stop_reason = token if token in self.stop_ids and token not in self.eos_ids else None
        if self.detokenizer is not None and (not ended or params.include_stop_str_in_output):
            self.detokenizer.push(token)
            if self.detokenizer.stop_reason is not None and self.finish_reason is None:
                self.finish_reason, self.stop_reason = "stop", self.detokenizer.stop_reason
        repeats = self.repetition is not None and self.repetition.push(token)
        if self.finish_reason is None and len(sequence.tokens) >= self.end:
            self.finish_reason = "length"
        if self.finish_reason is None and repeats and generated >= params.min_tokens:
            self.finish_reason, self.stop_reason = "repetition", "repetition_detected"
        if self.finish_reason is not None:
            self.close()
        elif len(sequence.tokens) >= sequence.limit:
            self.finish_reason = "segment"  # not closed: a stop string may go on in the next one

    def replay(self, carried: CompletionOutput) -> None:
        """Become what `carried` was: text, stops, penalties and log-probabilities follow from its tokens."""
        tokens, logprobs, versions = carried.token_ids, carried.logprobs, carried.weight_versions
        scored = self.logprobs is None or (logprobs is not None and len(logprobs) == len(tokens))
        if not scored or len(versions) != len(tokens):
            raise ValueError(
                f"sample {self.index} of request {self.request.request_id!r} has {len(tokens)} tokens, "
                f"{len(versions)} weight versions and log-probabilities for {len(logprobs or ())}, where "
                f"logprobs={self.request.params.logprobs} was asked for; pass the output unchanged"
            )
        if tokens and carried.carry is None and self.request.params.carries:
            raise ValueError(
                f"sample {self.index} of request {self.request.request_id!r} cannot go on from its tokens alone: "
                f"mirostat_mode={self.request.params.mirostat_mode} needs its output's `carry` too; pass the output "
                "unchanged"
            )
        for place, token in enumerate(tokens):
            if self.finish_reason is not None:
                raise ValueError(
                    f"here, sample {self.index} of request {self.request.request_id!r} ends after {place} tokens "
                    f'("{self.finish_reason}"), but its output holds {len(tokens)}; resume it where limits, '
                    "end-of-text tokens and tokenizer are those that it was made with"
                )
            self.accept(token, None if logprobs is None else logprobs[place], versions[place])
        self.carry = carried.carry
        if carried.finish_reason not in RESUMABLE:
            self.finish_reason, self.stop_reason = carried.finish_reason, carried.stop_reason
            self.close()

    def ready(self) -> Sequence:
        """The sequence, marked for the scheduling policy and the prefix cache: requests with another salt never
        meet its blocks, and a sample that scores its prompt looks nothing up, because it needs every row."""
        self.sequence.priority, self.sequence.tenant = self.request.priority, self.request.tenant
        self.sequence.chain.root = (None, self.request.cache_salt)
        self.sequence.lookup = self.index > 0 or not self.request.wants_prompt_scores
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
            weight_versions=list(self.weight_versions),
            carry=self.carry,
        )


def make_sample(
    request: Request, index: int, end: int, tokenizer: Tokenizer | None, eos_ids: frozenset[int]
) -> Sample:
    """The request's sample `index`, which is complete at `end` tokens at the latest: new, or continued."""
    params, sequence, detokenizer = request.params, Sequence(list(request.prompt_ids), end), None
    if tokenizer is not None and params.detokenize:
        detokenizer = Detokenizer(
            tokenizer, params.skip_special_tokens, params.stop or (), params.include_stop_str_in_output,
            params.min_tokens, request.prompt_ids,
        )  # fmt: skip
    sample = Sample(
        request, index, sequence, detokenizer, frozenset(params.stop_token_ids or ()), eos_ids, end=end
    )
    detection = RepetitionDetectionParams.of(params.repetition_detection)
    if detection is not None and detection.max_pattern_size:
        sample.repetition = RepetitionDetector(detection)
    sample.matcher = request.matcher and request.matcher.fork()
    if params.logprobs is not None:
        sample.logprobs, sample.cumulative_logprob = [], 0.0
    if request.carried is not None:
        sample.replay(request.carried[index])
    if params.segment_tokens is not None:
        sequence.limit = min(end, len(sequence.tokens) + params.segment_tokens)
    sequence.owner, sequence.finished = sample, sample.finish_reason is not None
    return sample


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


def read_scores(tokenizer: Tokenizer | None, scores: Scores, scored: Iterable[tuple[int, Chunk]]) -> None:
    """Put the log-probabilities of prompt tokens into their requests; a chunk's rows begin at its number."""
    for at, chunk in scored:
        request: Request = chunk.sequence.owner.request
        count, entries = request.params.prompt_logprobs, request.prompt_logprobs
        assert count is not None and entries is not None
        for place in range(chunk.start, min(chunk.start + chunk.count, len(request.prompt_ids) - 1)):
            token, row = request.prompt_ids[place + 1], at + place - chunk.start
            entries[place + 1] = make_logprobs(tokenizer, token, scores, row, count)
