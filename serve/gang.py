"""Gangs: the sequences of one request that advance in lock-step, as the beams of a search do.

A gang takes as many seats as it has members, all in one step. Its first member, the leader, waits for all and
computes their prompt but for the last token; the others take that up. From then on each step computes one token of
every member, one program chooses a parent and a token for each (`Gang.select`), and when the host has read that, it
permutes page tables (`Gang.fork`): full pages are shared by reference counts, the last partial page goes to a
parent's first child and is copied on the device for the others. So no step with a gang is dispatched before the last
one was read. A gang is preempted whole and recomputed: members that come back share the full pages of what their
texts have in common, so a gang that fitted once fits again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Row
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine
    from .pages import PageAllocator
    from .request import Sample
    from .scheduler import Sequence


class Gang(ABC):
    """`width` sequences in lock-step; of equal length, always. A search says what is chosen and when it ends.

    copies: (source, target) pages to copy on the device before the next step of this gang.
    """

    def __init__(self, width: int):
        self.width = width
        self.members: list[Sequence] = []
        self.copies: list[tuple[int, int]] = []
        self._sources: list[tuple[Sequence, int]] | None = None

    # -- what a search is ----------------------------------------------------------------------------------

    @abstractmethod
    def form(self, engine: Engine, samples: list[Sample]) -> None:
        """The request's samples are there, one a member, and not queued yet: take them (`enlist`). ValueError where
        the engine or the parameters do not suit."""

    @abstractmethod
    def prepare(self, programs: Any) -> None:
        """Dispatch the pending `copies`; a step of this gang comes next."""

    @abstractmethod
    def select(self, programs: Any, x: Any, rows: list[int]) -> Any:
        """Dispatch the choice from x [N,E], what the backbone gave; `rows` are the members'. Returns a `Sampled`."""

    @abstractmethod
    def read(self, engine: Engine) -> list[Sample]:
        """Wait for the choice of the step before, and go on: the samples that ended."""

    @abstractmethod
    def conclude(self, engine: Engine) -> list[Sample]:
        """End now: give seats and pages back and put what was found into the request's samples. Those without a
        finish_reason were cut short. Nothing happens when it ended before."""

    # -- memory --------------------------------------------------------------------------------------------

    def enlist(self, samples: list[Sample]) -> None:
        self.members = [sample.sequence for sample in samples]
        for member in self.members:
            member.gang = self

    def longest(self, prompt: int, pages: PageAllocator) -> int:
        """Tokens that each member can have when all that follows the prompt differs and nobody else has pages."""
        shared, pool = (prompt - 1) // pages.page_size, pages.num_pages - 1
        return max(0, shared + (pool - shared) // self.width) * pages.page_size

    def sources(self) -> list[tuple[Sequence, int]]:
        """For each member but the first: the earlier one whose text begins like its own for longest, and for how many
        tokens, the last one left out."""
        if self._sources is None:
            self._sources = []
            for place, member in enumerate(self.members[1:], 1):
                shared = [common(one.tokens, member.tokens) for one in self.members[:place]]
                best = max(shared)
                self._sources.append((self.members[shared.index(best)], min(best, member.known - 1)))
        return self._sources

    def join(self, pages: PageAllocator) -> bool:
        """The leader has its pages: give the others theirs. False, and all are given back, when the pool has too
        few."""
        for member, (source, shared) in zip(self.members[1:], self.sources()):
            pages.renew(member.chain)
            if not pages.claim(member.pages, source.pages[: shared // pages.page_size], member.known):
                for one in reversed(self.members):
                    pages.release(one.pages)
                return False
        return True

    def begin(self, member: Sequence, size: int) -> bool:
        """Whether a member may compute its text: the leader always, another as soon as all is scheduled that it takes
        up from its source. `size`: tokens a page."""
        place = self.members.index(member)
        if place == 0 or member.computed:
            return True
        source, shared = self.sources()[place - 1]
        last = member.known - 1
        if source.computed < last:
            return False
        if shared == last and last % size:
            self.copies.append((source.pages[last // size], member.pages[last // size]))
        member.computed = last if shared == last else shared // size * size
        return True

    def rally(self) -> None:
        """All members decode from the next step on, once all but their last tokens is computed."""
        if all(one.computed == one.known - 1 for one in self.members):
            for one in self.members:
                one.decoding = True

    def scatter(self) -> None:
        """The members lost their pages: they are recomputed."""
        self.copies.clear()
        self._sources = None

    def fork(self, parents: Row[int], tokens: Row[int], pages: PageAllocator) -> None:
        """Member i becomes a child of member parents[i], with tokens[i] behind its text. Everything before is
        computed. No page more is needed than those of members without children give back."""
        was = [(one.tokens, one.pages, one.chain) for one in self.members]
        stored = len(was[0][0])
        full = stored // pages.page_size
        for place, (_, table, chain) in enumerate(was):
            if place not in parents:
                pages.release(table, chain)
        heirs: set[int] = set()
        for member, parent, token in zip(self.members, parents, tokens):
            text, table, chain = was[parent]
            if parent in heirs:
                text, parted, chain = text[:stored], table, replace(chain, keys=chain.keys[:])
                table = []
                found = pages.claim(table, parted[:full], stored)
                assert found, "a fork needs no more pages than childless members gave back"
                if stored % pages.page_size:
                    self.copies.append((parted[full], table[full]))
            heirs.add(parent)
            text.append(token)
            member.tokens, member.pages, member.chain = text, table, chain


def common(a: Row[int], b: Row[int]) -> int:
    """How many tokens two texts begin with alike."""
    for place, (left, right) in enumerate(zip(a, b)):
        if left != right:
            return place
    return min(len(a), len(b))


def gangs_of(decodes: Row[Sequence]) -> dict[Gang, list[int]]:
    """The gangs in a step, each with the rows of its members in their order."""
    found: dict[Gang, dict[int, int]] = {}
    for row, sequence in enumerate(decodes):
        if sequence.gang is not None:
            found.setdefault(sequence.gang, {})[id(sequence)] = row
    return {gang: [rows[id(one)] for one in gang.members] for gang, rows in found.items()}
