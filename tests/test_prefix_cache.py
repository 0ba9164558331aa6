"""The prefix cache: cached = uncached, nothing is shared that must not be, nothing is lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tokenloom import LLM, SamplingParams
from tokenloom.serve.chain import Chain
from tokenloom.serve.pages import NULL_PAGE, PageAllocator
from tokenloom.serve.scheduler import Scheduler
from tokenloom.serve.snapshots import Snapshots
from tokenloom.tests.device import Device, sequence
from tokenloom.tests.engines import ROOMY, TOLERANCE, check_against_whole, engine, greedy, prompts
from tokenloom.tests.shapes import ALL, llama

PAGE = 2
SHAPES = pytest.mark.parametrize("shape", sorted(ALL))


# -- the allocator alone -----------------------------------------------------------------------------------


class Allocator(RuleBasedStateMachine):
    """Tables come, fill their pages and go; the model remembers what every page holds and when it was used."""

    def __init__(self):
        super().__init__()
        self.pages = PageAllocator(9, PAGE)
        self.tables: list[tuple[list[int], Chain, list[int]]] = []
        self.contents: dict[int, tuple] = {}  # page -> (version, salt, the text up to its end)
        self.parents: dict[bytes, bytes | None] = {}
        self.used: dict[bytes, int] = {}
        self.clock = 0

    @rule(
        length=st.integers(1, 9), parts=st.integers(0, 9), salt=st.sampled_from([None, None, "a"]),
        lookup=st.booleans(), stored=st.integers(0, 9),
    )  # fmt: skip
    def begin(self, length, parts, salt, lookup, stored):
        text = [int(at >= parts) for at in range(length)]
        chain, table, pages = Chain((None, salt)), [], self.pages
        pages.renew(chain)
        hits = pages.lookup(chain, text) if lookup else []
        assert len(hits) * PAGE < len(text)
        for index, page in enumerate(hits):
            assert self.contents[page] == self._name(chain, text, index)
        before, free = dict(pages._key_of), pages.free
        idle = [page for page in hits if not pages._owners[page]]
        fits = pages.pages_for(len(text)) - len(hits) <= free - len(idle)
        assert pages.claim(table, hits, len(text)) == fits
        if not fits:
            assert not table and pages.free == free and pages._key_of == before
            return
        assert table[: len(hits)] == hits and len(table) == pages.pages_for(len(text))
        chain.registered = len(hits)
        self._evicted(before, table[len(hits) :])
        self.tables.append((table, chain, text))
        self._store(table, chain, text, len(hits), max(min(stored, len(text)), len(hits) * PAGE))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), token=st.integers(0, 1), count=st.integers(1, 3))
    def go_on(self, which, token, count):
        table, chain, text = self.tables[which % len(self.tables)]
        before, had = dict(self.pages._key_of), len(table)
        if self.pages.grow(table, len(text) + count):
            self._evicted(before, table[had:])
            text.extend([token] * count)
            self._store(table, chain, text, chain.registered, len(text))

    def _evicted(self, before, fresh):
        pages = self.pages
        kept = [key for page, key in pages._key_of.items() if not pages._owners[page]]
        for key in (before[page] for page in fresh if page in before):
            assert all(self.used[key] < self.used[other] for other in kept), "not the least recently used"

    def _store(self, table, chain, text, have, stored):
        for index in range(have, stored // PAGE):
            self.contents[table[index]] = self._name(chain, text, index)
        self.pages.register(table, chain, text, stored)
        for index, key in enumerate(chain.keys):
            self.parents[key] = chain.keys[index - 1] if index else None

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def end(self, which):
        table, chain, _ = self.tables.pop(which % len(self.tables))
        for key in reversed(chain.keys[: chain.registered]):
            self.clock += 1
            self.used[key] = self.clock
        self.pages.release(table, chain)
        assert table == []

    @rule()
    def new_weights(self):
        owned = {page for table, _, _ in self.tables for page in table}
        self.pages.new_weights()
        assert self.pages.cached == 0 and self.pages.free == self.pages.num_pages - 1 - len(owned)

    @staticmethod
    def _name(chain, text, index):
        return chain.version, chain.root, tuple(text[: (index + 1) * PAGE])

    @invariant()
    def owners_are_counted_and_nothing_is_lost(self):
        pages, held = self.pages, {}
        for table, _, _ in self.tables:
            assert NULL_PAGE not in table and len(set(table)) == len(table)
            for page in table:
                held[page] = held.get(page, 0) + 1
        assert all(pages._owners[page] == held.get(page, 0) for page in range(pages.num_pages))
        free = [*pages._blank, *pages._idle]
        assert len(set(free)) == len(free) == pages.free and set(free).isdisjoint(held)
        assert len(free) + len(held) + 1 == pages.num_pages

    @invariant()
    def tables_share_only_equal_text(self):
        for table, chain, text in self.tables:
            for index in range(chain.registered):
                assert self.contents[table[index]] == self._name(chain, text, index)

    @invariant()
    def leaves_go_before_their_prefixes(self):
        pages = self.pages
        assert {page: key for key, page in pages._page_of.items()} == pages._key_of
        for page in pages._idle:
            parent = self.parents[pages._key_of[page]]
            assert parent is None or parent in pages._page_of


TestAllocator = Allocator.TestCase
TestAllocator.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_without_sharing_pages_are_owned_once_and_come_back(actions):
    pages = PageAllocator(12, 4, off="not wanted here")
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
        assert pages.free + len(held) + 1 == pages.num_pages and pages.cached == 0


def test_a_pool_without_pages_is_refused():
    with pytest.raises(ValueError, match="at least 2 pages"):
        PageAllocator(1, 4)


# -- the scheduler on a device without arrays --------------------------------------------------------------


def _device(kind: str, budget: int = 64) -> Device:
    snapshots = Snapshots(8, 4) if kind == "snapshots" else None
    pages = PageAllocator(200, 4, snapshots=snapshots)
    return Device(Scheduler(pages, max_num_seqs=4, budget=budget, prompt_rows=4))


def _run(device: Device, *sequences):
    for one in sequences:
        device.scheduler.add(one)
    device.drain()
    return [one.cached for one in sequences]


KINDS = pytest.mark.parametrize("kind", ["pages", "snapshots"])


@KINDS
def test_a_repeated_prompt_computes_its_last_block_only(kind):
    device, text = _device(kind), list(range(21))
    assert _run(device, sequence(text[:], 25)) == [0]
    assert _run(device, sequence(text[:], 25)) == [20]
    assert _run(device, sequence(text[:], 25, salt="mine")) == [0]
    pages = device.scheduler.pages
    assert (pages.lookup_tokens, pages.hit_tokens) == (63, 20)
    # One token less, and the last page must be computed; of recurrent state there was no copy so early.
    shorter = [_run(device, sequence(text[:20], 25))[0] for _ in range(2)]
    assert shorter == [16 if kind == "pages" else 0, 16]


@KINDS
def test_samples_of_one_prompt_share_it_even_when_they_start_together(kind):
    device, text = _device(kind), list(range(40))
    assert _run(device, *(sequence(text[:], 45) for _ in range(4))) == [0, 36, 36, 36]


@KINDS
def test_a_chat_goes_on_behind_what_it_generated(kind):
    """The second turn's prompt holds the first answer: all its full blocks are found."""
    device = _device(kind)
    first = sequence(list(range(10)), 31)
    _run(device, first)
    assert _run(device, sequence(first.tokens + [5] * 7, 40)) == [28]


@KINDS
def test_a_preempted_sequence_finds_its_own_blocks(kind):
    device = _device(kind)
    one = sequence(list(range(10)), 40)
    device.scheduler.add(one)
    for _ in range(14):
        device.step()
    length = len(one.tokens)
    device.scheduler.preempt(one)
    work = device.step()
    assert [chunk.start for chunk in work.chunks] == [(length - 1) // 4 * 4]
    device.drain()
    assert len(one.tokens) == 40


def test_a_branch_is_copied_when_it_is_seen_again():
    """Three prompts share 21 tokens: the second makes the copy at the branch, the third begins there."""
    device = _device("snapshots")
    shared = list(range(21))
    hits = [_run(device, sequence([*shared, *[50 + i] * 12], 36))[0] for i in range(3)]
    assert hits == [0, 0, 20]


def test_a_long_prompt_does_not_flush_the_copies():
    """Chunk ends are a trail: of a prompt of many chunks two copies stay, at most."""
    device = _device("snapshots", budget=8)
    _run(device, sequence(list(range(20)), 22))
    held = device.scheduler.pages.snapshots
    before = len(held._slot_of)
    _run(device, sequence([9] * 200, 202))
    assert len(held._slot_of) <= before + 2
    assert _run(device, sequence(list(range(20)), 22)) == [16]


# -- the engine --------------------------------------------------------------------------------------------


@SHAPES
def test_cached_equals_uncached(shape):
    """A pool that evicts and preempts, prompts that share their beginnings, repeat and grow into chats."""
    llm = engine(shape, tight=True)
    pages, hits = llm.engine.pages, llm.engine.pages.hit_tokens
    base = prompts(3, 21, longest=60)
    system = [7] * 3 + prompts(1, 22)[0][:30]
    turns = [system + text for text in base] + [system + base[0], *base]
    for _ in range(3):
        outputs = llm.generate(turns, greedy(12))
        for output in outputs:
            check_against_whole(shape, output)
        turns = [[*o.prompt_token_ids, *o.outputs[0].token_ids, 1, 2, 3] for o in outputs[:4]] + base
    last = llm.generate(turns, greedy(2))
    assert max(output.num_cached_tokens for output in last) >= 40
    assert pages.hit_tokens - hits > 300
    assert pages.free == pages.num_pages - 1 and not any(pages._owners)
    assert llm.engine.programs.compilations.late == 0


def test_prompt_scores_need_every_row_and_register():
    llm = engine("llama")
    text = [5, *prompts(1, 23)[0][:50]]
    scored = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0, n=2)
    for _ in range(2):
        output = llm.generate(text, scored)[0]
        assert output.num_cached_tokens == 0 and all(output.prompt_logprobs[1:])
    assert llm.generate(text, greedy(2))[0].num_cached_tokens == (len(text) - 1) // 16 * 16


def test_salts_reset_and_counts():
    llm = engine("llama")
    text = prompts(1, 24)[0] * 3
    text = text[:65]

    def cached(**more):
        return llm.generate({"prompt_token_ids": text, **more}, greedy(2))[0].num_cached_tokens

    llm.reset_prefix_cache()
    pages = llm.engine.pages
    looked, hit = pages.lookup_tokens, pages.hit_tokens
    assert [cached(), cached(), cached(cache_salt="a"), cached(cache_salt="a"), cached()] == [
        0,
        64,
        0,
        64,
        64,
    ]
    assert pages.lookup_tokens - looked == 5 * 65 and pages.hit_tokens - hit == 3 * 64
    llm.reset_prefix_cache()
    assert pages.cached == 0 and cached() == 0
    assert f"prefix cache on ({pages.hit_tokens} of" in repr(llm)
    with pytest.raises(ValueError, match="cache_salt=3 must be a string"):
        cached(cache_salt=3)
    with pytest.raises(ValueError, match="a prompt dict holds"):
        llm.generate({"cache_salt": "a"}, greedy(2))


def test_a_cached_answer_has_the_same_log_probabilities():
    llm = engine("llama")
    text = prompts(1, 25)[0]
    first, second = (llm.generate(text + [9] * 40, greedy(8))[0] for _ in range(2))
    assert first.num_cached_tokens == 0 < second.num_cached_tokens
    for a, b in zip(first.outputs[0].logprobs, second.outputs[0].logprobs):
        (x,), (y,) = ([max(e.values(), key=lambda p: p.logprob).logprob] for e in (a, b))
        assert abs(x - y) <= TOLERANCE


def test_off_and_impossible():
    with LLM.from_config(llama(), progress=False, **{**ROOMY, "max_num_seqs": 1}, prefix_cache=False) as llm:
        text = [1] * 40
        assert [llm.generate(text, greedy(2))[0].num_cached_tokens for _ in range(2)] == [0, 0]
        assert "prefix cache off (prefix_cache=False)" in repr(llm)
    with pytest.raises(ValueError, match="prefix_cache=True cannot hold: a page of 192 tokens"):
        LLM.from_config(llama(), progress=False, page_size=192, prefix_cache=True)
