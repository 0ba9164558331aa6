"""Laws of Mamba-2 and its state: any cut, decode = prefill, no trace of neighbours, padding or earlier rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenloom.attention.batch import Batch, Shape, make_batch, rectangle
from tokenloom.attention.caches.recurrent import RecurrentState, Stateless
from tokenloom.model.config import Mamba2Config
from tokenloom.model.layers import Numerics
from tokenloom.model.linear_scan import ssd, ssd_step
from tokenloom.model.mixers.mamba2 import Mamba2

E, SEATS, ROWS, C = 12, 6, 5, 160
CONFIG = Mamba2Config(
    heads=4, head_dim=6, state=5, groups=2, conv=4, chunk=16, time_step_limit=(0.01, 0.5), proj_bias=True
)


def naive(x, dt, A, B, C, state):
    """The recurrence, token by token, in float64."""
    x, dt, A, B, C, state = (np.asarray(a, np.float64) for a in (x, dt, A, B, C, state))
    share = x.shape[1] // B.shape[1]
    B, C = np.repeat(B, share, 1), np.repeat(C, share, 1)
    out = []
    for t in range(len(x)):
        state = np.exp(dt[t] * A)[:, None, None] * state + np.einsum("h,hp,hn->hpn", dt[t], x[t], B[t])
        out.append(np.einsum("hpn,hn->hp", state, C[t]))
    return np.stack(out), state


def scan_inputs(length: int, seed: int = 0, speed: float = 1.0):
    rng = np.random.default_rng(seed)
    H, P, G, N = 4, 6, 2, 5
    dt = np.exp(rng.uniform(-5, 0, (length, H))) * speed
    parts = (
        rng.standard_normal((length, H, P)), dt, -np.arange(1.0, H + 1), rng.standard_normal((length, G, N)),
        rng.standard_normal((length, G, N)), rng.standard_normal((H, P, N)),
    )  # fmt: skip
    return tuple(jnp.asarray(part, jnp.float32) for part in parts)


@pytest.mark.parametrize(("length", "chunk"), [(1, 8), (7, 8), (16, 8), (50, 16), (50, 64), (20, 1)])
def test_ssd_is_the_recurrence(length, chunk):
    parts = scan_inputs(length)
    y, final = jax.jit(ssd, static_argnames="chunk")(*parts, chunk=chunk)
    expected, state = naive(*parts)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(final, state, atol=1e-5)


def test_ssd_keeps_small_decays_behind_large_ones():
    """Decays of exp(-400) at first, then slow ones: differences of one running sum would lose 1e-4 here."""
    x, dt, A, B, C, state = scan_inputs(60)
    dt = jnp.where(jnp.arange(60)[:, None] < 30, 100.0, 0.001)
    y, final = ssd(x, dt, A, B, C, state)
    expected, last = naive(x, dt, A, B, C, state)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_allclose(final, last, rtol=2e-6, atol=2e-6 * np.abs(last).max())


def test_steps_are_the_recurrence_and_dt_zero_changes_nothing():
    x, dt, A, B, C, state = scan_inputs(9)
    dt = dt.at[4].set(0.0)
    expected, last = naive(x, dt, A, B, C, state)
    step = jax.jit(ssd_step)
    for t in range(9):
        before = state
        y, state = step(x[t], dt[t], A, B[t], C[t], state)
        np.testing.assert_allclose(y, expected[t], atol=1e-5)
        if t == 4:
            np.testing.assert_array_equal(state, before)
    np.testing.assert_allclose(state, last, atol=1e-5)


@pytest.fixture(scope="module")
def mixer():
    made = Mamba2(CONFIG, E, numerics=Numerics(), rngs=nnx.Rngs(0))
    # Away from their starting values, so that forgetting one shows.
    for index, weight in enumerate((made.norm.weight, made.D, made.conv.bias, made.in_proj.bias)):
        weight[...] = weight[...] + 0.3 * jax.random.normal(jax.random.key(index), weight.shape)
    graph, params = nnx.split(made)
    call = jax.jit(lambda params, x, batch, state: nnx.merge(graph, params)(x, batch, state))
    return made, lambda x, batch, state: call(params, jnp.asarray(x, jnp.float32), batch, state)


def reference(made: Mamba2, x: np.ndarray) -> np.ndarray:
    """One fresh row x [n,E] -> [n,E], in float64."""
    c = made.config
    weights = {
        name: np.asarray(param[...], np.float64)
        for name, param in {
            "in": made.in_proj.weight, "in_bias": made.in_proj.bias, "conv": made.conv.weight,
            "conv_bias": made.conv.bias, "A_log": made.A_log, "D": made.D, "dt_bias": made.dt_bias,
            "norm": made.norm.weight, "out": made.out_proj.weight, "out_bias": made.out_proj.bias,
        }.items()
    }  # fmt: skip
    n, silu = len(x), lambda a: a / (1 + np.exp(-a))
    all_in = x.astype(np.float64) @ weights["in"].T + weights["in_bias"]
    z, mixed, dt = np.split(all_in, [c.inner, c.inner + c.conv_dim], axis=-1)
    window = np.concatenate([np.zeros((c.conv - 1, c.conv_dim)), mixed])
    mixed = silu(sum(window[j : j + n] * weights["conv"][:, j] for j in range(c.conv)) + weights["conv_bias"])
    values, B, C = np.split(mixed, [c.inner, c.inner + c.groups * c.state], axis=-1)
    dt = np.clip(np.log1p(np.exp(dt + weights["dt_bias"])), *c.time_step_limit)
    values = values.reshape(n, c.heads, c.head_dim)
    shape = (n, c.groups, c.state)
    zero = np.zeros((c.heads, c.head_dim, c.state))
    y, _ = naive(values, dt, -np.exp(weights["A_log"]), B.reshape(shape), C.reshape(shape), zero)
    y = (y + weights["D"][:, None] * values).reshape(n, c.inner) * silu(z)
    grouped = y.reshape(n, c.groups, -1)
    grouped = grouped / np.sqrt(np.square(grouped).mean(-1, keepdims=True) + c.norm_eps)
    return (grouped.reshape(n, c.inner) * weights["norm"]) @ weights["out"].T + weights["out_bias"]


def features(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, E)).astype(np.float32)


def batch_of(shape: Shape, lengths: list[int], seats: list[int], counts: list[int]) -> Batch:
    """A batch of rows with `lengths` tokens after it; `counts` are the prompt rows' new tokens."""
    return make_batch(
        shape,
        4,
        tokens=jnp.zeros((shape.T,), jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        page_table=jnp.zeros((shape.rows, 0), jnp.int32),
        query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        seats=jnp.asarray(seats, jnp.int32),
    )


def prompt(lengths: list[int], seats: list[int], counts: list[int]) -> Batch:
    """ROWS prompt rows sharing C tokens, so that all tests share a program; the rest of the rows is idle."""
    idle = ROWS - len(counts)
    none = [0] * idle
    return batch_of(Shape(0, 1, ROWS, C), lengths + none, seats + [SEATS] * idle, counts + none)


def fresh(made: Mamba2) -> RecurrentState:
    return RecurrentState.create(SEATS, made.zero())


def padded(x: np.ndarray, fill: float = 0.0) -> np.ndarray:
    return np.concatenate([x, np.full((C - len(x), E), fill, np.float32)])


TOLERANCE = dict(atol=2e-5)


def test_rows_are_the_reference(mixer):
    made, call = mixer
    x = features(2 * 37)
    y, _ = call(x, rectangle(jnp.zeros((2, 37), jnp.int32)), Stateless())
    for row in range(2):
        np.testing.assert_allclose(
            y[row * 37 : row * 37 + 37], reference(made, x[row * 37 :][:37]), **TOLERANCE
        )


@pytest.mark.parametrize("cuts", [(), (1,), (3,), (64,), (70, 71, 139)])
def test_a_prompt_in_chunks_is_the_whole(mixer, cuts):
    """150 tokens are three blocks; the cuts lie inside blocks, at their edges and within the convolution."""
    made, call = mixer
    x, state, start, got = features(150), fresh(made), 0, []
    for stop in (*cuts, 150):
        y, state = call(padded(x[start:stop]), prompt([stop], [1], [stop - start]), state)
        got.append(np.asarray(y[: stop - start]))
        start = stop
    np.testing.assert_allclose(np.concatenate(got), reference(made, x), **TOLERANCE)


@pytest.mark.parametrize("q", [1, 3])
def test_decode_is_prefill(mixer, q):
    """A prompt of 5 tokens, then 12 more by q a step beside an idle row: the outputs are the whole prompt's."""
    made, call = mixer
    x = features(17)
    expected = reference(made, x)
    _, state = call(padded(x[:5]), prompt([5], [2], [5]), fresh(made))
    for at in range(5, 17, q):
        batch = batch_of(Shape(2, q, 0, 0), [0, at + q], [SEATS, 2], [])
        y, state = call(np.concatenate([features(q, 9), x[at : at + q]]), batch, state)
        np.testing.assert_allclose(y[q:], expected[at : at + q], **TOLERANCE)


def test_a_row_decoded_from_its_first_token_starts_from_nothing(mixer):
    made, call = mixer
    dirty = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), fresh(made))
    y, _ = call(features(1), batch_of(Shape(1, 1, 0, 0), [1], [0], []), dirty)
    np.testing.assert_allclose(y, reference(made, features(1)), **TOLERANCE)


def test_neighbours_padding_and_old_state_leave_no_trace(mixer):
    """The middle row of three, beside nan rows and nan padding, on a seat full of nan, is the row alone."""
    made, call = mixer
    x = features(70)
    alone, after = call(padded(x), prompt([70], [1], [70]), fresh(made))
    packed = padded(np.concatenate([np.full((20, E), np.nan, np.float32), x]), np.nan)
    dirty = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), fresh(made))
    batch = prompt([20, 70, 30], [0, 1, 2], [20, 70, 30])
    y, state = call(packed, batch, dirty)
    np.testing.assert_allclose(y[20:90], alone[:70], **TOLERANCE)
    np.testing.assert_allclose(state.ssm[1], after.ssm[1], **TOLERANCE)
    np.testing.assert_allclose(state.conv[1], after.conv[1], **TOLERANCE)


def test_rows_of_a_packed_prompt_do_not_depend_on_their_place(mixer):
    """Five rows (one idle) in one chunk, each equal to the reference; seats that no row has stay as they are."""
    made, call = mixer
    counts = [3, 66, 0, 1, 64]
    rows = [features(n, seed) for seed, n in enumerate(counts)]
    state = jax.tree.map(lambda a: a + 7.0, fresh(made))
    batch = prompt(counts, [4, 0, SEATS, 2, 1], counts)
    y, after = call(padded(np.concatenate(rows)), batch, state)
    start = 0
    for row in rows:
        if len(row):
            np.testing.assert_allclose(y[start : start + len(row)], reference(made, row), **TOLERANCE)
        start += len(row)
    for seat in (3, 5):
        np.testing.assert_array_equal(after.ssm[seat], state.ssm[seat])
        np.testing.assert_array_equal(after.conv[seat], state.conv[seat])


def test_mixed_is_decode_and_prefill_apart(mixer):
    made, call = mixer
    first, second, new = features(10, 1), features(30, 2), features(1, 3)
    _, state = call(padded(first), prompt([10], [0], [10]), fresh(made))
    batch = batch_of(Shape(2, 1, 2, C), [11, 0, 30, 0], [0, SEATS, 2, SEATS], [30, 0])
    y, state = call(np.concatenate([new, features(1, 8), padded(second)]), batch, state)
    np.testing.assert_allclose(y[0], reference(made, np.concatenate([first, new]))[-1], **TOLERANCE)
    np.testing.assert_allclose(y[2:32], reference(made, second), **TOLERANCE)
    follow = features(2, 4)
    y, _ = call(follow, batch_of(Shape(2, 1, 0, 0), [12, 31], [0, 2], []), state)
    np.testing.assert_allclose(
        y[0], reference(made, np.concatenate([first, new, follow[:1]]))[-1], **TOLERANCE
    )
    np.testing.assert_allclose(y[1], reference(made, np.concatenate([second, follow[1:]]))[-1], **TOLERANCE)


def test_idle_rows_leave_every_seat_alone(mixer):
    made, call = mixer
    state = jax.tree.map(lambda a: a + 7.0, fresh(made))
    batch = batch_of(Shape(2, 1, 2, C), [0, 0, 0, 0], [0, 1, 2, SEATS], [0, 0])
    _, after = call(features(2 + C), batch, state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
        np.testing.assert_array_equal(old[:SEATS], new[:SEATS])


def test_refusals_name_both_sides(mixer):
    _, call = mixer
    with pytest.raises(ValueError, match="prompt rows: use RecurrentState"):
        call(features(C), prompt([5], [0], [5]), Stateless())
    with pytest.raises(ValueError, match="4 heads cannot share 3 groups"):
        Mamba2(Mamba2Config(4, 6, 5, 3, 4), E, numerics=Numerics(), rngs=nnx.Rngs(0))
