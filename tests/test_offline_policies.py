"""BatchLLM and Castillo: the prefix tree, what is reused, what is reserved, and what the papers promise."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenloom import LLM, BatchLLM, Castillo, SarathiServe
from tokenloom.serve.chain import Chain
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.policies.batch_llm import Node, PrefixTree
from tokenloom.serve.policies.castillo import Empirical, Survival
from tokenloom.serve.scheduler import Scheduler, Sequence
from tokenloom.tests.device import Device
from tokenloom.tests.engines import ROOMY
from tokenloom.tests.shapes import llama
from tokenloom.tests.simulated import Reserving, simulate


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


# -- Castillo ----------------------------------------------------------------------------------------------


class Constant:
    """Everyone writes as much."""

    def remaining(self, sequence, written, most):
        return float(min(20, most)), 0.0

    def learn(self, sequence, written, complete):
        pass


class Oracle(Constant):
    """Knows what `simulate` will let a sequence write."""

    def remaining(self, sequence, written, most):
        return float(min(sequence.owner - written, most)), 0.0


def outputs(count: int, seed: int, most: int = 120) -> list[Sequence]:
    """Requests whose true lengths (`owner`) are exponential, with mean 30, under a max_tokens of `most`."""
    draw, found = random.Random(seed), []
    for number in range(count):
        prompt = [number] * draw.randint(4, 20)
        found.append(Sequence(prompt, len(prompt) + most, owner=min(1 + int(draw.expovariate(1 / 30)), most)))
    return found


def scheduler(policy, num_pages: int = 500, seats: int = 4) -> Scheduler:
    return Scheduler(PageAllocator(num_pages, 4), max_num_seqs=seats, budget=32, prompt_rows=4, policy=policy)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=30),
    st.integers(0, 12), st.integers(1, 14), st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_survival_is_kaplan_and_meier_s(ended, written, most, prior):
    survival = Survival(prior)
    for length, complete in ended:
        survival.learn(length, complete)
    share = [1.0]  # P(Y > t), from the definition
    for t in range(1, 40):
        risk = prior + sum(length >= t for length, _ in ended)
        dead = sum(length == t and complete for length, complete in ended)
        share.append(share[-1] * (1 - dead / risk) if dead else share[-1])
    if share[written] < 1e-12:
        assert survival.moments(written, most) == (most, 0.0)
        return
    left = [share[written + x] / share[written] for x in range(most + 1)]
    mean = sum(left[:most])
    square = sum((2 * x + 1) * left[x] for x in range(most))
    got = survival.moments(written, most)
    assert got == pytest.approx((mean, max(square - mean * mean, 0)), abs=1e-6)
    assert survival.beyond(written, most) == pytest.approx(left[most], abs=1e-9)
    half = survival.quantile(0.5, written)
    if half <= most:
        assert left[half] <= 0.5 + 1e-9 and (half == 0 or left[half - 1] > 0.5 - 1e-9)


def test_without_data_everyone_uses_all_and_groups_are_told_apart():
    lengths = Empirical(enough=4)
    short, long = Sequence([1], 99, tenant="a"), Sequence([1], 99, tenant="b")
    assert lengths.remaining(short, 0, 50) == (50.0, 0.0)
    for _ in range(32):
        lengths.learn(short, 5, True)
        lengths.learn(long, 40, True)
    assert lengths.remaining(short, 0, 50)[0] < 7 < 35 < lengths.remaining(long, 0, 50)[0]
    new = Sequence([1], 99, tenant="c")
    assert lengths.remaining(new, 0, 50)[0] == pytest.approx(22.5, abs=1)
    assert lengths.remaining(new, 10, 50)[0] > 29, "who wrote 10 tokens is one of the long ones"


def test_a_constant_predictor_is_first_come_step_by_step():
    works = []
    for policy in (SarathiServe(), Castillo(distribution=Constant(), shortest_first=True)):
        works.append(simulate(scheduler(policy), outputs(60, 1)).started)
    assert works[0] == works[1]


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("page", [1, 8])
def test_what_is_reserved_overflows_as_often_as_it_says(quantile, page):
    draw = random.Random(7)

    def length() -> int:
        return 1 + int(draw.expovariate(1 / 60))

    known = Empirical(prior=0.0)
    for _ in range(32 * 200):
        known.learn(Sequence([1], 2), length(), True)
    policy, trials, over = Castillo(quantile, known, horizon=None), 1500, 0
    for _ in range(trials):
        running, grown = [], 0
        while len(running) < 40:
            written, total = draw.randrange(40), length()
            if total <= written:
                continue
            one = Sequence([1] * (draw.randint(1, 30)), 4000)
            policy.add(one)
            one.tokens += [1] * written
            running.append(one)
            grown += -(-(one.known + total - written) // page) - -(-one.known // page)
        over += grown > policy.reserve(running, page)
    expected = 1 - quantile
    # Three times the sampling error, and the skew of a sum of 40 that the normal law leaves out.
    assert abs(over / trials - expected) <= 3 * (expected * (1 - expected) / trials) ** 0.5 + 0.025


def test_an_oracle_s_shortest_first_lowers_the_mean_latency():
    latencies = []
    for policy in (SarathiServe(), Castillo(distribution=Oracle(), shortest_first=True, aging=0.001)):
        latencies.append(simulate(scheduler(policy), outputs(120, 2)).mean_latency)
    assert latencies[1] < 0.8 * latencies[0]


def test_aging_bounds_who_overtakes():
    """Expected lengths differ by 99 tokens at most, and a later arrival weighs 3: at most 33 overtake."""
    long = Sequence([1] * 4, 104, owner=100)
    short = [Sequence([1] * 4, 104, owner=1) for _ in range(80)]
    policy = Castillo(distribution=Oracle(), shortest_first=True, aging=3.0)
    started = simulate(scheduler(policy, seats=1), [long, *short]).started
    assert 25 < started.index(0) <= 33
    endless = Castillo(distribution=Oracle(), shortest_first=True, aging=1e-6)
    assert simulate(scheduler(endless, seats=1), [long, *short]).started[-1] == 0


def test_reserving_a_quantile_preempts_less_than_nothing_and_runs_more_than_everything():
    """Equal pools, lengths far below max_tokens; the distribution is learned on the way."""
    found = {
        name: simulate(scheduler(policy, num_pages=120, seats=16), outputs(300, 3))
        for name, policy in (
            ("nothing", SarathiServe()),
            ("q", Castillo(0.9, horizon=32)),
            ("all", Reserving()),
        )
    }
    assert found["all"].preemptions == 0 < found["nothing"].preemptions
    assert found["q"].preemptions < 0.5 * found["nothing"].preemptions
    assert found["q"].mean_running > 1.3 * found["all"].mean_running


def test_castillo_s_mistakes_are_named():
    for build, words in (
        (lambda: Castillo(1.0), "quantile=1.0 must lie between 0 and 1"),
        (lambda: Castillo(aging=0), "aging=0 must be above 0"),
        (lambda: Castillo(horizon=0), "horizon=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            build()
