"""The sampler against a float64 reference that sorts, and the laws of its processors.

With max_logprobs = V and processed log-probabilities, `top_ids` and `top_logprobs` show the whole distribution
that a token is drawn from, so what is tested is what is sampled from.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tokenloom.serve.sampling.inverse import draw
from tokenloom.serve.sampling.keys import Purpose, row_keys, seed_words, uniform
from tokenloom.serve.sampling.mirostat import Mirostat
from tokenloom.serve.sampling.params import SamplingParams
from tokenloom.serve.sampling.processors import Context, pack_bits, unpack_bits
from tokenloom.serve.sampling.sampler import DEFAULT, Sampler, prompt_logprobs, read
from tokenloom.serve.sampling.truncation import keep_top_k, keep_top_p

N, V, SEATS = 4, 45, 6
EOS = (2,)


@cache
def programs():
    sampler = Sampler(V, SEATS, max_logprobs=V)
    return sampler, jax.jit(sampler.admit), jax.jit(sampler.sample)


def admit_all(requests, state=None):
    """A state with request i, (params, keyword arguments of `row`), at seat i."""
    sampler, admit, _ = programs()
    state = sampler.init() if state is None else state
    for seat, (params, known) in enumerate(requests):
        known = {"prompt_ids": [1, 2, 3], "eos_ids": EOS, "seed": seat, **known}
        state = admit(state, seat, sampler.row(params, **known))
    return state


def step(state, logits, positions, seats=None, live=None):
    rows = len(logits)
    seats = np.arange(rows) if seats is None else np.asarray(seats)
    live = np.ones(rows, bool) if live is None else np.asarray(live)
    logits = jnp.asarray(logits, jnp.float32)
    seats, positions = jnp.asarray(seats, jnp.int32), jnp.asarray(positions, jnp.int32)
    sampled, state = programs()[2](state, logits, seats, positions, jnp.asarray(live))
    return np.asarray(sampled.token), read(np.asarray(sampled.detail)), state


def rows_of(z):
    """z [V] as the N rows of the compiled program."""
    return np.tile(np.asarray(z, np.float32), (N, 1))


def distribution(scores, i):
    """log-probabilities f32[V] of row i by token id."""
    out = np.empty(V, np.float32)
    out[scores.top_ids[i]] = scores.top_logprobs[i]
    return out


def random_logits(seed, rows=N, scale=3.0):
    return (np.random.RandomState(seed).randn(rows, V) * scale).astype(np.float32)


def sorted_truncation(z, top_k=0, top_p=1.0, min_p=0.0):
    """The definition, in float64 with a stable descending sort: (kept bool[V], distance to the nearest edge)."""
    z = z.astype(np.float64)
    ratio = np.exp(z - z.max())
    kept = np.ones(len(z), bool)
    margin = np.inf
    if min_p > 0:
        kept &= ratio >= min_p
        margin = min(margin, np.abs(ratio / min_p - 1).min())
    order = np.argsort(-np.where(kept, z, -np.inf), kind="stable")
    if top_k > 0:
        kept[order[top_k:]] = False
    if top_p < 1:
        mass = np.where(kept, ratio, 0.0)[order]
        before = np.cumsum(mass) - mass
        goal = float(np.float32(top_p)) * mass.sum()
        kept[order[before >= goal]] = False
        margin = min(margin, np.abs(before[1:] / goal - 1).min())
    return kept, margin


TRUNCATIONS = st.fixed_dictionaries(
    {
        "top_k": st.sampled_from([0, 0, 1, 2, 7, 20, V - 1, V, V + 5]),
        "top_p": st.sampled_from([1.0, 1.0, 0.03, 0.31, 0.57, 0.83, 0.989]),
        "min_p": st.sampled_from([0.0, 0.0, 0.013, 0.21, 0.97]),
        "temperature": st.sampled_from([0.5, 1.0, 2.0]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 6, 24]), st.lists(TRUNCATIONS, min_size=N, max_size=N))
def test_kept_set_is_that_of_the_sorted_definition(seed, levels, choices):
    """Logits on a coarse grid, so that edges fall inside groups of equal tokens."""
    z = (np.random.RandomState(seed).randint(-levels, levels, (N, V)) / 2).astype(np.float32)
    asks = {"logprobs": 20, "logprobs_mode": "processed"}
    state = admit_all([(SamplingParams(**choice, **asks), {}) for choice in choices])
    token, scores, _ = step(state, z, [3] * N)
    for i, choice in enumerate(choices):
        choice = dict(choice)
        scaled = z[i] / choice.pop("temperature")
        kept, margin = sorted_truncation(scaled, **choice)
        if margin < 1e-5:
            continue
        found = distribution(scores, i)
        np.testing.assert_array_equal(np.isfinite(found), kept)
        exact = scaled[kept].astype(np.float64)
        np.testing.assert_allclose(found[kept], exact - np.log(np.exp(exact).sum()), atol=3e-6)
        assert kept[token[i]]
        assert np.isclose(scores.logprob[i], found[token[i]])


WIDE = 4099


@cache
def wide_cuts():
    return jax.jit(keep_top_k), jax.jit(keep_top_p)


@pytest.mark.parametrize("name", ["normal", "peaked", "flat", "huge", "tiny", "one", "pairs", "masked"])
def test_thresholds_on_wide_rows_of_every_shape(name):
    noise = np.random.RandomState(5).randn(6, WIDE).astype(np.float32)
    rows = {
        "normal": noise * 3,
        "peaked": noise * 0.01 + 20 * (np.arange(WIDE) == 77),
        "flat": noise * 0,
        "huge": noise * 1e30,
        "tiny": noise * 1e-7,
        "one": np.where(np.arange(WIDE) == 4098, noise, -np.inf),
        "pairs": np.round(noise * 8) / 8,
        "masked": np.where(np.random.RandomState(6).rand(6, WIDE) < 0.9, -np.inf, noise),
    }[name].astype(np.float32)
    ks = np.array([1, 2, 50, 1000, WIDE - 1, 0], np.int32)
    ps = np.array([1e-6, 0.137, 0.511, 0.903, 0.9931, 1.0], np.float32)
    top_k, top_p = (np.asarray(cut(rows, x)) for cut, x in zip(wide_cuts(), (ks, ps), strict=True))
    checked = 0
    for i in range(6):
        kept, _ = sorted_truncation(rows[i], top_k=int(ks[i]))
        np.testing.assert_array_equal(top_k[i], np.where(kept, rows[i], -np.inf))
        kept, margin = sorted_truncation(rows[i], top_p=float(ps[i]))
        if margin > 3e-6:
            np.testing.assert_array_equal(top_p[i], np.where(kept, rows[i], -np.inf))
            checked += 1
    assert checked >= 3


def test_equal_zeros_of_either_sign_are_ties():
    z = np.full((6, WIDE), -1.0, np.float32)
    z[:, 1000:1004] = [-0.0, 0.0, -0.0, 0.0]
    kept = np.isfinite(wide_cuts()[0](z, np.full(6, 2, np.int32)))
    np.testing.assert_array_equal(np.flatnonzero(kept[5]), [1000, 1001])


# Drawing


T, WIDTH = 12_000, 300


@cache
def uniforms(seed):
    """f64[T]: the uniform numbers of T positions."""
    words, zeros = jnp.tile(seed_words(seed), (T, 1)), jnp.zeros(T, jnp.int32)
    numbers = jax.jit(lambda words, i, t: uniform(row_keys(words, i, t, Purpose.SAMPLE)))
    return np.asarray(numbers(words, zeros, jnp.arange(T, dtype=jnp.int32)), np.float64)


@cache
def draws():
    return jax.jit(lambda z, u: draw(z, u, jnp.full(len(u), -7)))


def drawn(z, u):
    """Tokens i32[n] from z [WIDTH] or [n, WIDTH] at u [n], by a program of T rows."""
    rows = np.broadcast_to(z, (len(u), WIDTH)).astype(np.float32)
    blocks = []
    for start in range(0, len(u), T):
        block, at = rows[start : start + T], u[start : start + T]
        pad = T - len(at)
        tokens = draws()(np.pad(block, ((0, pad), (0, 0))), np.pad(at, (0, pad)).astype(np.float32))
        blocks.append(np.asarray(tokens)[: len(at)])
    return np.concatenate(blocks)


def test_draws_follow_the_distribution():
    """Chi-square over 12,000 positions, for three seeds and a row that spans blocks of the inverse."""
    z = np.random.RandomState(1).randn(WIDTH).astype(np.float32) * 1.5
    z[::7] = -np.inf
    probability = np.exp(z.astype(np.float64))
    probability /= probability.sum()
    for seed in (0, 1, 2**40 + 3):
        counts = np.bincount(drawn(z, uniforms(seed)), minlength=WIDTH)
        assert not counts[::7].any()
        common = probability * T >= 5
        observed = np.append(counts[common], counts[~common].sum())
        expected = np.append(probability[common], probability[~common].sum()) * T
        assert chisquare(observed, expected).pvalue > 1e-3


def test_sampled_tokens_follow_the_truncated_distribution():
    """The whole sampler, 4 rows x 500 steps, with temperature, top-k and top-p."""
    z = random_logits(3)[0]
    params = SamplingParams(temperature=0.5, top_k=12, top_p=0.9)
    scaled = z / np.float32(0.5)
    kept, _ = sorted_truncation(scaled, top_k=12, top_p=0.9)
    probability = np.where(kept, np.exp(scaled.astype(np.float64) - scaled.max()), 0)
    probability /= probability.sum()
    state = admit_all([(params, {"seed": 10 + i}) for i in range(N)])
    tokens = []
    for position in range(3, 503):
        token, _, state = step(state, rows_of(z), [position] * N)
        tokens.extend(token)
    counts = np.bincount(tokens, minlength=V)
    assert not counts[~kept].any()
    assert chisquare(counts[kept], probability[kept] * len(tokens)).pvalue > 1e-3


def test_a_token_of_probability_zero_is_never_drawn():
    """At every edge of the unit interval and of the cumulative sums, for rows with zeros in awkward places."""
    random = np.random.RandomState(0)
    rows = np.full((40, WIDTH), -np.inf, np.float32)
    for i in range(20):
        rows[i, random.choice(WIDTH, 1 + i % 5, replace=False)] = random.randn(1 + i % 5) * 4
    for i in range(10):
        rows[20 + i, : 1 + 29 * i] = random.randn(1 + 29 * i)
        rows[30 + i, -1 - 29 * i :] = random.randn(1 + 29 * i) * 20
    last = 1 - 2**-24
    us = np.concatenate([[0, 2**-24, last, 1 - 2**-23, 0.5], np.linspace(0, last, 60)])
    token = drawn(np.repeat(rows, len(us), 0), np.tile(us, len(rows)))
    assert (token >= 0).all()
    assert np.isfinite(np.repeat(rows, len(us), 0)[np.arange(len(token)), token]).all()
    for row in rows[[5, 29, 33]]:  # at the very cumulative sums, and one step to either side of them
        weights = np.exp(row - row.max())
        edges = (np.cumsum(weights) / weights.sum()).astype(np.float32)
        us = np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, 1)]).clip(0, last)
        assert np.isfinite(row[drawn(row, us)]).all()


def test_the_ends_of_the_unit_interval_give_the_first_and_the_last_token():
    z = np.full(WIDTH, -np.inf)
    z[[1, 140, 141, 298]] = [0.0, -1.0, 1.0, 0.5]
    np.testing.assert_array_equal(drawn(z, np.array([0.0, 1 - 2**-24])), [1, 298])
    assert (drawn(np.full(WIDTH, np.nan), np.array([0.5])) == -7).all()


def test_uniform_numbers_lie_in_the_half_open_interval():
    u = uniforms(0)
    assert u.min() >= 0 and u.max() < 1
    np.testing.assert_array_equal(u * 2**24, np.round(u * 2**24))
    assert chisquare(np.histogram(u, 50, (0, 1))[0]).pvalue > 1e-3


def test_logits_that_are_not_numbers_still_give_a_token_of_the_vocabulary():
    state = admit_all([(SamplingParams(top_p=0.5, top_k=3), {}), (SamplingParams(temperature=0), {})] * 2)
    for bad in (np.nan, -np.inf, np.inf):
        token, _, _ = step(state, np.full((N, V), bad), [3] * N)
        assert ((token >= 0) & (token < V)).all()


def test_greedy_takes_the_lowest_id_among_equals():
    z = random_logits(0)
    z[:, [9, 30, 31]] = 50.0
    token, scores, _ = step(admit_all([(SamplingParams(temperature=0, logprobs=2), {})] * N), z, [3] * N)
    np.testing.assert_array_equal(token, 9)
    np.testing.assert_array_equal(scores.rank, 1)
    np.testing.assert_array_equal(scores.top_ids[:, :3], [[9, 30, 31]] * N)


# Random numbers


def run(requests, steps=12, scale=1.0):
    state, z, tokens = admit_all(requests), random_logits(7, 1, scale)[0], []
    for position in range(3, 3 + steps):
        token, _, state = step(state, rows_of(z), [position] * N)
        tokens.append(token)
    return np.stack(tokens, 1)


def test_seed_sample_index_and_position_decide_and_nothing_else():
    params = SamplingParams()
    big = 2**32
    a = run([(params, {"seed": s, "sample_index": i}) for s, i in [(5, 0), (5, 1), (5 + big, 0), (6, 0)]])
    b = run([(params, {"seed": s, "sample_index": i}) for s, i in [(6, 0), (5, 0), (5, 1), (5 + big, 0)]])
    np.testing.assert_array_equal(a, b[[1, 2, 3, 0]])
    for i in range(4):
        assert len(set(a[i])) > 3
        for j in range(i):
            assert (a[i] != a[j]).any()


# Laws of processors

REFLECTS = {"reflection_amplitude": 4.0, "reflection_period": 9, "thinking_end_token_ids": (8,),
            "reflection_token_ids": (3, 12, 20)}  # fmt: skip
STEERS = {"mirostat_tau": 2.0, "mirostat_eta": 0.7}
MIX = [
    SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=3),
    SamplingParams(
        top_k=9, top_p=0.6, min_p=0.05, presence_penalty=-0.5, logit_bias={7: 3.0, 8: -2.5}, **REFLECTS
    ),
    SamplingParams(
        temperature=0.7, allowed_token_ids=list(range(5, 30)), min_tokens=3, **STEERS, mirostat_mode=1
    ),
    SamplingParams(
        temperature=1.7, logprobs=5, logprobs_mode="processed", **STEERS, mirostat_mode=2, **REFLECTS
    ),
]
BAD = [(9,), (11, 12), (3, 4, 5)]


def mixed():
    return [(p, {"output_ids": [4, 4, 11], "bad_word_ids": BAD if i % 2 else ()}) for i, p in enumerate(MIX)]


def test_a_row_does_not_depend_on_its_neighbours_or_its_place():
    z, positions = random_logits(11), np.array([6, 7, 8, 9])
    state = admit_all(mixed())
    token, scores, after = step(state, z, positions)
    order = [2, 0, 3, 1]
    moved, moved_scores, moved_after = step(state, z[order], positions[order], seats=order)
    np.testing.assert_array_equal(moved, token[order])
    np.testing.assert_array_equal(moved_scores.logprob, scores.logprob[order])
    jax.tree.map(np.testing.assert_array_equal, after, moved_after)
    for i in range(N):
        alone, alone_scores, alone_after = step(state, z, positions, live=np.arange(N) == i)
        assert alone[i] == token[i]
        np.testing.assert_allclose(alone_scores.logprob[i], scores.logprob[i], rtol=1e-6)
        for x, y in zip(jax.tree.leaves(alone_after), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(x[i], y[i])


def test_rows_that_are_not_live_leave_no_trace():
    state = admit_all(mixed())
    _, _, after = step(state, random_logits(0), [6] * N, seats=[1, 1, SEATS, 3], live=[False] * N)
    jax.tree.map(np.testing.assert_array_equal, state, after)


@cache
def used_by_two(steered):
    """The state with requests that want everything at seats 1 and 3, nothing at 0 and 2, one step on; `steered`
    by Mirostat, or truncated."""
    busy = SamplingParams(
        repetition_penalty=1.7, presence_penalty=1, frequency_penalty=1, allowed_token_ids=[4, 5], min_tokens=9,
        logit_bias={4: 5.0}, temperature=0.3, **REFLECTS,
        **({**STEERS, "mirostat_mode": 2} if steered else dict(top_k=1, top_p=0.1, min_p=0.5)),
    )  # fmt: skip
    known = {"prompt_ids": [1, 2], "output_ids": [3, 3]}
    kinds = [SamplingParams(), busy, SamplingParams(temperature=0), busy]
    state = admit_all([(p, {**known, "bad_word_ids": BAD if i % 2 else ()}) for i, p in enumerate(kinds)])
    z = random_logits(0)
    z[:, 3] = 50
    return step(state, z, [4] * N)[2]


@pytest.mark.parametrize("index", range(len(DEFAULT)), ids=[type(p).__name__ for p in DEFAULT])
def test_neutral_parameters_change_nothing_to_the_bit(index):
    """Also beside neighbours that use everything."""
    processor = DEFAULT[index]
    held = used_by_two(isinstance(processor, Mirostat)).processors[index]
    z = random_logits(2)
    z[0, :4] = [0.0, -0.0, -np.inf, 1e-40]
    z[2, 3] = 1e-40
    ctx = Context(jnp.full(N, 5), jnp.full(N, 3), jnp.ones(N, bool))
    np.testing.assert_array_equal(processor.wanted(held, jnp.arange(N), ctx), [False, True] * 2)
    out = np.asarray(jax.jit(processor.apply)(held, jnp.arange(N), z, ctx))
    np.testing.assert_array_equal(out[::2].view(np.uint32), z[::2].view(np.uint32))
    assert (out[1] != z[1]).any()


def test_penalties_are_the_formulas():
    """Repetition over prompt and output; presence and frequency over the output; the counts follow."""
    params = SamplingParams(
        temperature=0, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=-0.4,
        logprobs=0, logprobs_mode="processed",
    )  # fmt: skip
    prompt, output = [1, 2, 3, 3, 5], [5, 7, 7]
    z = random_logits(4)
    state = admit_all([(params, {"prompt_ids": prompt, "output_ids": output})] * N)
    for _ in range(3):
        token, scores, state = step(state, z, [5 + len(output)] * N)
        counts = np.bincount(output, minlength=V)
        seen = (counts > 0) | (np.bincount(prompt, minlength=V) > 0)
        ref = z[0].astype(np.float64)
        ref = np.where(seen, np.where(ref > 0, ref / 1.3, ref * 1.3), ref)
        ref = ref + 0.4 * counts - 0.7 * (counts > 0)
        np.testing.assert_allclose(distribution(scores, 0), ref - np.log(np.exp(ref).sum()), atol=1e-5)
        assert token[0] == ref.argmax()
        z[0, token[0]] -= 4
        z[1:] = z[0]
        output = [*output, int(token[0])]


def test_bias_is_added_and_allowed_tokens_win():
    asks = {"logprobs": 0, "logprobs_mode": "processed"}
    z = random_logits(5)
    bias = {0: 2.5, 44: -100.0, 7: 100.0}
    requests = [
        SamplingParams(logit_bias=bias, **asks),
        SamplingParams(logit_bias=bias, allowed_token_ids=[0, 8, 44], **asks),
        SamplingParams(allowed_token_ids=np.arange(32), **asks),
        SamplingParams(allowed_token_ids=[44], **asks),
    ]
    token, scores, _ = step(admit_all([(p, {}) for p in requests]), z, [3] * N)
    shift = np.zeros(V)
    shift[list(bias)] = list(bias.values())
    for i, (add, allowed) in enumerate([(shift, range(V)), (shift, [0, 8, 44]), (0, range(32)), (0, [44])]):
        ref = np.full(V, -np.inf)
        ref[list(allowed)] = (z[i].astype(np.float64) + add)[list(allowed)]
        np.testing.assert_allclose(
            distribution(scores, i), ref - ref.max() - np.log(np.exp(ref - ref.max()).sum()), atol=1e-4
        )
        assert token[i] in allowed


def banned(state, positions=3):
    """For each row, the set of tokens that cannot be sampled next (all rows must ask for processed scores)."""
    _, scores, _ = step(state, random_logits(0), np.broadcast_to(positions, N))
    return [set(np.flatnonzero(~np.isfinite(distribution(scores, i)))) for i in range(N)]


def test_bad_words_of_one_two_and_three_tokens():
    params = SamplingParams(temperature=0, logprobs=0, logprobs_mode="processed")
    words = [(9,), (4, 5), (4, 6, 7), (6, 8), (8, 8, 8)]
    state = admit_all([(params, {"bad_word_ids": w}) for w in (words, (), [(9,)], [(4, 6, 7)])])
    expected = [{9}, {9, 5}, {9, 7, 8}, {9}, {9}, {9, 8}, {9, 5}, {9, 5}]
    for count, token in enumerate((4, 6, 3, 8, 8, 4, 4, 0)):
        last_row = {7} if count == 2 else set()
        assert banned(state) == [expected[count], set(), {9}, last_row]
        z = np.zeros((N, V))
        z[:, token] = 50
        out, _, state = step(state, z, [3 + count] * N)
        np.testing.assert_array_equal(out, token)


def test_bad_words_match_the_output_and_not_the_prompt():
    params = SamplingParams(logprobs=0, logprobs_mode="processed")
    both = [(4, 5), (3, 4, 6)]
    cases = [([1, 3, 4], []), ([1, 3], [4]), ([1], [3, 4]), ([1], [0] * 40 + [3, 4])]
    state = admit_all([(params, {"prompt_ids": p, "output_ids": o, "bad_word_ids": both}) for p, o in cases])
    assert banned(state) == [set(), {5}, {5, 6}, {5, 6}]


def test_bans_that_would_leave_nothing_yield_to_the_allowed_list():
    params = SamplingParams(temperature=0, allowed_token_ids=[5, 6])
    words = [(5, 5), (5, 6)]
    state = admit_all([(params, {"output_ids": [5], "bad_word_ids": words})] * N)
    token, _, _ = step(state, random_logits(0), [4] * N)
    assert set(token) <= {5, 6}
    sampler = programs()[0]
    with pytest.raises(ValueError, match="bad_words bans all 2 allowed tokens"):
        sampler.row(params, prompt_ids=[1], bad_word_ids=[(5,), (6,)])
    with pytest.raises(ValueError, match="min_tokens=2 bans every token"):
        sampler.row(SamplingParams(allowed_token_ids=[2], min_tokens=2), prompt_ids=[1], eos_ids=EOS)


def test_min_tokens_bans_the_end_of_text_and_stop_tokens_until_then():
    asks = {"logprobs": 0, "logprobs_mode": "processed"}
    requests = [
        (SamplingParams(min_tokens=2, **asks), {}),
        (SamplingParams(min_tokens=2, stop_token_ids=[7, 8], **asks), {"prompt_ids": [1]}),
        (SamplingParams(stop_token_ids=[7], **asks), {}),
        (SamplingParams(min_tokens=4, **asks), {"prompt_ids": [1], "output_ids": [5, 5]}),
    ]
    state = admit_all(requests)
    starts = np.array([3, 1, 3, 3])
    expected = [[{2}, {2, 7, 8}, set(), {2}]] * 2 + [[set()] * 4] * 2  # row 3 has generated 2 before
    for count in range(4):
        assert banned(state, starts + count) == expected[count]
        _, _, state = step(state, random_logits(count), starts + count)


def test_admission_wipes_the_seats_former_occupant():
    """A used seat, given to a new request, is a fresh seat with that request, to the bit."""
    state = admit_all([(MIX[0], {}), (MIX[1], {}), (MIX[2], {}), (MIX[3], {})])
    for position in range(3, 8):
        _, _, state = step(state, random_logits(position), [position] * N)
    again = [(SamplingParams(), {}), *mixed()[1:]]
    jax.tree.map(np.testing.assert_array_equal, admit_all(again, state), admit_all(again))


def test_a_resumed_request_is_as_if_uninterrupted():
    """Counts, recent tokens, phases and random numbers come back from the tokens, Mirostat's mu is what `carry`
    said; another seat will do."""
    busy = [SamplingParams(**{**vars(p), "presence_penalty": 1.0, "frequency_penalty": 0.3}) for p in MIX]
    requests = [(p, {"bad_word_ids": BAD}) for p in busy]
    state, z, tokens, carries = admit_all(requests), random_logits(21), [], []
    for position in range(3, 9):
        token, _, state = step(state, z, [position] * N)
        tokens.append(token)
        carries.append(np.asarray(programs()[0].carry(state, jnp.arange(N))).tolist())
    for half in (1, 4):
        outputs = np.stack(tokens[:half], 1)
        resumed = [
            (p, {**known, "output_ids": outputs[i], "seed": i, "carry": carries[half - 1][i]})
            for i, (p, known) in enumerate(requests)
        ]
        back = admit_all(resumed[::-1])
        np.testing.assert_array_equal(back.last_token[:N], outputs[::-1, -1])
        for position in range(3 + half, 9):
            token, _, back = step(back, z[::-1], [position] * N)
            np.testing.assert_array_equal(token[::-1], tokens[position - 3])


# Log-probabilities


def test_log_probabilities_before_and_after_the_processors():
    change = {"temperature": 0.5, "top_k": 5, "presence_penalty": 1.0}
    requests = [
        SamplingParams(logprobs=4, **change),
        SamplingParams(logprobs=4, logprobs_mode="processed", **change),
        SamplingParams(logprobs=4, logprobs_mode="processed"),
        SamplingParams(**change),
    ]
    z = rows_of(random_logits(9)[0])
    token, scores, _ = step(admit_all([(p, {"output_ids": [1, 6]}) for p in requests]), z, [5] * N)
    raw = np.asarray(jax.nn.log_softmax(z[0].astype(np.float64)))
    for i in (0, 2, 3):
        np.testing.assert_allclose(scores.logprob[i], raw[token[i]], atol=1e-5)
    for i in (0, 2):
        np.testing.assert_allclose(distribution(scores, i), raw, atol=1e-5)
        assert scores.rank[i] == 1 + (raw > raw[token[i]]).sum()
        assert scores.top_ids[i, scores.rank[i] - 1] == token[i]
        assert (np.diff(scores.top_logprobs[i]) <= 0).all()
    shifted = np.where(np.isin(np.arange(V), [1, 6]), z[0] - 1, z[0]).astype(np.float64) / 0.5
    kept, _ = sorted_truncation(shifted, top_k=5)
    masked = np.where(kept, shifted, -np.inf)
    expected = masked - np.log(np.exp(masked).sum())
    np.testing.assert_allclose(distribution(scores, 1), expected, atol=1e-5)
    np.testing.assert_allclose(scores.logprob[1], expected[token[1]], atol=1e-5)


def test_log_probabilities_alone_are_there_when_nobody_asks():
    z = random_logits(9)
    requests = [(SamplingParams(), {}), (SamplingParams(temperature=0, top_k=3), {})] * 2
    token, scores, _ = step(admit_all(requests), z, [3] * N)
    raw = np.asarray(jax.nn.log_softmax(z))
    np.testing.assert_allclose(scores.logprob, raw[np.arange(N), token], atol=1e-5)


def test_prompt_log_probabilities_and_ranks_with_ties():
    z = np.array([[0, 2, 1, 2, -1], [3, 3, 3, 3, 3]], np.float32)
    scores = read(np.asarray(prompt_logprobs(z, jnp.array([3, 4]), 2)))
    raw = np.asarray(jax.nn.log_softmax(z))
    np.testing.assert_allclose(scores.logprob, raw[[0, 1], [3, 4]], atol=1e-6)
    np.testing.assert_array_equal(scores.rank, [2, 5])
    np.testing.assert_array_equal(scores.top_ids, [[1, 3], [0, 1]])
    np.testing.assert_allclose(scores.top_logprobs, [raw[0, [1, 3]], raw[1, [0, 1]]], atol=1e-6)


def test_the_host_reads_what_the_device_packed():
    z = random_logits(1)
    _, _, sample = programs()
    state = admit_all([(SamplingParams(logprobs=1), {})] * N)
    sampled, _ = sample(state, z, jnp.arange(N), jnp.full(N, 3), jnp.ones(N, bool))
    host = read(np.asarray(sampled.detail))
    np.testing.assert_array_equal(sampled.logprob, host.logprob)
    np.testing.assert_array_equal(sampled.rank, host.rank)
    np.testing.assert_array_equal(sampled.top_ids, host.top_ids)
    np.testing.assert_array_equal(sampled.top_logprobs, host.top_logprobs)


# Programs


def test_requests_of_every_kind_share_one_program():
    _, admit, sample = programs()
    _, _, state = step(admit_all([(SamplingParams(temperature=0), {})]), np.zeros((N, V)), [3] * N)
    compiled = admit._cache_size(), sample._cache_size()
    for i, params in enumerate(MIX):
        known = {"prompt_ids": [1] * (i + 1), "output_ids": list(range(i)), "bad_word_ids": BAD[:i]}
        state = admit_all([(params, known)], state)
        _, _, state = step(state, np.zeros((N, V)), [9] * N, live=np.arange(N) >= i)
    assert (admit._cache_size(), sample._cache_size()) == compiled


def test_the_state_is_updated_in_place():
    """All donated bytes are reused, and the temporaries have no room for a copy of the state."""
    width, seats = 512, 64
    sampler = Sampler(width, seats)
    state = jax.eval_shape(sampler.init)
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    logits, live = jax.ShapeDtypeStruct((2, width), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.bool_)
    memory = jax.jit(sampler.sample, donate_argnums=0).lower(state, logits, rows, rows, live).compile()
    memory = memory.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == held
    assert memory.temp_size_in_bytes < seats * width * 4 / 2


def test_bits_are_packed_as_they_are_read():
    for vocab in (1, 31, 32, 33, 100):
        bits = np.random.RandomState(vocab).rand(vocab) < 0.5
        np.testing.assert_array_equal(unpack_bits(jnp.asarray(pack_bits(bits))[None], vocab)[0], bits)


def test_what_cannot_be_served_is_refused_by_name():
    sampler = programs()[0]
    params = SamplingParams()
    with pytest.raises(ValueError, match=r"prompt has token ids from 1 to 45.*vocabulary has 45 tokens"):
        sampler.row(params, prompt_ids=[1, 45])
    with pytest.raises(ValueError, match="bad word 1 has no tokens"):
        sampler.row(params, prompt_ids=[1], bad_word_ids=[(3,), ()])
    with pytest.raises(ValueError, match="17 tokens and the limit is 16"):
        sampler.row(params, prompt_ids=[1], bad_word_ids=[(3,) * 17])
    with pytest.raises(ValueError, match="129 sequences of several tokens and the limit is 128"):
        sampler.row(params, prompt_ids=[1], bad_word_ids=[(3, 4)] * 129)
    with pytest.raises(ValueError, match="seed=-1"):
        sampler.row(params, prompt_ids=[1], seed=-1)
    with pytest.raises(ValueError, match="order of their stages"):
        Sampler(V, 2, DEFAULT[::-1])
