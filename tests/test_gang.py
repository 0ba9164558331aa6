"""Laws of gangs under every scheduling policy, on a device without arrays: all members or none, and the right pages."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenloom.serve.gang import Gang, gangs_of
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.scheduler import Scheduler, Sequence
from tokenloom.tests.device import Device
from tokenloom.tests.test_policies import MAKERS, POLICIES


class Members(Gang):
    """Parents and tokens are drawn by the device below."""

    form = prepare = select = read = conclude = lambda *given: None  # type: ignore[assignment]


class Forking(Device):
    """Reads a step with a gang before the next is scheduled, and forks its members at random."""

    def __init__(self, scheduler: Scheduler, seed: int):
        super().__init__(scheduler)
        self.draw, self.forks = random.Random(seed), 0

    def step(self):
        if any(sequence.gang for sequence, *_ in self.in_flight or ()):
            rows, self.in_flight = self.in_flight, None
            self.read(rows)
        return super().step()

    def run(self, work):
        for gang in gangs_of(work.decodes):
            assert {one.seat >= 0 and len(one.tokens) for one in gang.members} == {
                len(gang.members[0].tokens)
            }
            for source, target in gang.copies:
                for slot in range(self.scheduler.pages.page_size):
                    if (source, slot) in self.cells:
                        self.cells[target, slot] = self.cells[source, slot]
            gang.copies.clear()
        return super().run(work)

    def read(self, rows):
        super().read([row for row in rows if row[0].gang is None])
        live = (one for one, epoch, _ in rows if one.gang and one.epoch == epoch and not one.finished)
        for gang in dict.fromkeys(one.gang for one in live):
            for one in gang.members:
                one.pending -= 1
            width, tokens = gang.width, [self.draw.randrange(2) for _ in gang.members]
            gang.fork([self.draw.randrange(width) for _ in range(width)], tokens, self.scheduler.pages)
            self.forks += 1
            self.texts |= {one: list(one.tokens) for one in gang.members}
            if len(gang.members[0].tokens) >= gang.members[0].limit:
                self.end(gang.members[0])

    def end(self, sequence: Sequence) -> None:
        for one in sequence.members:
            self.scheduler.finish(one)
            self.done.append(one)


requests = st.lists(
    st.tuples(
        st.integers(1, 30), st.integers(1, 20), st.integers(0, 2), st.integers(-1, 2), st.sampled_from("abc"),
        st.integers(0, 4),
    ),
    min_size=1, max_size=10,
)  # fmt: skip


@POLICIES
@settings(max_examples=40, deadline=None)
@given(
    requests, st.integers(4, 6), st.integers(7, 24), st.integers(17, 30), st.integers(1, 4), st.booleans(),
    st.lists(st.integers(0, 200), max_size=3), st.integers(0, 9),
)  # fmt: skip
def test_gangs_run_whole_beside_others(name, drawn, seats, budget, num_pages, rows, cached, ended, seed):
    """In a pool too small, with late arrivals and requests that are ended. The device checks that every row reads its
    own text, that tables and owners agree, that seats are taken once and budgets kept."""
    pages = PageAllocator(num_pages, 4, off=None if cached or name == "batch_llm" else "as asked")
    device = Forking(
        Scheduler(pages, max_num_seqs=seats, budget=budget, prompt_rows=rows, policy=MAKERS[name]()), seed
    )
    sequences = []
    for prompt, output, fill, priority, tenant, width in drawn:
        marks = dict(priority=priority, tenant=tenant)
        gang = Members(width) if width else None
        most = gang.longest(prompt, pages) if gang else pages.capacity
        if most <= prompt:
            continue
        limit = min(prompt + output, most)
        group = [Sequence([fill] * prompt, limit, gang=gang, **marks) for _ in range(width or 1)]
        if gang:
            gang.members = group
        sequences += group
        device.scheduler.add(group[0])
        device.step()
    for at in ended if sequences else ():
        one = sequences[at % len(sequences)]
        if not one.finished:
            device.end(one)
        device.step()
    device.drain()
    assert set(device.done) == set(sequences) and len(device.done) == len(sequences)
    assert (
        pages.free == num_pages - 1
        and len(device.scheduler.policy) == 0
        and len(device.scheduler._seats) == seats
    )
    device.check_owners()
