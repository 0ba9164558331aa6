"""Replicas: any number of engines generates what one does, none waits for another, and prompts go where it pays."""

from types import SimpleNamespace

import pytest
from tokenloom import LLM
from tokenloom.serve.bounds import Bounds
from tokenloom.serve.chain import Chain
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.replicas import Replicas
from tokenloom.tests.devices import run_on
from tokenloom.tests.shapes import ALL

PAGE, SEATS, BUDGET = 4, 16, 64


class Fake:
    """What `Replicas` asks of an engine; its steps are done when the test says so."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log
        self.pages = PageAllocator(65, PAGE)
        self.scheduler = SimpleNamespace(waiting=[], running=[], budget=BUDGET, max_num_seqs=SEATS)
        self.bounds = Bounds(max_waiting=6)
        self.busy, self.ready = True, True

    @property
    def room(self) -> bool:
        return self.bounds.room(len(self.scheduler.waiting))

    def add(self, request) -> None:
        self.bounds.check_room(len(self.scheduler.waiting))
        self.scheduler.waiting.append(request)

    def abort(self, request, reason: str = "abort") -> None:
        self.log.append(f"abort {self.name}")
        self.scheduler.waiting.remove(request)

    def collect(self) -> list:
        self.log.append(f"read {self.name}")
        done, self.scheduler.waiting = self.scheduler.waiting[:1], self.scheduler.waiting[1:]
        return [SimpleNamespace(request=one) for one in done]

    def dispatch(self) -> None:
        self.log.append(f"dispatch {self.name}")
        self.ready = False

    def remember(self, tokens: list[int]) -> None:
        """These tokens were computed here: full pages are cached."""
        table: list[int] = []
        chain = Chain()
        self.pages.renew(chain)
        assert self.pages.claim(table, [], len(tokens))
        self.pages.register(table, chain, tokens, len(tokens))
        self.pages.release(table, chain)


class Asked:
    """A request, as far as routing looks at it."""

    carried, cache_salt, finished = None, None, False

    def __init__(self, *prompt: int):
        self.prompt_ids = list(prompt)


def fakes(count: int = 2) -> tuple[Replicas, list[Fake], list[str]]:
    log: list[str] = []
    engines = [Fake("ABC"[place], log) for place in range(count)]
    return Replicas(engines), engines, log  # type: ignore[arg-type]


def test_no_replica_waits_for_another():
    replicas, (_, b), log = fakes()
    replicas.step()
    assert log == ["read A", "read B", "dispatch A", "dispatch B"]
    for _ in range(3):  # A has a long step: B goes on
        log.clear()
        b.ready = True
        replicas.step()
        assert log == ["read B", "dispatch B"]
    log.clear()
    b.busy = False  # B has nothing to do: A is read, however long that takes
    replicas.step()
    assert log == ["read A", "read B", "dispatch A", "dispatch B"]


def test_requests_go_where_they_are_done_first():
    replicas, (a, b), _ = fakes()
    for expected in (a, b, a, b):  # equal prompts in turn, the first first
        request = Asked(*range(8))
        assert replicas.route(request) == (expected, 8)
        replicas.add(request)
    replicas.add(long := Asked(*range(100, 160)))
    assert long in a.scheduler.waiting
    for _ in range(
        3
    ):  # the 60 tokens of the long one weigh as much as 15 sequences, or 8 prompts of 8 with theirs
        replicas.add(short := Asked(*range(8)))
        assert short in b.scheduler.waiting
    replicas.abort(long)
    assert long not in a.scheduler.waiting


def test_a_cached_prefix_attracts_and_load_outweighs_it():
    replicas, (a, b), _ = fakes()
    text = list(range(41))
    b.remember(text)
    assert replicas.route(Asked(*text)) == (b, 1)
    assert replicas.route(Asked(*text[:20], 7)) == (b, 1)
    assert replicas.route(Asked(99, *text)) == (a, 42)
    b.scheduler.running = [None] * 9  # 9 x 64 is less than what 40 tokens save, 40 x 16
    assert replicas.route(Asked(*text)) == (b, 1)
    b.scheduler.running = [None] * 10  # as much: a tie goes to the first
    assert replicas.route(Asked(*text)) == (a, 41)
    assert replicas.route(Asked(1 << 40, 3)) == (a, 2)  # the engine says what is wrong with it


def test_a_free_seat_comes_before_a_cached_prefix():
    replicas, (a, b), _ = fakes()
    text = list(range(201))
    b.remember(text)
    b.scheduler.running = [None] * (SEATS - 1)
    assert replicas.route(Asked(*text)) == (b, 1)
    b.scheduler.running = [None] * SEATS
    assert replicas.route(Asked(*text)) == (a, 201)
    a.scheduler.running = [None] * SEATS
    assert replicas.route(Asked(*text)) == (b, 1)


def test_a_full_queue_is_asked_last():
    replicas, (a, b), _ = fakes()
    a.scheduler.waiting = [None] * 6
    b.scheduler.running = [None] * 50
    assert replicas.route(Asked(1)) == (b, 1) and replicas.room
    b.scheduler.waiting = [None] * 6
    assert not replicas.room
    with pytest.raises(ValueError, match="6 sequences wait already"):
        replicas.add(Asked(1))


def test_prompts_weigh_until_they_have_a_token():
    replicas, (a, b), _ = fakes()
    replicas.add(Asked(*range(50)))
    assert replicas.route(Asked(1))[0] is b
    a.ready = True
    replicas.step()
    assert replicas.route(Asked(1))[0] is a


def test_replicas_generate_what_one_engine_does():
    """Greedy against the plain model and seeded draws against one engine, preempted in too small pools; swaps,
    searches, segments, errors and telemetry too."""
    shown = run_on(2, "-m", "tokenloom.tests.replicas", "small,2,1", "life")
    assert "same small 2 1" in shown and "life" in shown


def test_replicas_of_several_devices():
    assert "same small 2 2" in run_on(4, "-m", "tokenloom.tests.replicas", "small,2,2")


def test_replicas_that_cannot_be_are_refused():
    config = ALL["llama"]()
    with pytest.raises(
        ValueError, match=r"data_parallel_size=64 times 1 devices a replica is 64, but there are"
    ):
        LLM.from_config(config, 0, data_parallel_size=64, progress=False)
    with pytest.raises(ValueError, match="data_parallel_size=0 must be a whole number of at least 1"):
        LLM.from_config(config, 0, data_parallel_size=0, progress=False)
