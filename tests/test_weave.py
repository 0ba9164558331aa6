"""Steps of tensor-parallel models in two halves: each device has some tokens between mixers, and nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenloom import LLM
from tokenloom.attention.batch import Shape, make_batch
from tokenloom.attention.weave import Weave, halves
from tokenloom.sharding.placement import Placement
from tokenloom.sharding.tokens import step_tokens
from tokenloom.sharding.weaving import FEWEST, Weaving
from tokenloom.tests.devices import run_on
from tokenloom.tests.shapes import ALL

WEAVE = Weave(*(NamedSharding(Mesh(np.array(jax.devices()[:1]), ("tensor",)), PartitionSpec()),) * 2)


def test_woven_steps_generate_what_the_plain_model_says():
    """Every step's prompt part in halves: KV heads split and repeated, windows, experts whole, to which tokens are sent
    where they have fewer of them than there are devices; decodes beside."""
    printed = run_on(8, "-m", "tokenloom.tests.weave_laws", "engines", "swaps")
    assert printed.count("equal") == 4 + 2


@pytest.mark.parametrize("seed", range(6))
def test_halves_are_two_chunks(seed):
    """Each half is the batch that a step of its tokens alone would have; prompts cut, idle rows, padding."""
    draw, (B, q, R, C, page, width) = np.random.default_rng(seed), (3, 1, 4, 16, 4, 8)
    counts = draw.multinomial(draw.integers(1, C + 1), [0.4, 0.3, 0.2, 0.1]) * (draw.random(R) < 0.8)
    before = np.where(counts > 0, draw.integers(0, 12, R), 0)
    decoding = draw.integers(0, 20, B)  # 0: idle
    tables = draw.permutation((B + R) * width).reshape(B + R, width).astype(np.int32) + 1
    tokens, seats = draw.integers(0, 99, B * q + C, dtype=np.int32), np.arange(B + R, dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    def batch(shape, starts, rows, lengths, tokens):
        return make_batch(
            shape, page, tokens=jnp.asarray(tokens), lengths=jnp.asarray(lengths, jnp.int32),
            page_table=jnp.asarray(tables[rows:]), query_starts=jnp.asarray(starts), seats=jnp.asarray(seats[rows:]),
        )  # fmt: skip

    whole = batch(Shape(B, q, R, C), starts, 0, np.concatenate([decoding, before + counts]), tokens)
    cut = np.minimum(starts, C // 2), np.maximum(starts - C // 2, 0)
    early = before + np.diff(cut[0])
    wanted = (
        batch(Shape(B, q, R, C // 2), cut[0], 0, np.concatenate([decoding, early]), tokens[: B * q + C // 2]),
        batch(Shape(0, q, R, C // 2), cut[1], B, before + counts, tokens[B * q + C // 2 :]),
    )
    for half, expected in zip(halves(whole, WEAVE), wanted):
        assert half.shape == expected.shape
        valid = np.asarray(expected.valid)
        np.testing.assert_array_equal(half.valid, valid)
        for name in ("tokens", "positions", "pages", "slots", "rows"):
            np.testing.assert_array_equal(getattr(half, name)[valid], getattr(expected, name)[valid], name)
        np.testing.assert_array_equal(half.pages[~valid], 0)
        for name in ("page_table", "lengths", "starts", "query_starts", "seats"):
            np.testing.assert_array_equal(getattr(half, name), getattr(expected, name), name)


def test_which_steps_are_woven():
    weaving = Weaving(WEAVE, 8, "tpu")
    assert weaving.over(Shape(0, 1, 4, FEWEST)) and weaving.over(Shape(16, 1, 4, FEWEST))
    assert weaving.options(Shape(0, 1, 4, FEWEST)) and not weaving.options(Shape(0, 1, 4, 512))
    jax.jit(lambda x: x).lower(1.0).compile(
        Weaving(WEAVE, 8, "gpu").options(Shape(0, 1, 4, FEWEST))
    )  # it knows them
    # Too few tokens; decoding; halves that eight devices do not share evenly.
    for shape in (Shape(0, 1, 4, 512), Shape(2048, 1, 0, 0), Shape(0, 1, 4, 2056), Shape(6, 1, 4, 2048)):
        assert not weaving.over(shape) and not weaving.options(shape)


def test_what_cannot_be_woven_is_refused():
    place = Placement.over(None, (2, 1))
    with pytest.raises(ValueError, match="go through it once"):
        step_tokens(place, ALL["hybrid"](), None, platform="tpu", width=2, length=64, overlap=64)
    for options, message in {
        (("overlap_tokens", -1),): "overlap_tokens=-1 must be a whole number",
        (("overlap_tokens", 64),): "tensor_parallel_size=1 and",
        (("overlap_tokens", 64), ("tensor_parallel_size", 2), ("sequence_parallel_size", 2)): "size alone",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            LLM.from_config(ALL["llama"](), 0, progress=False, **dict(options))
