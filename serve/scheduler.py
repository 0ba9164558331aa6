"""Who runs next. Plain Python, no arrays.

One rule covers prompts, decodes and resuming: each step gives a sequence (known tokens - computed tokens),
clipped by the token budget. Who goes first is the policy's choice (`policies`); what holds under every policy is
here. Memory: a sequence owns pages for its whole known length from admission on, a decode grows by a page; when
the pool is empty a running sequence is preempted, waits and is recomputed later, and a step that preempted
admits nobody. A sequence that starts (or comes back) takes the longest cached prefix, but computes its last token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .pages import PageAllocator
from .policies.policy import Policy
from .policies.sarathi import SarathiServe
from .sequence import Chunk, Sequence, Work

if TYPE_CHECKING:
    from .drafters.draft import DraftShape


class Scheduler:
    """Runs at most `max_num_seqs` sequences, with at most `budget` tokens and `prompt_rows` prompt chunks a step."""

    def __init__(
        self, pages: PageAllocator, *, max_num_seqs: int, budget: int, prompt_rows: int,
        policy: Policy | None = None, drafts: Callable[[list[Sequence]], DraftShape | None] = lambda _: None,
    ):  # fmt: skip
        policy = SarathiServe() if policy is None else policy
        if policy.owner is not None:
            raise ValueError(f"this {type(policy).__name__} serves another engine already; make one for each")
        policy.suits(pages)
        policy.owner, budget = self, policy.budget(budget)
        if budget < max_num_seqs + 1:
            raise ValueError(
                f"max_num_batched_tokens={budget} must exceed max_num_seqs={max_num_seqs}, or prompts would "
                f"starve beside a full batch of decodes; raise the former (or the policy's budget) or lower the "
                f"latter"
            )
        self.pages, self.policy, self.budget, self.prompt_rows = pages, policy, budget, prompt_rows
        self.max_num_seqs, self.drafts = max_num_seqs, drafts
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._seats = list(range(max_num_seqs - 1, -1, -1))

    @property
    def waiting(self) -> Policy:
        """The policy, as the one that holds the waiting sequences: it has a length."""
        return self.policy

    @property
    def busy(self) -> bool:
        return bool(len(self.policy) or self.running)

    def add(self, sequence: Sequence) -> None:
        self.policy.add(sequence)

    def schedule(self) -> Work | None:
        """The next step, or None when nobody can advance before pending tokens are read."""
        policy, preempted = self.policy, self.preemptions
        budget = min(self.budget, max(policy.budget(self.budget), self.max_num_seqs + 1))
        decodes = [] if policy.prefill_first else self._decodes()
        chunks, admitted, loads = [], [], []
        budget -= len(decodes)
        for sequence in policy.order(self.running):
            if not sequence.decoding and budget > 0 and len(chunks) < self.prompt_rows:
                budget -= self._take(sequence, budget, chunks)
        while budget > 0 and len(chunks) < self.prompt_rows and self._seats and self.preemptions == preempted:
            sequence = policy.peek()
            if sequence is None or (
                self.pages.hold == "whole" and budget < sequence.known and (decodes or chunks)
            ):
                break
            if not self._admit(sequence, loads):
                break
            admitted += sequence.members
            for one in sequence.members:
                if budget > 0 and len(chunks) < self.prompt_rows:
                    budget -= self._take(one, budget, chunks)
        if admitted and not chunks:
            decodes += [one for one in admitted if one.decoding]
        elif not chunks and (policy.prefill_first or not decodes):
            decodes = self._decodes()
        if not decodes and not chunks:
            return None
        draft = None if chunks else self._draft(decodes)
        for sequence in decodes:
            sequence.computed += 1
            sequence.pending += 1
            sequence.ahead += 0 if draft is None else draft.depth
            self._note(sequence)
            policy.charge(sequence, 0, 1)
        saves = [] if self.pages.snapshots is None else self.pages.snapshots.flush()
        return Work(decodes, chunks, admitted, loads, saves, draft)

    def _draft(self, decodes: list[Sequence]) -> DraftShape | None:
        """What is drafted for a step of decodes only; nothing where a sequence has no pages for all slots."""
        draft = self.drafts(decodes)
        if draft is None:
            return None
        fits = all(
            self.pages.grow(one.pages, min(one.known + one.ahead, one.limit) - 1 + draft.slots)
            for one in decodes
        )
        return draft if fits else None

    def read(self, sequence: Sequence, emitted: int, drafted: int) -> None:
        """The host read a step of this sequence, which emitted so many tokens where 1 was certain."""
        sequence.pending -= 1
        sequence.ahead -= drafted
        sequence.computed += emitted - 1

    def _admit(self, sequence: Sequence, loads: list[tuple[int, int]]) -> bool:
        """Give a waiting sequence a seat, and pages for its whole known length, cached ones first; False, and
        nothing changed, when it has to wait."""
        pages, snapshots, chain = self.pages, self.pages.snapshots, sequence.chain
        if len(self._seats) < len(sequence.members):
            return False
        if self.running and not self.policy.admits(sequence, pages, self.running):
            return False
        pages.renew(chain)
        hits = pages.lookup(chain, sequence.tokens) if sequence.lookup else []
        sequence.branch = len(hits) * pages.page_size
        if snapshots is not None and hits:
            if snapshots.comes(chain.keys[len(hits) - 1]):
                return False
            hits = hits[: snapshots.deepest(chain.keys[: len(hits)])]
        if not pages.claim(
            sequence.pages, hits, sequence.limit if pages.hold in ("limit", "whole") else sequence.known
        ):
            return False
        if sequence.gang is not None and not sequence.gang.join(pages):
            return False
        self.policy.pop()
        chain.registered = len(hits)
        for one in sequence.members:
            one.seat, one.rank = self._seats.pop(), sequence.rank
        sequence.computed = len(hits) * pages.page_size
        if snapshots is not None and hits:
            loads.append((snapshots.load(chain.keys[len(hits) - 1]), sequence.seat))
        if sequence.epoch == 0:
            sequence.cached = sequence.computed
            pages.lookup_tokens += sequence.known if sequence.lookup and pages.sharing else 0
            pages.hit_tokens += sequence.computed
            self.policy.charge(sequence, sequence.known - sequence.computed, 0)
        self.running += sequence.members
        return True

    def _note(self, sequence: Sequence, prompt: bool = False) -> None:
        """Tell the prefix cache how far the scheduled steps bring a sequence."""
        pages = self.pages
        if prompt or pages.hold == "text":  # else what a prompt gives and what a generation gives differ
            pages.register(sequence.pages, sequence.chain, sequence.tokens, sequence.computed)
        if pages.snapshots is not None:
            pages.snapshots.settle(sequence, pages.weight_version)
            pages.snapshots.save(sequence, pages.weight_version, prompt=prompt)

    def _decodes(self) -> list[Sequence]:
        """Running sequences whose next token can be computed, each with room for it."""
        ready: list[Sequence] = []
        for sequence in list(self.policy.order(self.running)):
            if not sequence.decoding or sequence.known >= sequence.limit:
                continue
            most = min(sequence.known + sequence.ahead, sequence.limit)
            while sequence.seat >= 0 and not self.pages.extend(sequence.pages, most):
                self.preempt(self.policy.victim(self.running))
            if sequence.seat >= 0:
                ready.append(sequence)
        return [sequence for sequence in ready if sequence.seat >= 0]

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Schedule the next prompt tokens of `sequence`; returns how many."""
        gang = sequence.gang
        if gang is not None and not gang.begin(sequence, self.pages.page_size):
            return 0
        start = sequence.computed
        end = min(sequence.known - (gang is not None), start + budget)
        if self.pages.snapshots is not None:
            end = self.pages.snapshots.end(sequence, end)
        sequence.computed = end
        final = end == sequence.known
        self._note(sequence, prompt=True)
        if gang is not None:
            gang.rally()
        if start == end:
            return 0
        if final:
            sequence.decoding = True
            sequence.pending += 1
            self.policy.charge(sequence, 0, 1)
        chunks.append(Chunk(sequence, start, end - start, final))
        return end - start

    def preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence and its gang; it waits and is recomputed later."""
        for one in sequence.members:
            self._leave(one)
            one.computed = one.pending = one.ahead = 0
            one.epoch += 1
            one.decoding = False
        if sequence.gang is not None:
            sequence.gang.scatter()
        self.policy.requeue(sequence.members[0])
        self.preemptions += 1

    def finish(self, sequence: Sequence, complete: bool = True) -> None:
        """A running or waiting sequence ends (not `complete`: it is cut short). A step in flight may still write
        its pages: the device runs in order, so their next owner's tokens come later."""
        if sequence.finished:
            return
        sequence.finished, leads = True, sequence is sequence.members[0]
        if sequence.seat >= 0:
            self._leave(sequence)
        elif leads:
            self.policy.discard(sequence)
        if leads:
            self.policy.ended(sequence, complete)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._seats.append(sequence.seat)
        sequence.seat = -1
        pages = self.pages
        if pages.hold == "text":
            pages.register(sequence.pages, sequence.chain, sequence.tokens, sequence.computed)
        pages.release(sequence.pages, sequence.chain)
        if pages.snapshots is not None:
            pages.snapshots.close(sequence, pages.weight_version)
