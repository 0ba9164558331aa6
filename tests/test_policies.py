"""Laws of the scheduling policies: what holds under each of them, and what each promises."""

import itertools
import random
import re
from pathlib import Path

import pytest
import tokenloom
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenloom import LLM, BatchLLM, Castillo, Fair, PrefillFirst, Priority, SarathiServe, SplitFuse
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.scheduler import Scheduler, Sequence
from tokenloom.serve.snapshots import Snapshots
from tokenloom.tests.device import Device
from tokenloom.tests.engines import ROOMY, greedy, prompts, same_tokens
from tokenloom.tests.shapes import llama

MAKERS = {
    "sarathi": SarathiServe,
    "split_fuse": SplitFuse,
    "prefill_first": PrefillFirst,
    "priority": lambda: Priority(aging=20),
    "fair": lambda: Fair({"a": 3.0}),
    "batch_llm": BatchLLM,
    "castillo": Castillo,
    "shortest_first": lambda: Castillo(shortest_first=True),
}
POLICIES = pytest.mark.parametrize("name", sorted(MAKERS))
HOME = Path(tokenloom.__file__).resolve().parent / "serve" / "policies"


def make(name, num_pages=400, seats=4, budget=32, rows=4, snapshots=0) -> Device:
    pages = PageAllocator(num_pages, 4, snapshots=Snapshots(snapshots, 4) if snapshots else None)
    policy = MAKERS[name]() if isinstance(name, str) else name
    return Device(Scheduler(pages, max_num_seqs=seats, budget=budget, prompt_rows=rows, policy=policy))


def sequence(prompt: int, output: int, fill: int = 1, **marks) -> Sequence:
    return Sequence([fill] * prompt, prompt + output, **marks)


def tokens(work) -> int:
    return len(work.decodes) + sum(chunk.count for chunk in work.chunks)


# -- every policy ------------------------------------------------------------------------------------------

drawn_requests = st.lists(
    st.tuples(
        st.integers(1, 30), st.integers(1, 20), st.integers(0, 2), st.integers(-1, 2), st.sampled_from("abc")
    ),
    min_size=1, max_size=14,
)  # fmt: skip


@POLICIES
@settings(max_examples=40, deadline=None)
@given(
    drawn_requests, st.integers(2, 5), st.integers(6, 24), st.integers(13, 30), st.integers(1, 4),
    st.booleans(), st.lists(st.integers(0, 200), max_size=3),
)  # fmt: skip
def test_everyone_finishes_in_a_pool_too_small(name, drawn, seats, budget, num_pages, rows, recurrent, ended):
    """The device checks budgets, owners and contents in every step; some requests arrive late, some are ended."""
    device = make(name, num_pages, seats, budget, rows, snapshots=seats * recurrent)
    capacity = device.scheduler.pages.capacity
    sequences = [
        Sequence([fill] * prompt, min(prompt + output, capacity), priority=priority, tenant=tenant)
        for prompt, output, fill, priority, tenant in drawn
    ]
    for one in sequences:
        device.scheduler.add(one)
        device.step()
    for at in ended:
        one = sequences[at % len(sequences)]
        if not one.finished:
            device.scheduler.finish(one)
            device.done.append(one)
        device.step()
    device.drain()
    assert set(device.done) == set(sequences) and len(device.done) == len(sequences)
    assert device.scheduler.pages.free == num_pages - 1 and len(device.scheduler.policy) == 0
    device.check_owners()


class Watched(Sequence):
    """A sequence that notes who looked at it."""

    __slots__ = ()
    touched: set[int] = set()  # noqa: RUF012

    def __getattribute__(self, name):
        Watched.touched.add(id(self))
        return object.__getattribute__(self, name)


@POLICIES
@pytest.mark.parametrize("ended", [False, True])
def test_a_step_looks_at_no_more_sequences_when_more_wait(name, ended):
    """Also when most of those that waited were ended: they cost once, when they were ended."""
    counts = []
    for waiting in (100, 3000):
        device, draw = make(name, num_pages=60), random.Random(0)
        queue = [
            Watched([1] * 9, 30, priority=draw.randrange(3), tenant=draw.choice("abcdefgh"))
            for _ in range(waiting)
        ]
        for one in queue:
            device.scheduler.add(one)
        device.step()
        for one in queue[10 : waiting - 60] if ended else []:
            device.scheduler.finish(one)
        most = 0
        for _ in range(60):
            Watched.touched = set()
            device.step()
            most = max(most, len(Watched.touched))
        counts.append(most)
    # 70 live ones remain beside at most as many ended ones, which one step may skip together.
    assert counts[1] <= (140 if ended else max(2 * counts[0], 16)) and (ended or counts[0] < 20)


@POLICIES
def test_outputs_do_not_depend_on_the_policy(name):
    llm = LLM.from_config(llama(), progress=False, strict=True, policy=MAKERS[name](), num_pages=24, **ROOMY)
    drawn = prompts(10, 31, longest=70)
    draw = random.Random(1)
    outputs = llm.generate(
        drawn,
        greedy(16),
        priority=[draw.randrange(3) for _ in drawn],
        tenant=[draw.choice("ab") for _ in drawn],
    )
    for prompt, output in zip(drawn, outputs):
        same_tokens(output, reference().generate(prompt, greedy(16))[0])
    assert llm.engine.pages.free == llm.engine.pages.num_pages - 1
    llm.close()


def reference() -> LLM:
    from tokenloom.tests.engines import engine

    return engine("llama")


def test_policies_have_no_arrays_and_one_home_each():
    for path in HOME.glob("*.py"):
        imports = re.findall(r"^\s*(?:from|import)\s+(\S+)", path.read_text(), re.M)
        assert not {"jax", "numpy"} & {module.split(".")[0] for module in imports}, path


def test_an_instance_serves_one_engine():
    policy = SarathiServe()
    make(policy)
    with pytest.raises(ValueError, match="this SarathiServe serves another engine already"):
        make(policy)


class Reserving(SarathiServe):
    """Starts a sequence beside others only when its whole length would fit: a veto at admission."""

    def admits(self, sequence, pages, running):
        owed = sum(pages.pages_for(one.limit) - len(one.pages) for one in running)
        return pages.pages_for(sequence.limit) + owed <= pages.free


class Refusing(SarathiServe):
    def admits(self, sequence, pages, running):
        return False


def test_a_policy_may_keep_room_but_never_stop_everything():
    for policy, preempts in ((SarathiServe(), True), (Reserving(), False), (Refusing(), False)):
        device = make(policy, num_pages=14)
        sequences = [sequence(8, 40, fill) for fill in range(6)]
        for one in sequences:
            device.scheduler.add(one)
        device.drain()
        assert len(device.done) == 6 and (device.scheduler.preemptions > 0) == preempts


# -- Sarathi-Serve -----------------------------------------------------------------------------------------


def test_sarathi_never_stalls_a_decode():
    device, draw, running = make("sarathi"), random.Random(2), []
    for number in range(300):
        if draw.random() < 0.2:
            device.scheduler.add(sequence(draw.randint(1, 150), draw.randint(1, 40), number))
        ready = [one for one in device.scheduler.running if one.decoding and one.known < one.limit]
        preemptions = device.scheduler.preemptions
        work = device.step()
        assert device.scheduler.preemptions == preempts(preemptions)
        assert not ready or set(ready) == set(work.decodes)
        running += ready
    assert len(running) > 300


def preempts(before: int) -> int:
    """The roomy pool preempts nobody."""
    return before


def test_sarathi_takes_the_largest_chunk_that_meets_its_target():
    chunks, times = (32, 64, 128, 256), {32: 0.010, 64: 0.012, 128: 0.019, 256: 0.040}
    for target, chosen in ((50.0, 256), (19.5, 128), (12.0, 64), (10.5, 32)):
        policy = SarathiServe(inter_token_ms=target)
        policy.calibrate(chunks, times.__getitem__)
        assert policy.budget(256) == chosen
    policy = SarathiServe(inter_token_ms=5.0)
    with pytest.warns(UserWarning, match=r"inter_token_ms=5.0 is not met: .* 32 tokens, takes 10.00 ms"):
        policy.calibrate(chunks, times.__getitem__)
    assert policy.budget(256) == 32
    device = make(policy, budget=256, seats=4)
    device.scheduler.add(sequence(200, 2))
    assert tokens(device.step()) == 32
    with pytest.raises(ValueError, match="inter_token_ms=0 must be"):
        SarathiServe(inter_token_ms=0)


def test_measuring_changes_nobody():
    """A measured step writes where padding does: a generation around it goes on undisturbed."""
    llm = reference()
    prompt = prompts(1, 32)[0]
    expected = llm.generate(prompt, greedy(12))[0]
    measured, step, programs = [], llm.engine.step, llm.engine.programs

    def interrupted():
        measured.append(programs.measure(programs.plan.chunks[len(measured) % 2], repeats=1))
        return step()

    llm.engine.step = interrupted
    try:
        same_tokens(expected, llm.generate(prompt, greedy(12))[0])
    finally:
        del llm.engine.step
    assert len(measured) > 10 and min(measured) > 0


# -- SplitFuse ---------------------------------------------------------------------------------------------


def test_split_fuse_fills_every_pass_exactly():
    device, draw = make(SplitFuse(24), num_pages=2000, seats=8, rows=8), random.Random(3)
    pieces: dict[Sequence, int] = {}
    full, fills = 0, itertools.count()
    for _ in range(400):
        while sum(len(one.tokens) for one in device.scheduler.policy._waiting) < 100:
            device.scheduler.add(sequence(draw.randint(8, 60), draw.randint(1, 6), next(fills)))
        work = device.step()
        assert tokens(work) == 24 or len(device.scheduler.running) == 8
        full += tokens(work) == 24
        for chunk in work.chunks:
            assert chunk.start == pieces.get(chunk.sequence, 0)
            pieces[chunk.sequence] = chunk.start + chunk.count
        # A remainder leads the prompts of the next pass.
        left = [chunk.sequence for chunk in work.chunks if not chunk.final]
        assert left in ([], [work.chunks[-1].sequence])
    assert full > 300
    with pytest.raises(ValueError, match=r"SplitFuse\(forward_tokens=64\) exceeds max_num_batched_tokens=32"):
        make(SplitFuse(64))


# -- prefill first -----------------------------------------------------------------------------------------


def test_prefill_first_lets_decodes_wait():
    device = make("prefill_first")
    device.scheduler.add(sequence(5, 50))
    device.step()
    assert device.step().decodes
    device.scheduler.add(sequence(100, 3, fill=2))
    works = [device.step() for _ in range(4)]
    assert [tokens(work) for work in works] == [32, 32, 32, 4]
    assert not any(work.decodes for work in works) and len(device.step().decodes) == 2


# -- priority ----------------------------------------------------------------------------------------------


def _order(device: Device, sequences) -> list[int]:
    """The order in which sequences are admitted."""
    admitted = []
    for one in sequences:
        device.scheduler.add(one)
    while len(admitted) < len(sequences):
        work = device.step()
        admitted += [] if work is None else [sequences.index(one) for one in work.admitted]
    return admitted


def test_lower_priorities_first_then_arrival():
    sequences = [sequence(4, 4, i, priority=p) for i, p in enumerate([2, 0, 1, 0, 2, 1])]
    assert _order(make(Priority(), seats=1), sequences) == [1, 3, 2, 5, 0, 4]


def test_the_lowest_class_is_preempted_first():
    device = make(Priority(), num_pages=13, seats=3)
    low, high, middle = (sequence(8, 30, i, priority=p) for i, p in enumerate([5, 0, 1]))
    for one in (low, high, middle):
        device.scheduler.add(one)
    while device.scheduler.preemptions == 0:
        device.step()
    assert low.epoch == 1 and high.epoch == middle.epoch == 0
    device.drain()
    assert device.done == [high, middle, low]


def test_aging_bounds_how_many_overtake():
    sequences = [sequence(4, 2, 0, priority=3)] + [sequence(4, 2, i, priority=0) for i in range(1, 60)]
    place = _order(make(Priority(aging=5), seats=1), sequences).index(0)
    assert 10 < place <= 3 * 5
    assert _order(make(Priority(), seats=1), [*map(copy, sequences)])[-1] == 0


def copy(one: Sequence) -> Sequence:
    return sequence(4, 2, one.tokens[0], priority=one.priority)


# -- fair --------------------------------------------------------------------------------------------------


def _service(policy, weights) -> float:
    """The largest difference of two tenants' service over their weights while both wait: one floods."""
    device, draw = make(policy, num_pages=2000, seats=4, budget=32), random.Random(4)
    for number in range(300):
        device.scheduler.add(sequence(draw.randint(2, 6), draw.randint(20, 30), number, tenant="flood"))
    for number in range(60):
        device.scheduler.add(sequence(draw.randint(20, 30), draw.randint(1, 4), 500 + number, tenant="b"))
    served, worst = {"flood": 0.0, "b": 0.0}, 0.0
    while any(one.tenant == "b" and one.seat < 0 and not one.finished for one in device_waiting(device)):
        work = device.step()
        for chunk in work.chunks:
            served[chunk.sequence.tenant] += chunk.count + 2 * chunk.final
        for one in work.decodes:
            served[one.tenant] += 2
        worst = max(worst, abs(served["flood"] / weights["flood"] - served["b"] / weights["b"]))
    assert min(served.values()) > 500
    return worst


def device_waiting(device: Device):
    policy = device.scheduler.policy
    queues = policy._queues.values() if isinstance(policy, Fair) else [policy]
    return [one for queue in queues for one in queue._waiting]


@pytest.mark.parametrize("share", [1.0, 3.0])
def test_a_flood_leaves_others_their_share(share):
    """Theorem 4.4: 2 max(input cost * longest prompt, output cost * tokens of a batch)."""
    weights = {"flood": 1.0, "b": share}
    quantum = 2 * max(30, 2 * 4 * 30)
    assert _service(Fair(weights), weights) <= quantum
    assert _service(SarathiServe(), weights) > 3 * quantum, "the control: first come, first served"


def test_time_away_saves_nothing_up():
    policy = Fair()
    device = make(policy, num_pages=2000, seats=1)
    for number in range(40):
        device.scheduler.add(sequence(10, 10, number, tenant="busy"))
    while policy.served["busy"] < 300:
        device.step()
    late = [sequence(10, 10, 100 + number, tenant="late") for number in range(10)]
    for one in late:
        device.scheduler.add(one)
    assert policy.served["late"] == policy.served["busy"]
    turns = []
    while any(one.seat < 0 and not one.finished for one in late[:5]):
        work = device.step()
        turns += [one.tenant for one in (work.admitted if work else [])]
    assert abs(turns.count("late") - turns.count("busy")) <= 1


def test_tenants_that_come_and_go_leave_no_trail():
    policy = Fair()
    device = make(policy, seats=1)
    device.scheduler.add(sequence(10, 60, tenant="a"))
    device.step()
    device.scheduler.add(sequence(10, 60, tenant="a"))
    for number in range(500):
        one = sequence(4, 4, tenant=f"t{number % 7}")
        device.scheduler.add(one)
        device.scheduler.finish(one)
    assert len(policy._heap) < 100 and len(policy) == 1
    device.drain()


def test_mistakes_are_named():
    for build, words in (
        (lambda: Fair({"a": 0.0}), "weight of tenant 'a' is 0.0"),
        (lambda: Priority(aging=0), "aging=0"),
        (lambda: SplitFuse(0), "forward_tokens=0"),
        (lambda: make(SplitFuse(4)), "max_num_batched_tokens=4 must exceed max_num_seqs=4"),
        (lambda: reference().generate([[1], [2]], greedy(1), priority=[1]), "does not fit 2 prompts"),
    ):
        with pytest.raises(ValueError, match=words):
            build()
