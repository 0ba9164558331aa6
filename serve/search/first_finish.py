"""First Finish Search (Agarwal et al. 2025, arXiv 2505.18149): n samples race, the first k to finish are the result.

For reasoning models shorter traces are more often right than longer ones. With lengths of right traces distributed
as N(m1, s^2) and of wrong ones as N(m2, s^2), m1 < m2, the log-odds of a trace of length x being right fall linearly
in x, so the first of n is the best guess. Where s differs much, or m1 >= m2, stopping early does harm: measure
lengths of right and wrong answers on your own model first. The cost is n times the length of the shortest sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..outputs import CompletionOutput, RequestOutput
from .search import Choice, Ended, Search


@dataclass(frozen=True)
class FirstFinish(Search):
    """The first k of n samples that finish, in order; the others are cancelled at once.

    k: how many to wait for, 1 to n. accept: which finishes count, a function of a sample; None: those that the model
    ended itself or a stop string did (finish_reason "stop"), not those that were cut off at a limit. An empty answer
    or a refusal would win every race, so ask for a parsed answer there, or set `min_tokens`. When fewer than k are
    accepted, accepted ones come first and the others follow in the order in which they ended.

    "First" is by the engine's steps, by index within a step. The samples are the same alone and in company; who is
    first is the same too as long as all n start in one step and none is preempted (seats and pages for n): then it
    is the shortest accepted one. Samples that got a seat later run a later race.
    """

    k: int = 1
    accept: Callable[[CompletionOutput], bool] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.k, bool) or not isinstance(self.k, int) or not 1 <= self.k <= self.n:
            raise ValueError(f"k={self.k!r} samples cannot finish first of n={self.n}; give 1 to {self.n}")

    def read(self, completion: CompletionOutput) -> bool:
        if self.accept is not None:
            return bool(self.accept(completion))
        return completion.finish_reason == "stop"

    def enough(self, ended: Sequence[Ended]) -> bool:
        return sum(one.reading for one in ended) >= self.k

    def choose(self, output: RequestOutput, candidates: Sequence[Ended]) -> Choice:
        del output
        order = sorted(candidates, key=lambda one: not one.reading)  # stable: the order of finishing stays
        return Choice([one.completion.index for one in order[: self.k]])
