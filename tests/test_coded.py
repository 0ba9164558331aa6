"""Blocks as codes: packing loses nothing, and each of GEAR's parts does what it is for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom.attention.coded import Codec, _factors, _pack, _unpack

V, L = 6, 32


@pytest.fixture(scope="module")
def x():
    """Vectors with an offset each, a common direction, and a few large numbers."""
    draw = np.random.default_rng(0)
    found = draw.standard_normal((2, V, L)) + draw.standard_normal((2, V, 1)) * 3
    found += np.einsum("bv,bl->bvl", draw.standard_normal((2, V)), draw.standard_normal((2, L))) * 2
    found[:, ::3, 5] *= 6
    return jnp.asarray(found, jnp.float32)


def back(codec, x):
    return codec.decode(codec.encode(x), x.shape[-1])


def error(codec, x):
    return float(jnp.linalg.norm(back(codec, x) - x) / jnp.linalg.norm(x))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_lossless(bits):
    numbers = jax.random.randint(jax.random.key(bits), (3, 5, 16), 0, 2**bits).astype(jnp.uint8)
    packed = _pack(numbers, bits)
    assert packed.shape == (3, 5, 16 * bits // 8)
    np.testing.assert_array_equal(_unpack(packed, bits), numbers)


def test_the_backbone_is_within_half_a_step(x):
    for bits in (2, 4, 8):
        groups = np.asarray(x).reshape(2, V, -1, 8)
        step = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
        off = np.abs(np.asarray(back(Codec(bits, 8), x)).reshape(groups.shape) - groups).max(-1)
        # Scale and zero are rounded to f16, which moves a group by up to 2^-11 of its numbers.
        assert (off <= step * 0.51 + 2.0**-9 * np.abs(groups).max(-1)).all()


def test_more_of_anything_is_nearer(x):
    for codecs in (
        [Codec(bits) for bits in (2, 4, 8)],
        [Codec(2, rank=rank) for rank in (0, 1, 4)],
        [Codec(2, group=group) for group in (32, 16, 8)],
        [Codec(2, outliers=share) for share in (0.0, 0.1, 0.3)],
    ):
        errors = [error(codec, x) for codec in codecs]
        assert all(b < a for a, b in itertools.pairwise(errors)), (codecs, errors)


def test_full_rank_restores_and_outliers_are_kept(x):
    assert error(Codec(2, rank=V), x) < 2e-3  # factors are f16
    codes = Codec(2, outliers=0.1).encode(x)
    got = np.take_along_axis(
        np.asarray(back(Codec(2, outliers=0.1), x)), np.asarray(codes.places, np.int64), -1
    )
    want = np.take_along_axis(np.asarray(x), np.asarray(codes.places, np.int64), -1)
    np.testing.assert_allclose(got, want, rtol=2.0**-10)
    assert set(np.asarray(codes.places)[0, 0].tolist()) >= {int(np.asarray(x)[0, 0].argmax())}


def test_power_iteration_is_near_the_best_rank(x):
    """Three rounds, as in GEAR, come near; many rounds arrive."""
    for rank in (1, 3):
        best = float(jnp.linalg.norm(jnp.linalg.svd(x, compute_uv=False)[:, rank:]))
        for rounds, slack in ((3, 1.25), (60, 1.01)):
            a, b = _factors(x, rank, rounds)
            left = float(jnp.linalg.norm(x - jnp.einsum("bvr,blr->bvl", a, b)))
            assert left <= slack * best, (rank, rounds)


def test_nothing_lost_gives_no_nan():
    flat = jnp.ones((1, V, L))
    np.testing.assert_allclose(back(Codec(4, rank=2, outliers=0.1), flat), flat, atol=1e-6)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="2, 4 or 8 bits"):
        Codec(3)
    with pytest.raises(ValueError, match="vectors of 30 numbers do not divide into groups of 16"):
        Codec(4, 16).groups(30)
