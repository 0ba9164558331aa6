"""What a search is: n samples of each prompt, a rule that says when enough of them ended, and a choice among those.

A search never touches the model. Its samples are those that `n` gives with the same parameters and seed, token for
token; a search that stops early gives the beginnings of them. The engine runs all samples of all prompts in its
ordinary batches, they share their prompt's pages through the prefix cache, and samples that are cancelled give seat
and pages back before the next step is scheduled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..llm import LLM
from ..outputs import CompletionOutput, RequestOutput
from ..prompts import Prompt, is_prompt
from ..request import Sample
from ..sampling.params import SamplingParams


@dataclass(frozen=True)
class Ended:
    """A sample that ended by itself, and what the search read in it (`Search.read`)."""

    completion: CompletionOutput
    reading: Any


@dataclass(frozen=True)
class Choice:
    """What a search decided. order: indices of samples, best first. scores: index -> what they were ordered by.
    answer and votes: of searches that compare answers."""

    order: Sequence[int]
    scores: Mapping[int, float] = field(default_factory=dict)
    answer: Hashable | None = None
    votes: Mapping[Hashable, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchResult:
    """One prompt's result. `output` holds all n samples; those that were cancelled end with "abort".

    choice: None when the prompt or the search failed (`error`). ended: indices of the samples that ended by
    themselves, in the order of the engine's steps, by index within a step. tokens_generated counts those of all
    samples, tokens_cancelled those of cancelled samples. tokens_dropped were computed (one step is always ahead) but
    not read when their samples were cancelled. tokens_saved is what the cancelled samples might still have
    generated: up to max_tokens and the engine's limits, so an upper bound.
    """

    output: RequestOutput
    choice: Choice | None
    error: str | None
    ended: Sequence[int]
    tokens_generated: int
    tokens_cancelled: int
    tokens_dropped: int
    tokens_saved: int

    @property
    def chosen(self) -> list[CompletionOutput]:
        """The samples in the order of the choice, best first; empty when there is none."""
        return [] if self.choice is None else [self.output.outputs[index] for index in self.choice.order]

    @property
    def best(self) -> CompletionOutput | None:
        return self.chosen[0] if self.chosen else None


@dataclass(frozen=True)
class Search(ABC):
    """Base of the searches. n: samples of each prompt. `choose` is a technique, `enough` one that stops early."""

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n={self.n!r} must be a whole number of samples, 1 or more")

    def prepare(self, params: SamplingParams) -> SamplingParams:
        """The parameters of the samples. ValueError for those that a search cannot work with."""
        if params.n not in (1, self.n):
            raise ValueError(
                f"sampling_params say n={params.n}, but the search n={self.n}; leave the former out"
            )
        if params.segment_tokens is not None:
            raise ValueError(
                f"segment_tokens={params.segment_tokens} pauses samples, but a search waits for their ends; "
                "leave it out"
            )
        return replace(params, n=self.n)

    def read(self, completion: CompletionOutput) -> Any:
        """What `enough` and `choose` need of a sample; called once for each, as soon as it ended, between two steps:
        the engine waits for it, and it must not call the LLM."""
        del completion

    def enough(self, ended: Sequence[Ended]) -> bool:
        """Whether the samples that have not ended may be cancelled. Asked after each step in which one ended, with
        all that ended so far, in the order of steps, by index within a step."""
        del ended
        return False

    @abstractmethod
    def choose(self, output: RequestOutput, candidates: Sequence[Ended]) -> Choice:
        """The result among the samples that ended by themselves, in the order of `enough`; when none did (a timeout,
        say) the candidates are all samples, by index."""

    def generate(
        self, llm: LLM, prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        priority: int | Sequence[int] | None = None, tenant: str | Sequence[str] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[SearchResult]:  # fmt: skip
        """Search for all prompts at once; arguments, order and errors are those of `LLM.generate`.

        For conversations pass `llm.chat_prompt(...)`. An exception of a user's function (a score, a parser) becomes
        that prompt's `error`. Beside others the samples are the same as alone; which ends first may differ, because
        samples wait for seats: see the searches that stop early.
        """
        given, count, params = spread(
            self.prepare, prompts, sampling_params or llm.get_default_sampling_params()
        )
        trials = [Trial(self) for _ in range(count)]
        outputs = llm.generate(
            given, params, priority=priority, tenant=tenant, until=trials, use_tqdm=use_tqdm
        )
        return [trial.result(output) for trial, output in zip(trials, outputs)]


def spread(
    prepare: Callable[[SamplingParams], SamplingParams], prompts: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | Sequence[SamplingParams],
) -> tuple[Any, int, Any]:  # fmt: skip
    """(prompts, how many, parameters) for `LLM.generate`: one prompt or a list, parameters for all or one each, as a
    search prepares them."""
    given: Any = prompts if isinstance(prompts, str | bytes | dict) else list(prompts)
    count = 1 if is_prompt(given) else len(given)
    if isinstance(sampling_params, SamplingParams):
        return given, count, prepare(sampling_params)
    return given, count, [prepare(one) for one in sampling_params]


@dataclass
class Trial:
    """A search at work on one prompt: the engine calls it when samples ended (`LLM.generate`'s `until`)."""

    search: Search
    ended: list[Ended] = field(default_factory=list)
    dropped: int = 0
    saved: int = 0

    def __call__(self, ended: list[Sample]) -> bool:
        self.ended += map(self._read, (sample.output() for sample in ended))
        if not self.search.enough(self.ended):
            return False
        cancelled = [sample for sample in ended[0].request.samples if sample.finish_reason is None]
        self.dropped = sum(sample.sequence.pending for sample in cancelled)
        self.saved = sum(sample.end - len(sample.sequence.tokens) for sample in cancelled)
        return True

    def _read(self, completion: CompletionOutput) -> Ended:
        return Ended(completion, self.search.read(completion))

    def result(self, output: RequestOutput) -> SearchResult:
        lengths = {one.index: len(one.token_ids) for one in output.outputs}
        cancelled = [one.index for one in output.outputs if one.finish_reason == "abort"]
        choice, error = None, output.error
        if error is None:
            try:
                choice = self.search.choose(output, self.ended or [self._read(one) for one in output.outputs])
            except Exception as failure:  # a user's function: the other prompts keep their results
                error = f"{type(self.search).__name__} failed: {type(failure).__name__}: {failure}"
        return SearchResult(
            output, choice, error, [one.completion.index for one in self.ended], sum(lengths.values()),
            sum(lengths[index] for index in cancelled), self.dropped, self.saved,
        )  # fmt: skip
