"""Laws of the scheduler and the page allocator, on drawn workloads, with no device."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenloom.serve.pages import NULL_PAGE, PageAllocator
from tokenloom.serve.scheduler import Scheduler, Sequence


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_pages_are_owned_once_and_come_back(actions):
    pages = PageAllocator(12, 4)
    owners: list[list[int]] = []
    for grow, size in actions:
        if grow or not owners:
            owned: list[int] = []
            fits = pages.pages_for(size) <= pages.free
            assert pages.grow(owned, size) == fits
            assert len(owned) == (pages.pages_for(size) if fits else 0)
            owners.append(owned)
        else:
            pages.release(owners.pop(size % len(owners)))
        held = [page for owned in owners for page in owned]
        assert len(set(held)) == len(held) and NULL_PAGE not in held
        assert pages.free + len(held) + 1 == pages.num_pages


def test_a_pool_without_pages_is_refused():
    with pytest.raises(ValueError, match="at least 2 pages"):
        PageAllocator(1, 4)


def test_a_budget_that_starves_prompts_is_refused():
    with pytest.raises(ValueError, match=r"max_num_batched_tokens=4 must exceed max_num_seqs=4"):
        Scheduler(PageAllocator(8, 4), max_num_seqs=4, budget=4, prompt_rows=2)


class Device:
    """Runs steps as the engine does, one step late, and checks what the device would see."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.stored: dict[Sequence, int] = {}
        self.in_flight = None
        self.done: list[Sequence] = []

    def step(self):
        work = self.scheduler.schedule()
        rows = self.check(work) if work else None
        previous, self.in_flight = self.in_flight, rows
        for sequence, epoch in previous or ():
            if sequence.finished or sequence.epoch != epoch:
                continue
            sequence.pending -= 1
            sequence.tokens.append(7)
            if len(sequence.tokens) >= sequence.limit:
                self.scheduler.finish(sequence)
                self.done.append(sequence)
        return work

    def check(self, work):
        scheduler = self.scheduler
        tokens = len(work.decodes) + sum(chunk.count for chunk in work.chunks)
        assert 0 < tokens <= scheduler.budget and len(work.chunks) <= scheduler.prompt_rows
        rows = []
        for sequence in work.admitted:
            self.stored[sequence] = 0
        for sequence in work.decodes:
            assert sequence.computed == self.stored[sequence] + 1 == sequence.known - 1
            self.stored[sequence] += 1
            rows.append((sequence, sequence.epoch))
        for chunk in work.chunks:
            assert chunk.start == self.stored[chunk.sequence] and chunk.count > 0
            self.stored[chunk.sequence] += chunk.count
            assert self.stored[chunk.sequence] <= len(chunk.sequence.tokens)
            if chunk.final:
                rows.append((chunk.sequence, chunk.sequence.epoch))
        for sequence in [*work.decodes, *(chunk.sequence for chunk in work.chunks)]:
            assert len(sequence.pages) * scheduler.pages.page_size >= self.stored[sequence]
            assert sequence.seat >= 0
        seats = [sequence.seat for sequence in scheduler.running]
        assert len(set(seats)) == len(seats)
        return rows


requests = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(2, 5), st.integers(6, 24), st.integers(13, 40), st.integers(1, 4))
def test_everyone_finishes_under_any_pressure(drawn, seats, budget, num_pages, prompt_rows):
    pages = PageAllocator(num_pages, 4)
    scheduler = Scheduler(pages, max_num_seqs=seats, budget=budget, prompt_rows=prompt_rows)
    device = Device(scheduler)
    sequences = [
        Sequence([1] * prompt, min(prompt + output, pages.capacity))
        for prompt, output in drawn
        if prompt < 40
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(20_000):
        if not (scheduler.busy or device.in_flight):
            break
        device.step()
    assert set(device.done) == set(sequences)
    assert all(len(sequence.tokens) == sequence.limit for sequence in sequences)
    assert pages.free == num_pages - 1


def test_decodes_never_wait_for_prompts():
    """Stall-free: while a long prompt arrives in chunks, a decoding sequence advances in every step."""
    scheduler = Scheduler(PageAllocator(200, 4), max_num_seqs=4, budget=16, prompt_rows=2)
    device = Device(scheduler)
    first = Sequence([1] * 5, 200)
    scheduler.add(first)
    device.step()
    device.step()
    scheduler.add(Sequence([1] * 300, 310))
    for _ in range(25):
        before = first.computed
        work = device.step()
        assert first in work.decodes and first.computed == before + 1
        assert sum(chunk.count for chunk in work.chunks) == 15 or work.chunks == [] or work.chunks[-1].final


def test_the_youngest_is_preempted_first_and_nobody_is_admitted_with_it():
    pages = PageAllocator(7, 4)
    scheduler = Scheduler(pages, max_num_seqs=3, budget=32, prompt_rows=3)
    device = Device(scheduler)
    old, young = Sequence([1] * 8, 24), Sequence([1] * 8, 24)
    scheduler.add(old)
    scheduler.add(young)
    while scheduler.preemptions == 0:
        waiting = Sequence([1], 2)
        scheduler.add(waiting)
        work = device.step()
        scheduler.finish(waiting)
    assert scheduler.waiting[0] is young and old in scheduler.running
    assert work.admitted == []
