"""Laws of the scheduler, on drawn workloads, with no device. The allocator's are in test_prefix_cache.py."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.scheduler import Scheduler, Sequence
from tokenloom.serve.snapshots import Snapshots
from tokenloom.tests.device import Device, sequence

OFF = "not wanted here"


def test_a_budget_that_starves_prompts_is_refused():
    with pytest.raises(ValueError, match=r"max_num_batched_tokens=4 must exceed max_num_seqs=4"):
        Scheduler(PageAllocator(8, 4), max_num_seqs=4, budget=4, prompt_rows=2)


# Prompts from a common text, so that prefixes are shared: (where it parts from the text, length, output, salt).
requests = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 30), st.integers(1, 20), st.sampled_from([None, "a"])),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    requests, st.integers(2, 5), st.integers(6, 24), st.integers(13, 40), st.integers(1, 4),
    st.sampled_from(["off", "pages", "snapshots"]), st.lists(st.integers(0, 400), max_size=3),
)  # fmt: skip
def test_everyone_finishes_under_any_pressure(drawn, seats, budget, num_pages, prompt_rows, cache, swaps):
    """Tight pools, shared prefixes, recurrent state, aborted requests, swapped weights: no step ever reads
    another text's page or state, and at the end everything is free."""
    snapshots = Snapshots(seats, 4) if cache == "snapshots" else None
    pages = PageAllocator(num_pages, 4, off=OFF if cache == "off" else None, snapshots=snapshots)
    device = Device(Scheduler(pages, max_num_seqs=seats, budget=budget, prompt_rows=prompt_rows))
    sequences = []
    for index, (shared, length, output, salt) in enumerate(drawn):
        prompt = [0] * min(shared, length) + [1 + index % 3] * max(0, length - shared)
        sequences.append(sequence(prompt, min(length + output, pages.capacity), salt))
        device.scheduler.add(sequences[-1])
    for at in sorted(swaps):
        for _ in range(at % 20):
            device.step()
        if at % 2:
            for running in reversed(device.scheduler.running[:] if at % 4 == 1 else []):
                device.scheduler.preempt(running)
            pages.new_weights()
        elif sequences[at % len(sequences)] not in device.done:
            device.scheduler.finish(sequences[at % len(sequences)])
            device.done.append(sequences[at % len(sequences)])
    device.drain()
    assert set(device.done) == set(sequences) and len(device.done) == len(sequences)
    assert pages.free == num_pages - 1 and not any(pages._owners)
    assert snapshots is None or snapshots.free == seats


def test_decodes_never_wait_for_prompts():
    """Stall-free: while a long prompt arrives in chunks, a decoding sequence advances in every step."""
    scheduler = Scheduler(PageAllocator(200, 4), max_num_seqs=4, budget=16, prompt_rows=2)
    device = Device(scheduler)
    first = Sequence([1] * 5, 200)
    scheduler.add(first)
    device.step()
    device.step()
    scheduler.add(Sequence([2] * 300, 310))
    for _ in range(25):
        before = first.computed
        work = device.step()
        assert first in work.decodes and first.computed == before + 1
        assert sum(chunk.count for chunk in work.chunks) == 15 or work.chunks == [] or work.chunks[-1].final


def test_the_youngest_is_preempted_first_and_nobody_is_admitted_with_it():
    pages = PageAllocator(7, 4)
    scheduler = Scheduler(pages, max_num_seqs=3, budget=32, prompt_rows=3)
    device = Device(scheduler)
    old, young = Sequence([1] * 8, 24), Sequence([2] * 8, 24)
    scheduler.add(old)
    scheduler.add(young)
    while scheduler.preemptions == 0:
        waiting = Sequence([1], 2)
        scheduler.add(waiting)
        work = device.step()
        scheduler.finish(waiting)
    assert scheduler.policy.peek() is young and old in scheduler.running
    assert work.admitted == []
