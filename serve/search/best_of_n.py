"""Best-of-n: the sample with the highest score of n.

The score is the model's own log-probability of the sample (`best_of` of the OpenAI API takes its mean), or a user's
function: a verifier (Cobbe et al. 2021, arXiv 2110.14168) or a reward model (Stiennon et al. 2020, arXiv 2009.01325).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..outputs import CompletionOutput, RequestOutput
from ..sampling.params import SamplingParams
from .search import Choice, Ended, Search

Score = Callable[[RequestOutput, CompletionOutput], float]


@dataclass(frozen=True)
class BestOfN(Search):
    """All n samples run to their ends; the highest score wins, the lower index where scores are equal.

    score: "mean", the log-probability a token (natural log; end-of-text tokens count), "cumulative", their sum,
    which favours short samples, or a function of the request's output (for its prompt) and a sample; it must return
    a number. `logprobs_mode` of the sampling parameters says which log-probabilities: the model's or the sampler's.
    """

    score: Literal["mean", "cumulative"] | Score = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("mean", "cumulative") and not callable(self.score):
            raise ValueError(
                f'score={self.score!r} must be "mean", "cumulative" or a function (output, sample)'
            )

    def prepare(self, params: SamplingParams) -> SamplingParams:
        params = super().prepare(params)
        if callable(self.score) or params.logprobs is not None:
            return params
        return replace(params, logprobs=0)

    def choose(self, output: RequestOutput, candidates: Sequence[Ended]) -> Choice:
        scores = {one.completion.index: self._score(output, one.completion) for one in candidates}
        if any(math.isnan(score) for score in scores.values()):
            raise ValueError(f"scores must be numbers that can be compared; got {scores}")
        return Choice(sorted(scores, key=lambda index: (-scores[index], index)), scores)

    def _score(self, output: RequestOutput, completion: CompletionOutput) -> float:
        if callable(self.score):
            return float(self.score(output, completion))
        total = completion.cumulative_logprob or 0.0
        return total if self.score == "cumulative" else total / max(1, len(completion.token_ids))
