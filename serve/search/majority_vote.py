"""Majority voting, or self-consistency (Wang et al. 2022, arXiv 2203.11171): the answer that most of n samples give.

Early stopping is exact here: the samples that still run are cancelled when no answers of theirs can change the
winner (Aggarwal et al. 2023, arXiv 2305.11860, stop earlier, with a probability of being wrong).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from ..outputs import CompletionOutput, RequestOutput
from ..sampling.params import SamplingParams
from .search import Choice, Ended, Search


@dataclass(frozen=True)
class MajorityVote(Search):
    """All n samples vote; the answer with most votes wins, and among those with equally many the answer that the
    sample of the lowest index gave. So the winner depends neither on the order of finishing nor on company.

    answer: how a sample's answer is found. A regular expression: its last match in the text, group 1 where it has
    groups, without spaces at the ends. A function of a sample: anything hashable. None, or no match: it does not
    vote. Samples cut off at a limit vote too if they have an answer.

    early_stop: cancel the rest as soon as no other answer can win. The winner is the same; its votes are those cast
    by then. `order` has the voters of the winner first, each answer's by index; those without an answer come last.
    """

    answer: str | re.Pattern[str] | Callable[[CompletionOutput], Hashable | None] = field(kw_only=True)
    early_stop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.answer, str):
            try:
                re.compile(self.answer)
            except re.error as error:
                raise ValueError(f"answer={self.answer!r} is not a regular expression: {error}") from error
        elif not isinstance(self.answer, re.Pattern) and not callable(self.answer):
            raise ValueError(f"answer={self.answer!r} must be a regular expression or a function of a sample")

    def prepare(self, params: SamplingParams) -> SamplingParams:
        if not params.detokenize and not callable(self.answer):
            raise ValueError(
                f"answer={self.answer!r} is looked for in text, but detokenize=False; give a function of a sample, "
                "or detokenize=True"
            )
        return super().prepare(params)

    def read(self, completion: CompletionOutput) -> Hashable | None:
        if isinstance(self.answer, str | re.Pattern):
            matches = list(re.finditer(self.answer, completion.text))
            return (matches[-1][min(1, matches[-1].re.groups)] or "").strip() or None if matches else None
        answer = self.answer(completion)
        hash(answer)  # a TypeError here names the search, not a dict
        return answer

    def enough(self, ended: Sequence[Ended]) -> bool:
        return self.early_stop and decided({one.completion.index: one.reading for one in ended}, self.n)

    def choose(self, output: RequestOutput, candidates: Sequence[Ended]) -> Choice:
        del output
        answers = {one.completion.index: one.reading for one in candidates}
        ranked = standings(answers)
        ranks = {answer: rank for rank, answer in enumerate(ranked)}
        order = sorted(answers, key=lambda index: (ranks.get(answers[index], len(ranks)), index))
        votes = {answer: count for answer, (count, _) in ranked.items()}
        scores = {index: float(votes.get(answers[index], 0)) for index in order}
        return Choice(order, scores, next(iter(ranked), None), votes)


def standings(answers: Mapping[int, Hashable | None]) -> dict[Hashable, tuple[int, int]]:
    """Each answer's votes and the lowest index that gave it, the winner first. answers: index of a sample ->
    its answer; None is not one."""
    found: dict[Hashable, tuple[int, int]] = {}
    for index in sorted(answers):
        answer = answers[index]
        if answer is not None:
            count, first = found.get(answer, (0, index))
            found[answer] = (count + 1, first)
    return dict(sorted(found.items(), key=lambda item: (-item[1][0], item[1][1])))


def decided(answers: Mapping[int, Hashable | None], n: int) -> bool:
    """Whether the winner of n samples is known from these answers, whatever the missing ones are.

    A rival does best when every missing sample votes for it: then it has all their votes, and the lowest of their
    indices and its own to break a tie with.
    """
    missing = [index for index in range(n) if index not in answers]
    if not missing:
        return True
    (leading, first), *rivals = [*standings(answers).values()] or [(0, math.inf)]
    best = max((count + len(missing), -min(index, missing[0])) for count, index in [*rivals, (0, math.inf)])
    return best < (leading, -first)
