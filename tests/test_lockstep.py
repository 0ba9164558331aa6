"""Parts of a search in lock-step by themselves: the choice on the device, forks of page tables, copies of pages."""

import random
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom.attention.caches.paged import PagedKV
from tokenloom.serve.gang import Gang, common
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.scheduler import Sequence
from tokenloom.serve.search.lockstep import ENDS, Chosen, Given, choose, copy_pages

# -- the choice ----------------------------------------------------------------------------------------------


def direct(logp, score, live, diversity, ends, size):
    """The choice of all groups over sorted lists: (parent, token, objective) of the next beams, and of the ends."""
    counts, going, over = Counter(), [], []
    for g, alive in enumerate(live):
        rows = range(g * size, (g + 1) * size)
        every = [
            (score[b] + logp[b, v] - diversity * counts[v], b, v) for b in rows for v in range(logp.shape[1])
        ]
        every = sorted((one for one in every if one[0] > -np.inf), key=lambda one: (-one[0], one[1], one[2]))
        ended = [one for one in every[:size] if one[2] in ends]
        next_ = [one for one in every if one[2] not in ends][:size]
        counts.update([v for _, _, v in ended + next_] if alive else [])
        going += next_ + [None] * (size - len(next_))
        over += ended
    return going, over


@pytest.mark.parametrize("K,G", [(4, 1), (6, 3), (6, 2)])
def test_the_choice_equals_sorted_lists(K, G):
    """Five tokens, so beams outnumber them; some beams do not exist yet, some groups are done, some tokens are
    banned."""
    draw, run = np.random.default_rng(K * G), jax.jit(choose)
    for _ in range(60):
        logp = np.log(draw.dirichlet(np.ones(5), K)).astype(np.float32)
        logp[draw.random((K, 5)) < 0.2] = -np.inf
        score = np.where(draw.random(K) < 0.3, -np.inf, -draw.random(K) * 5).astype(np.float32)
        live, ends = draw.random(G) < 0.7, set(draw.choice(5, draw.integers(0, 3), replace=False).tolist())
        diversity = np.float32(draw.choice([0.0, 0.7, 50.0]))
        padded = np.array([*ends, *[5] * (ENDS - len(ends))], np.int32)
        given = Given(np.arange(K, dtype=np.int32), score, np.zeros(K, np.float32), live, diversity, padded)
        chosen = Chosen.of(run(jnp.asarray(logp), given))
        going, over = direct(logp.astype(float), score.astype(float), live, float(diversity), ends, K // G)
        for place, one in enumerate(going):
            if one is None:
                assert chosen.score[0, place] == -np.inf
                continue
            assert (chosen.parent[0, place], chosen.token[0, place]) == one[1:]
            assert chosen.score[0, place] == pytest.approx(one[0], abs=1e-4)
            assert chosen.own[0, place] == logp[one[1:]]
        ended = [place for place in range(K) if chosen.score[1, place] > -np.inf]
        assert [(chosen.parent[1, at], chosen.token[1, at]) for at in ended] == [one[1:] for one in over]


# -- forks ---------------------------------------------------------------------------------------------------


class Forks(Gang):
    """Memory only."""

    form = prepare = select = read = conclude = lambda *given: None  # type: ignore[assignment]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_forks_share_full_pages_and_copy_the_last(size, width):
    """A pool in memory: after any permutation each table holds its member's text, nobody writes into a shared page,
    owners count tables, and the pool never needs more than `longest` says."""
    draw = random.Random(size * width)
    pages = PageAllocator(1 + 12 * width, size)
    for _ in range(20):
        prompt = [draw.randrange(9) for _ in range(draw.randint(1, 3 * size))]
        gang, memory = Forks(width), {}
        gang.members = [Sequence(list(prompt), 99, gang=gang) for _ in range(width)]
        assert pages.claim(gang.members[0].pages, [], len(prompt)) and gang.join(pages)

        def write(member, upto, memory=memory):
            for at in range(member.computed, upto):
                page = member.pages[at // size]
                assert pages._owners[page] == 1
                memory[page, at % size] = member.tokens[at]
            member.computed = upto

        def copy(gang=gang, memory=memory):
            moved = [
                (target, slot, memory.get((source, slot)))
                for source, target in gang.copies
                for slot in range(size)
            ]
            memory.update({(target, slot): token for target, slot, token in moved})
            gang.copies.clear()

        write_prompt = len(prompt) - 1
        for at in range(write_prompt):
            memory[gang.members[0].pages[at // size], at % size] = prompt[at]
        gang.members[0].computed = write_prompt
        assert all(gang.begin(one, size) and one.computed == write_prompt for one in gang.members)
        while len(gang.members[0].tokens) < gang.longest(len(prompt), pages):
            copy()
            for one in gang.members:
                assert pages.grow(one.pages, len(one.tokens))
                write(one, len(one.tokens))
            parents = [draw.randrange(width) for _ in range(width)]
            texts = [[*gang.members[parent].tokens, place] for place, parent in enumerate(parents)]
            gang.fork(parents, range(width), pages)
            assert [one.tokens for one in gang.members] == texts
            copy()
            for one in gang.members:
                stored = [memory[one.pages[at // size], at % size] for at in range(one.computed)]
                assert stored == one.tokens[:-1]
            held = Counter(page for one in gang.members for page in one.pages)
            assert all(pages._owners[page] == count for page, count in held.items())
        for one in gang.members:
            pages.release(one.pages)
        assert pages.free == pages.num_pages - 1


@pytest.mark.parametrize("layers", [1, 3])
def test_pages_are_copied_in_every_layer(layers):
    """Layers that share arrays too; the null page is copied to itself."""
    entry = PagedKV.empty(5, 4, 2, 8, jnp.dtype("int8"), layers=layers)
    draw = np.random.default_rng(layers)
    entry = jax.tree.map(lambda a: jnp.asarray(draw.integers(-99, 99, a.shape), a.dtype), entry)
    pairs = jnp.array([[3, 1, 0, 0], [2, 4, 0, 0]])
    (copied,) = jax.jit(partial(copy_pages, layers=(layers,)))((entry,), *pairs)
    for before, after in zip(jax.tree.leaves(entry), jax.tree.leaves(copied), strict=True):
        wanted = np.array(before).reshape(layers, 5, -1)
        wanted[:, 2], wanted[:, 4] = wanted[:, 3], wanted[:, 1]
        assert (np.asarray(after).reshape(layers, 5, -1) == wanted).all()


def test_common_beginnings():
    assert [common([1, 2, 3], other) for other in ([1, 2, 3], [1, 2], [], [2, 2, 3], [1, 2, 4, 4])] == [
        3,
        2,
        0,
        0,
        2,
    ]
