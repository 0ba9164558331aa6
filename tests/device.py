"""A device without arrays: it runs a scheduler's steps one step late, as the engine does, remembers what every page
and every seat holds, and checks what each step would read."""

from tokenloom.serve.chain import Chain
from tokenloom.serve.scheduler import Scheduler, Sequence, Work


def digest(before: int, token: int) -> int:
    """The identity of a text, from the identity of all but its last token."""
    return hash((before, token))


def digests(root, tokens: list[int]) -> list[int]:
    """The identity of each prefix, the empty one first; texts of other roots differ from the start."""
    found = [hash(root)]
    for token in tokens:
        found.append(digest(found[-1], token))
    return found


class Device:
    """`step` schedules, runs and reads. A text continues with a token that only depends on the text."""

    def __init__(self, scheduler: Scheduler, vocab: int = 3):
        self.scheduler, self.vocab = scheduler, vocab
        self.cells: dict[
            tuple[int, int], int
        ] = {}  # (page, place in it) -> identity of the text that ends there
        self.state: dict[int, int] = {}  # seat, or seats + slot -> identity of the text that it took in
        self.texts: dict[Sequence, list[int]] = {}  # known on the device, one step ahead of the host
        self.in_flight: list[tuple[Sequence, int, int]] | None = None
        self.done: list[Sequence] = []

    def step(self) -> Work | None:
        preemptions = self.scheduler.preemptions
        work = self.scheduler.schedule()
        assert work is None or self.scheduler.preemptions == preemptions or not work.admitted
        rows = self.run(work) if work else None
        previous, self.in_flight = self.in_flight, rows
        self.read(previous or [])
        return work

    def read(self, rows: list[tuple[Sequence, int, int]]) -> None:
        """The host reads what a step sampled."""
        for sequence, epoch, token in rows:
            if sequence.finished or sequence.epoch != epoch:
                continue
            sequence.pending -= 1
            sequence.tokens.append(token)
            if len(sequence.tokens) >= sequence.limit:
                self.scheduler.finish(sequence)
                self.done.append(sequence)

    def drain(self, steps: int = 20_000) -> None:
        for _ in range(steps):
            if not (self.scheduler.busy or self.in_flight):
                return
            self.step()
        raise AssertionError("no end in sight")

    def run(self, work: Work):
        scheduler = self.scheduler
        parts = [(s, s.computed - 1, 1, True) for s in work.decodes]
        parts += [(c.sequence, c.start, c.count, c.final) for c in work.chunks]
        assert 0 < sum(count for _, _, count, _ in parts) <= scheduler.budget
        assert len(work.chunks) <= scheduler.prompt_rows
        assert len({id(sequence) for sequence, *_ in parts}) == len(parts)
        self.check_owners()
        for slot, seat in work.loads:
            self.state[seat] = self.state["slot", slot]
        for sequence in work.admitted:
            self.texts[sequence] = list(sequence.tokens)
        wanted = {}
        for sequence, start, count, _ in parts:
            text = self.texts[sequence]
            wanted[sequence] = names = digests((sequence.chain.root, sequence.chain.version), text)
            assert start >= 0 and count > 0 and start + count <= len(text)
            size = scheduler.pages.page_size
            for at in range(start, start + count):
                self.cells[sequence.pages[at // size], at % size] = names[at + 1]
            if scheduler.pages.snapshots is not None:
                assert start == 0 or self.state[sequence.seat] == names[start]
                self.state[sequence.seat] = names[start + count]
        rows = []
        for sequence, start, count, samples in parts:
            text, names, size = self.texts[sequence], wanted[sequence], scheduler.pages.page_size
            for at in range(start + count):
                assert self.cells[sequence.pages[at // size], at % size] == names[at + 1], (
                    "another text's page"
                )
            assert samples == (start + count == len(text))
            if samples:
                text.append(names[-1] % self.vocab)
                rows.append((sequence, sequence.epoch, text[-1]))
        for seat, slot in work.saves:
            self.state["slot", slot] = self.state[seat]
        return rows

    def check_owners(self) -> None:
        """A page has as many owners as tables hold it; everything else is free; seats are taken once."""
        scheduler, pages = self.scheduler, self.scheduler.pages
        held: dict[int, int] = {}
        for sequence in scheduler.running:
            assert len(set(sequence.pages)) == len(sequence.pages) and 0 not in sequence.pages
            for page in sequence.pages:
                held[page] = held.get(page, 0) + 1
        assert all(pages._owners[page] == held.get(page, 0) for page in range(pages.num_pages))
        assert pages.free + len(held) + 1 == pages.num_pages
        seats = [sequence.seat for sequence in scheduler.running]
        assert len(set(seats)) == len(seats) and min(seats, default=0) >= 0


def sequence(tokens: list[int], limit: int, salt: str | None = None) -> Sequence:
    return Sequence(tokens, limit, chain=Chain((None, salt)))
