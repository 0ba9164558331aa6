"""The beams of one prompt: a gang whose members are the beams, and the texts that they leave behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...attention.caches.paged import PagedKV
from ...attention.caches.split import SplitKV
from ..gang import Gang
from ..request import Sample
from .lockstep import ENDS, Chosen, Given, compile_programs, run_copies, run_select

if TYPE_CHECKING:
    from ..engine import Engine
    from ..programs import Programs

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class Text:
    """A continuation: its tokens (the one that ended it included) and their log-probabilities (natural log, of the
    processed logits); objective: their sum less what diversity cost; logprob: their sum alone; versions: of the
    weights that chose each token. group: the one that found it."""

    tokens: list[int]
    token_logprobs: list[float]
    versions: list[int]
    objective: float
    logprob: float
    group: int


@dataclass(frozen=True)
class Rules:
    """When a group of beams is done, and how its texts compare (transformers' and vLLM's names and meanings).

    A text's score is sum / length ** length_penalty. early_stopping True: done as soon as the group has as many
    complete texts as beams. False: when the best running beam, at its present length, does not beat the worst of
    them. "never": the same at the length that flatters it most, so that no better text is missed.
    """

    length_penalty: float
    early_stopping: EarlyStopping

    def score(self, total: float, length: int) -> float:
        return total / length**self.length_penalty

    def done(self, best_running: float, worst_complete: float, length: int, longest: int) -> bool:
        """Whether a group with all its texts is done. best_running: the objective of its best beam, of `length` tokens;
        worst_complete: a score."""
        if self.early_stopping is True:
            return True
        flattering = self.early_stopping == "never" and self.length_penalty > 0
        return not self.score(best_running, longest if flattering else length) > worst_complete


@dataclass
class Group:
    """Some of the beams, which compete among themselves: `texts` are complete, best first, at most `size`."""

    index: int
    size: int
    rules: Rules
    texts: list[Text] = field(default_factory=list)
    done: bool = False

    def ranked(self, text: Text) -> float:
        return self.rules.score(text.objective, len(text.tokens))

    def add(self, ended: Sequence[Text], going: Sequence[Text], length: int, longest: int) -> None:
        """A step: the texts that ended, and the beams that go on, best first. At the longest length those end too that
        are among the best of all."""
        complete = [*ended, *going[: self.size - len(ended)]] if length >= longest else [*ended]
        self.texts = sorted([*self.texts, *complete], key=self.ranked, reverse=True)[: self.size]
        if length >= longest or not going:
            self.done = True
        elif len(self.texts) == self.size:
            worst = self.ranked(self.texts[-1])
            self.done = self.rules.done(going[0].objective, worst, length, longest)


class Beams(Gang):
    """One prompt's search. texts: what was found, in the order of the request's samples, once it ended; steps: choices
    made; copied: pages copied by forks."""

    def __init__(self, name: str, width: int, groups: int, diversity: float, rules: Rules):
        super().__init__(width)
        self.name, self.diversity, self.rules = name, diversity, rules
        self.groups = [Group(index, width // groups, rules) for index in range(groups)]
        self.samples: list[Sample] = []
        self.texts: list[Text] = []
        self.beams: list[Text] = []
        self.steps = self.copied = 0
        self.ended = False
        self._ends = np.zeros(ENDS, np.int32)
        self._chosen: Any = None

    # -- the engine's calls --------------------------------------------------------------------------------

    def form(self, engine: Engine, samples: list[Sample]) -> None:
        check_engine(self.name, self.width, engine)
        prompt = len(samples[0].request.prompt_ids)
        longest = self.longest(prompt, engine.pages)
        if longest <= prompt:
            raise ValueError(
                f"{self.name} forks a prompt of {prompt} tokens into {self.width} beams, but the pool of "
                f"{engine.pages.num_pages - 1} pages of {engine.pages.page_size} tokens holds {longest} tokens "
                "for each; take fewer beams or a shorter prompt, or raise num_pages"
            )
        ends = sorted(samples[0].eos_ids | samples[0].stop_ids)
        if len(ends) > ENDS:
            raise ValueError(
                f"{self.name} watches at most {ENDS} end-of-text and stop tokens, but there are {len(ends)}; "
                "give fewer stop_token_ids"
            )
        compile_programs(engine.programs, self.width, len(self.groups))
        self._ends = np.array([*ends, *[engine.vocab_size] * (ENDS - len(ends))], np.int32)
        for sample in samples:
            sample.end = sample.sequence.limit = min(sample.end, longest)
        self.samples = samples
        size = self.width // len(self.groups)
        self.beams = [
            Text([], [], [], -math.inf if place % size else 0.0, 0.0, place // size)
            for place in range(self.width)
        ]
        self.enlist(samples)

    def prepare(self, programs: Programs) -> None:
        run_copies(programs, self.width, self.copies)
        self.copied += len(self.copies)
        self.copies.clear()

    def select(self, programs: Programs, x: Any, rows: list[int]) -> Any:
        given = Given(
            np.array([one.seat for one in self.members], np.int32),
            np.array([beam.objective for beam in self.beams], np.float32),
            np.array([beam.logprob for beam in self.beams], np.float32),
            np.array([not group.done for group in self.groups]),
            np.float32(self.diversity),
            self._ends,
        )
        sampled = run_select(programs, x, rows, given)
        self._chosen = sampled.detail
        return sampled

    def read(self, engine: Engine) -> list[Sample]:
        if self.ended or self.members[0].seat < 0:
            return []
        chosen, self._chosen = Chosen.of(self._chosen), None
        self._clock(engine)
        for member in self.members:
            engine.scheduler.read(member, 1, 0)
        self.steps += 1
        before, longest = self.beams, self.samples[0].end - len(self.samples[0].request.prompt_ids)
        self.beams = self._children(before, chosen, 0, engine.weight_version)
        ended = self._children(before, chosen, 1, engine.weight_version)
        for group in self.groups:
            if not group.done:
                mine = slice(group.index * group.size, (group.index + 1) * group.size)
                going, over = (
                    [text for text in texts[mine] if text.objective > -math.inf]
                    for texts in (self.beams, ended)
                )
                group.add(over, going, self.steps, longest)
        if all(group.done for group in self.groups):
            return self.conclude(engine)
        self.fork(chosen.parent[0].tolist(), chosen.token[0].tolist(), engine.pages)
        return []

    def conclude(self, engine: Engine) -> list[Sample]:
        if self.ended or not self.members:
            return []
        self.ended = True
        for member in self.members:
            engine.scheduler.finish(member)
        self.texts = self._found()
        prompt = self.samples[0].request.prompt_ids
        del self.samples[max(1, len(self.texts)) :]
        for sample, text in zip(self.samples, self.texts):
            sample.sequence.tokens = [*prompt]
            for token, version in zip(text.tokens, text.versions):
                sample.accept(token, None, version)
            sample.cumulative_logprob = text.logprob
        self.samples[0].request.metrics.finished_time = time()
        return self.samples

    # -- inside --------------------------------------------------------------------------------------------

    def _children(self, beams: list[Text], chosen: Chosen, row: int, version: int) -> list[Text]:
        """The beams that row 0 of a choice makes of these, or the texts that end (row 1)."""
        parents, tokens, scores, totals, own = (column[row].tolist() for column in chosen)
        return [
            Text(
                [*beams[parent].tokens, token], [*beams[parent].token_logprobs, last],
                [*beams[parent].versions, version], score, total, beams[parent].group,
            )
            for parent, token, score, total, last in zip(parents, tokens, scores, totals, own)
        ]  # fmt: skip

    def _found(self) -> list[Text]:
        """The texts of all groups by their log-probability, normalised; then, where the search was cut short, beams
        that are not complete."""
        complete = sorted((text for group in self.groups for text in group.texts), key=self._rank)
        running = [] if all(group.done for group in self.groups) else sorted(self.beams, key=self._rank)
        cut = [text for text in running if text.objective > -math.inf]
        return [*complete, *cut][: self.width]

    def _rank(self, text: Text) -> float:
        return -self.rules.score(text.logprob, max(1, len(text.tokens)))

    def _clock(self, engine: Engine) -> None:
        metrics, now = self.samples[0].request.metrics, time()
        metrics.first_token_time, metrics.last_token_time = metrics.first_token_time or now, now


def check_engine(name: str, width: int, engine: Engine) -> None:
    """ValueError where an engine cannot run a search with so many beams."""
    programs = engine.programs
    if width > engine.scheduler.max_num_seqs:
        raise ValueError(
            f"{name} runs {width} beams side by side, but max_num_seqs={engine.scheduler.max_num_seqs}; take fewer "
            "beams, or raise max_num_seqs"
        )
    if programs.speculation is not None:
        raise ValueError(
            f"{name} chooses every token before the next is computed, but drafter={programs.speculation.drafter!r} "
            "drafts ahead; use an LLM with drafter=None"
        )
    if programs.whole is not None and not programs.whole.is_fully_addressable:
        raise ValueError(
            f"{name} chooses in the programs of one process, but this model is spread over several; use an LLM in one "
            "process"
        )
    kinds = sorted({type(entry).__name__ for entry in programs.state if not _forks(entry)})
    if kinds:
        raise ValueError(
            f"{name} forks texts by sharing pages, but this model and cache remember them as {', '.join(kinds)}, which "
            "cannot be shared; use a model of attention layers, with cache=None and sequence_parallel_size=1"
        )


def _forks(entry: object) -> bool:
    """Whether texts may share the pages of this state: plain ones, also where devices that share the weights share
    them too."""
    return type(entry) is PagedKV or (isinstance(entry, SplitKV) and entry.split.by_heads)
