"""Paged KV: what is written is what attention sees, in every layout and dtype, through prompts and mixed steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom.attention.batch import NULL_PAGE, Shape, make_batch
from tokenloom.attention.blockwise import Blockwise
from tokenloom.attention.caches.paged import PagedKV, encode
from tokenloom.attention.ops import AttentionSpec
from tokenloom.tests.attention_cases import softmax_attention, text_sees

PAGE, WIDTH, HEADS, KV_HEADS, DIM = 4, 4, 4, 2, 16
LAYOUTS = "transposed", "rows", "padded", "paired"
# The dtype and the layout meet in few places, so not every pair is needed.
STORES = [(lie, "float32") for lie in LAYOUTS]
STORES += [("transposed", "int8"), ("paired", "int8"), ("rows", "bfloat16"), ("padded", "float8_e4m3fn")]
TABLE = np.array([[7, 2, 9, 0], [4, 11, 0, 0], [1, 8, 3, 0]], np.int32)
# (rows of TABLE, lengths after the step, prompt counts): two prompts while decodes are idle, then decodes beside a
# prompt's chunks; row 1 goes idle in the last step. One shape, so one program.
MIXED = Shape(2, 1, 2, 12)
STEPS = [
    ((0, 1, 0, 1), (0, 0, 7, 4), (7, 4)),
    ((0, 1, 2, 2), (8, 5, 6, 0), (6, 0)),
    ((0, 1, 2, 2), (9, 0, 11, 0), (5, 0)),
]


def empty(lie, dtype, layers=1):
    return PagedKV.empty(12, PAGE, KV_HEADS, DIM, dtype, (Blockwise(4, 3, lie),), layers)


def batch_of(rows, lengths, counts):
    return make_batch(
        MIXED,
        PAGE,
        tokens=jnp.zeros(MIXED.T, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        page_table=jnp.asarray(TABLE[list(rows)]),
        query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        seats=jnp.arange(MIXED.rows, dtype=jnp.int32),
    )


def stored(kv, pages, length):
    """(k, v) [length,Hkv,D] in float64 as they lie in these pages of a row."""
    k, v = np.asarray(kv.k, np.float64), None if kv.v is None else np.asarray(kv.v, np.float64)
    if kv.layout == "transposed":
        k = k.swapaxes(2, 3)
    elif v is None:
        k, v = k[..., :DIM], k[..., DIM:]
    if kv.layout == "padded":
        assert k.shape[3] == 128 and not k[..., DIM:].any() and not v[..., DIM:].any()
        k, v = k[..., :DIM], v[..., :DIM]
    if kv.k_scales is not None:
        k, v = k * np.asarray(kv.k_scales)[..., None], v * np.asarray(kv.v_scales)[..., None]
    return tuple(x[pages].swapaxes(1, 2).reshape(-1, KV_HEADS, DIM)[:length] for x in (k, v))


def bound(x, dtype):
    """How far a stored number may lie from x [...,D]: half a step of its code."""
    largest = np.abs(x).max(-1, keepdims=True)
    if dtype == "int8":
        return largest / 127 * 0.501
    if dtype == "float8_e4m3fn":
        return np.maximum(np.abs(x) * 2.0**-4, largest / 448 * 2.0**-10) * 1.001
    return np.abs(x) * (2.0**-8 if dtype == "bfloat16" else 0.0)


@pytest.mark.parametrize("lie, dtype", STORES)
def test_steps_attend_to_what_is_stored(lie, dtype):
    draw, spec = np.random.default_rng(0), AttentionSpec(0.25, window=6)
    kv, written = empty(lie, dtype), {row: np.zeros((2, 0, KV_HEADS, DIM)) for row in range(3)}
    attend = jax.jit(lambda kv, q, k, v, batch: kv.attend(q, k, v, batch, spec))
    for rows, lengths, counts in STEPS:
        batch = batch_of(rows, lengths, counts)
        q = draw.standard_normal((MIXED.T, HEADS, DIM)).astype(np.float32)
        k, v = draw.standard_normal((2, MIXED.T, KV_HEADS, DIM)).astype(np.float32)
        out, kv = attend(kv, q, k, v, batch)
        for place, row in enumerate(rows):
            mine = np.asarray((batch.rows == place) & batch.valid)
            written[row] = np.concatenate([written[row], np.stack([k[mine], v[mine]])], 1)
            kept = stored(kv, TABLE[row], written[row].shape[1])
            assert np.all(np.abs(kept - written[row]) <= bound(written[row], dtype))
            if lengths[place]:
                assert written[row].shape[1] == lengths[place]
                sees = text_sees(spec, lengths[place], mine.sum())
                expected, _, _ = softmax_attention(q[mine], *kept, sees, spec)
                np.testing.assert_allclose(np.asarray(out)[mine], expected, atol=1e-5, rtol=1e-5)
        assert not np.any(np.asarray(out)[~np.asarray(batch.valid)]), "padding attends to nothing"


@pytest.mark.parametrize("lie", LAYOUTS)
def test_a_write_touches_its_slots_only(lie):
    """Padding goes to the null page; other layers, other pages and other slots keep every bit."""
    batch = batch_of((0, 1, 2, 2), (9, 0, 6, 0), (5, 0))
    old = empty(lie, "int8", layers=2)
    old = jax.tree.map(lambda x: jnp.full_like(x, 3), old)
    k, v = np.random.default_rng(1).standard_normal((2, MIXED.T, KV_HEADS, DIM)).astype(np.float32)
    new = jax.jit(lambda kv, k, v: kv.put(1, kv.layer(jnp.int32(1)).write(k, v, batch)))(old, k, v)
    touched = {(int(page) + 12, int(slot)) for page, slot in zip(batch.pages, batch.slots)}
    assert (12 + 9, 0) in touched and (12 + 8, 1) in touched and (12 + NULL_PAGE, 0) in touched
    slot_axis = {"transposed": 3, "rows": 2, "padded": 2, "paired": 2}[lie]
    arrays = [(old.k, new.k, slot_axis), (old.v, new.v, 2), (old.k_scales, new.k_scales, 2)]
    for before, after, axis in [*arrays, (old.v_scales, new.v_scales, 2)]:
        if before is None:
            assert lie == "paired"
            continue
        differs = np.moveaxis(np.asarray(before != after), axis, 1).reshape(*[24, PAGE], -1).any(-1)
        assert {(int(page), int(slot)) for page, slot in np.argwhere(differs)} == touched
    assert new.base is None


@pytest.mark.parametrize("lie", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_view_names_its_sizes(lie, dtype):
    batch = batch_of((0, 1, 2, 2), (9, 0, 6, 0), (5, 0))
    view = empty(lie, dtype, layers=3).layer(jnp.int32(2)).view(batch)
    assert (view.page_size, view.kv_heads, view.layout) == (PAGE, KV_HEADS, lie)
    assert (view.k_scales is None) == (view.v_scales is None) == (dtype == "bfloat16")
    np.testing.assert_array_equal(view.table, TABLE[[0, 1, 2, 2]] + 24)
    np.testing.assert_array_equal(view.rows(1, 3).table, TABLE[1:] + 24)
    np.testing.assert_array_equal(view.rows(1, 3).lengths, [0, 6])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_codes_are_within_half_a_step(dtype):
    """Numbers of very different sizes, a token of zeros, one large number among small ones, the largest floats."""
    draw = np.random.default_rng(2)
    x = draw.standard_normal((8, KV_HEADS, 64)).astype(np.float32) * np.float32(10.0) ** draw.integers(
        -20, 20, (8, KV_HEADS, 1)
    )
    x[1], x[2, 0, 5], x[3] = 0, 1e4, np.float32(1e38)
    codes, scales = jax.jit(encode, static_argnums=1)(x, jnp.dtype(dtype))
    assert codes.dtype == jnp.dtype(dtype) and scales.shape == x.shape[:2]
    back = np.asarray(codes, np.float64) * np.asarray(scales, np.float64)[..., None]
    assert np.all(np.isfinite(back)) and not back[1].any()
    assert np.all(np.abs(back - x) <= bound(x.astype(np.float64), dtype))
    assert np.all(np.abs(back).max(-1) >= 0.999 * np.abs(x).max(-1)), (
        "the largest number uses the largest code"
    )
