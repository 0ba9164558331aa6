"""A short soak in the suite; `benchmarks/soak.py` is the long one."""

import random
import threading
import time
import tracemalloc
from collections import Counter

import pytest
from tokenloom import LLM, Fair, PrefillFirst, Priority, SamplingParams, SarathiServe, SplitFuse
from tokenloom.serve.driver import Driver
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.policies.fair import Fair as FairPolicy
from tokenloom.serve.scheduler import Scheduler, Sequence
from tokenloom.tests import tiny
from tokenloom.tests.configurations import settled
from tokenloom.tests.device import Device
from tokenloom.tests.drawn import draw_requests
from tokenloom.tests.shapes import ALL
from tokenloom.tests.soak import SIZES, soak

GROWTH = 0.02


@pytest.mark.parametrize("shape, policy", [("llama", Priority), ("hybrid", Fair)])
def test_nothing_leaks(shape, policy):
    with LLM.from_config(ALL[shape](), 0, strict=True, progress=False, policy=policy(), **SIZES) as llm:
        found = soak(llm, 1000, 3)
        engine = llm.engine
        assert found.requests == 1000 and sum(found.reasons.values()) == found.samples > 1000
        assert {"stop", "length", "abort", "timeout"} <= set(found.reasons)
        assert engine.scheduler.preemptions > 10 and engine.pages.hit_tokens > 500
        assert engine.programs.compilations.late == 0
        assert found.growth("arrays") == 0, [mark.arrays for mark in found.marks]
        assert found.growth("objects") <= GROWTH, [mark.objects for mark in found.marks]
        assert found.growth("memory") <= GROWTH, [mark.memory for mark in found.marks]
        assert not engine.cancelled and engine.in_flight is None and not engine.reported
        # Deadlines of requests that ended early are swept out when they are many, and not before.
        assert len(llm._live) <= len(engine.deadlines._heap) <= 64 + 2 * 3
        queue = engine.scheduler.policy
        if isinstance(queue, FairPolicy):
            assert len(queue.served) <= 128 and len(queue._heap) <= 64 + 2


def test_the_driver_forgets_what_ended():
    """Submitted and cancelled from several threads: one last update each, none after a cancellation was seen."""
    llm, told, lock = tiny.llm(), Counter(), threading.Lock()
    ended, handles = Counter(), []

    def submit(number: int) -> None:
        draw = random.Random(number)
        for one in draw_requests(40, number, llm.config.vocab_size, prompt=30, output=6, text=True):

            def listen(update, key=(number, one.index)):
                with lock:
                    told[key] += update.last
                    if update.output is not None:
                        ended.update(sample.finish_reason for sample in update.output.outputs)

            handle = driver.submit({"prompt_token_ids": one.prompt}, one.params, listen)
            handles.append(((number, one.index), handle))
            if draw.random() < 0.2:
                driver.cancel(handle)

    with Driver(llm) as driver:
        threads = [threading.Thread(target=submit, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while driver._incoming or driver._live:
            time.sleep(0.01)
        assert driver.failure is None
    settled_soon(llm)
    kept = [key for key, handle in handles if not handle.cancelled]
    assert all(told[key] == 1 for key in kept) and max(told.values()) == 1 and len(kept) > 100
    assert not driver._live and not driver._incoming and None not in ended


def settled_soon(llm: LLM) -> None:
    """The step in flight is read by whoever steps next."""
    while llm.engine.busy:
        llm.engine.step()
    settled(llm.engine)


def test_metrics_are_filled():
    llm = tiny.llm()
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    for output in llm.generate(["def f(", "class A", "x = "] * 4, params):
        metrics = output.metrics
        assert 0 <= metrics.queue_time <= metrics.time_to_first_token <= metrics.latency
        assert metrics.first_token_time <= metrics.last_token_time <= metrics.finished_time
        assert metrics.preemptions == 0


def test_fair_shares_forget_tenants_without_a_trace():
    """The order of admission is that of a policy which keeps every tenant's counter for ever."""

    def admitted(keeps: bool) -> tuple[list[int], int]:
        policy, draw, order, most = FairPolicy(), random.Random(7), [], 0
        if keeps:
            policy._many = 10**9
        device = Device(
            Scheduler(PageAllocator(60, 4), max_num_seqs=3, budget=24, prompt_rows=3, policy=policy)
        )
        for number in range(1500):
            if draw.random() < 0.5 and len(policy) < 12:
                tenant = f"t{draw.randrange(10 if draw.random() < 0.5 else 2000)}"
                one = Sequence([1 + number % 2] * draw.randint(1, 20), 40, tenant=tenant, owner=number)
                one.limit = len(one.tokens) + draw.randint(1, 8)
                device.scheduler.add(one)
            work = device.step()
            order += [one.owner for one in work.admitted] if work else []
            most = max(most, len(policy.served))
        return order, most

    (expected, kept), (order, forgetting) = admitted(True), admitted(False)
    assert order == expected and len(order) > 300
    assert forgetting <= 128 < kept / 2


@pytest.mark.parametrize("make", [SarathiServe, SplitFuse, PrefillFirst, Priority, Fair])
def test_a_step_allocates_no_more_when_more_wait(make):
    """The counting test of tests/test_policies.py sees who is looked at; this one sees a queue that is copied."""
    peaks = []
    for waiting in (100, 5000):
        draw, pages = random.Random(0), PageAllocator(60, 4)
        device = Device(Scheduler(pages, max_num_seqs=4, budget=32, prompt_rows=4, policy=make()))
        for number in range(waiting):
            marks = dict(priority=draw.randrange(3), tenant=f"t{number % 500}")
            device.scheduler.add(Sequence([number % 9] * 9, 30, **marks))
        schedule, most = device.scheduler.schedule, []

        def measured(schedule=schedule, most=most):
            tracemalloc.start()
            try:
                return schedule()
            finally:
                most.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()

        device.scheduler.schedule = measured
        for _ in range(80):
            device.step()
        peaks.append(max(most))
    assert peaks[1] <= peaks[0] + 8192, (
        f"bytes that a step allocated with 100 and with 5,000 waiting: {peaks}"
    )
