"""BatchLLM and Castillo: the prefix tree, what is reused, what is reserved, and what the papers promise."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenloom import LLM, BatchLLM, SarathiServe
from tokenloom.serve.chain import Chain
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.policies.batch_llm import Node, PrefixTree
from tokenloom.serve.scheduler import Scheduler, Sequence
from tokenloom.tests.device import Device
from tokenloom.tests.engines import ROOMY
from tokenloom.tests.shapes import llama


def sequences(texts, output: int = 4) -> list[Sequence]:
    return [Sequence(list(text), len(text) + output) for text in texts]


def device(
    policy, *, num_pages: int, seats: int = 4, budget: int = 32, rows: int = 4, page: int = 4
) -> Device:
    pages = PageAllocator(num_pages, page)
    return Device(Scheduler(pages, max_num_seqs=seats, budget=budget, prompt_rows=rows, policy=policy))


def run(machine: Device, texts: list[Sequence]) -> int:
    """Everything to its end; returns the prompt tokens that were computed, recomputed ones included."""
    computed = 0
    for one in texts:
        machine.scheduler.add(one)
    while machine.scheduler.busy or machine.in_flight:
        work = machine.step()
        computed += sum(chunk.count for chunk in work.chunks) if work else 0
    assert len(machine.done) == len(texts)
    return computed


# -- the prefix tree ---------------------------------------------------------------------------------------

small_texts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple), min_size=1, max_size=6)


def _shared(a: tuple, b: tuple, block: int) -> int:
    """Blocks that two texts share, their last tokens left out."""
    whole = min(len(a) - 1, len(b) - 1) // block * block
    return sum(a[: at + block] == b[: at + block] for at in range(0, whole, block))


@settings(max_examples=150, deadline=None)
@given(small_texts, st.integers(1, 2))
def test_the_tree_holds_each_text_once_and_branches_where_they_part(texts, block):
    waiting = sequences(texts)
    tree = PrefixTree(waiting, block)
    assert sorted(map(id, (m for node in tree.nodes for m in node.members))) == sorted(map(id, waiting))
    assert tree.root.alive == len(texts)
    for a, b in itertools.combinations(waiting, 2):
        paths = [_path(tree.node_of[one]) for one in (a, b)]
        common = [node.depth for node in paths[0] if node in paths[1]]
        assert max(common) == _shared(tuple(a.tokens), tuple(b.tokens), block)
    for node in tree.nodes[1:]:
        assert node.depth > node.parent.depth and (len(node.children) > 1 or node.members)


def _path(node: Node) -> list[Node]:
    return [] if node is None else [*_path(node.parent), node]


@settings(max_examples=150, deadline=None)
@given(small_texts, st.integers(1, 2))
def test_flattening_reuses_what_the_best_choice_of_one_level_does(texts, block):
    """Brute force: every set of prefixes of the texts, each text under the longest one that it begins with."""
    waiting = sequences(texts)
    groups = PrefixTree(waiting, block).flatten()
    assert sorted(map(id, (m for group in groups for m in group.members))) == sorted(map(id, waiting))
    reuse = 0
    for group in groups:
        assert len({tuple(member.tokens[: group.prefix]) for member in group.members}) == 1
        assert all(group.prefix < len(member.tokens) for member in group.members)
        reuse += (len(group.members) - 1) * group.prefix
    prefixes = sorted(
        {text[:at] for text in texts for at in range(block, (len(text) - 1) // block * block + 1, block)}
    )
    if len(prefixes) <= 10:
        best = 0
        for chosen in itertools.product((False, True), repeat=len(prefixes)):
            opened = [prefix for prefix, taken in zip(prefixes, chosen) if taken]
            depths = [
                max((len(p) for p in opened if len(text) > len(p) and text[: len(p)] == p), default=0)
                for text in texts
            ]
            best = max(best, sum(depths) - sum(map(len, opened)))
        assert reuse == best
    assert sum(group.prefill for group in groups) == sum(map(len, texts)) - reuse


def test_a_grandchild_is_promoted_when_that_saves_more_than_its_parent_costs():
    """The paper's rule on one chain: (L(g) - 1) t(g) > t(c)."""
    c, short, long = [1] * 8, [2] * 2, [2] * 3
    for grandchild, groups in ((short, [8]), (long, [8, 11])):
        texts = [[*c, 9 + i, 0] for i in range(2)] + [[*c, *grandchild, 5 + i] for i in range(4)]
        flat = PrefixTree(sequences(texts), 1).flatten()
        assert sorted(group.prefix for group in flat) == groups


def test_other_roots_share_nothing():
    waiting = sequences([[1] * 9] * 4)
    for one in waiting[2:]:
        one.chain = Chain((None, "mine"))
    assert sorted(len(group.members) for group in PrefixTree(waiting, 4).flatten()) == [2, 2]


# -- BatchLLM ----------------------------------------------------------------------------------------------


def job(prefixes: int, each: int, shared: int, suffix: int, output: int) -> list[Sequence]:
    """`each` requests of every prefix, in an order that a seed shuffled."""
    draw = random.Random(0)
    heads = [[draw.randrange(1000) for _ in range(shared)] for _ in range(prefixes)]
    texts = [head + [draw.randrange(1000) for _ in range(suffix)] for head in heads for _ in range(each)]
    draw.shuffle(texts)
    return sequences(texts, output)


def test_each_prefix_is_computed_once_and_first_come_computes_them_again_and_again():
    """8 prefixes of 128 tokens, 8 requests each, a pool for 3 prefixes and what running needs."""
    sizes = dict(num_pages=1 + 3 * 32 + 4 * 8, seats=4, budget=32)
    requests = job(8, 8, 128, 16, 12)
    planned = run(device(BatchLLM(), **sizes), requests)
    assert planned == 8 * 128 + 64 * 16
    tree = PrefixTree(job(8, 8, 128, 16, 12), 4)
    assert planned == sum(group.prefill for group in tree.flatten())
    assert run(device(SarathiServe(), **sizes), job(8, 8, 128, 16, 12)) >= 1.3 * planned


def test_groups_that_decode_much_for_their_prompts_come_first_and_whole():
    light, heavy = [1] * 16, [2] * 16
    requests = [Sequence([*light, i], 20) for i in range(5)] + [Sequence([*heavy, i], 60) for i in range(5)]
    random.Random(1).shuffle(requests)
    machine, started = device(BatchLLM(), num_pages=200, seats=3), []
    for one in requests:
        machine.scheduler.add(one)
    while machine.scheduler.busy:
        work = machine.step()
        started += [one.tokens[0] for one in work.admitted] if work else []
    assert started == [2] * 5 + [1] * 5
    assert run(device(BatchLLM(expected=lambda one: 2 - one.tokens[0]), num_pages=200), requests[:0]) == 0


def test_a_group_s_pages_are_next_to_go_when_its_last_member_ends():
    """Its prefix is evictable and comes before the pages of a text that was last used long ago."""
    machine = device(BatchLLM(), num_pages=60, seats=2)
    pages, old = machine.scheduler.pages, Sequence([7] * 17, 18)
    run(machine, [old])
    kept = [key for key in old.chain.keys if key in pages._page_of]
    pages._idle = type(pages._idle).fromkeys(sorted(pages._idle))  # as if an earlier job had left them
    members = sequences([[1] * 16 + [i] * 5 for i in range(4)])
    for one in members:
        machine.scheduler.add(one)
    prefix, seen = None, False
    while machine.scheduler.busy or machine.in_flight:
        machine.step()
        prefix = prefix or next((one.pages[:4] for one in machine.scheduler.running), None)
        unfinished = [one for one in members if not one.finished]
        if prefix and len(unfinished) in (1, 2, 3) and any(one.seat >= 0 for one in unfinished):
            seen = True
            assert all(pages._owners[page] for page in prefix)
    assert seen and not any(pages._owners[page] for page in prefix)
    order = list(pages._idle)
    assert max(order.index(page) for page in prefix) < min(order.index(pages._page_of[key]) for key in kept)


def test_a_prefix_that_another_group_begins_with_is_kept():
    """Two levels: the outer group ends first, and the inner one still finds the blocks of both."""
    outer, inner = [1] * 16, [1] * 16 + [2] * 16
    texts = [[*outer, 3, i] for i in range(4)] + [[*inner, 4, i] for i in range(4)]
    requests = [Sequence(text, len(text) + (40 if len(text) < 20 else 2)) for text in texts]
    assert run(device(BatchLLM(), num_pages=40, seats=2), requests) <= 32 + 8 * 4


def test_a_preempted_member_leaves_the_prefix_to_the_others():
    machine = device(BatchLLM(), num_pages=200, seats=3)
    members = sequences([[1] * 16 + [i] * 5 for i in range(3)], 12)
    for one in members:
        machine.scheduler.add(one)
    while len(machine.scheduler.running) < 3:
        machine.step()
    prefix, pages = list(members[0].pages[:4]), machine.scheduler.pages
    assert [pages._owners[page] for page in prefix] == [3] * 4
    machine.scheduler.preempt(machine.scheduler.running[-1])
    assert [pages._owners[page] for page in prefix] == [2] * 4
    machine.drain()
    assert len(machine.done) == 3


@pytest.mark.parametrize("members", [1, 5])
def test_a_pool_just_large_enough_for_the_largest_member_suffices(members):
    requests = sequences([[1] * 16 + [i] * (3 + i) for i in range(members)], 6)
    largest = max(one.limit for one in requests)
    machine = device(BatchLLM(), num_pages=1 + -(-largest // 4), seats=4)
    run(machine, requests)


def test_latecomers_wait_for_the_next_plan_and_nobody_starves():
    """Groups that decode much keep coming; one request that only prefills gets its turn."""
    machine = device(BatchLLM(), num_pages=300, seats=1, budget=64)
    poor = Sequence([9] * 60, 61)
    machine.scheduler.add(Sequence([8] * 4, 30))
    machine.step()
    machine.scheduler.add(poor)
    for number in range(400):
        machine.scheduler.add(Sequence([number] * 4, 14))
        for _ in range(6):
            machine.step()
        if poor.finished:
            break
    assert poor.finished and number < 100


def test_without_a_prefix_cache_it_is_refused():
    words = r"prefix cache is off \(prefix_cache=False\).*leave prefix_cache=None"
    with pytest.raises(ValueError, match=words):
        LLM.from_config(llama(), progress=False, prefix_cache=False, policy=BatchLLM(), **ROOMY)
    with pytest.raises(ValueError, match="threshold=0 must be a share"):
        BatchLLM(threshold=0)
