"""Laws of texts that are split over devices, for a process that has several: `python -m tokenloom.tests.split_laws`.

`layer`, `beams` and `long TOKENS CHUNK` print a line for each case that held; anything else is an error.
`tests/test_sequence_parallel.py` runs them on devices that the CPU pretends to have.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenloom import LLM, BeamSearch, SamplingParams
from tokenloom.attention.batch import Batch, Shape, make_batch
from tokenloom.attention.blockwise import Blockwise
from tokenloom.attention.caches.paged import PagedKV
from tokenloom.attention.caches.split import Split, SplitKV
from tokenloom.attention.flat import Marks, flat
from tokenloom.attention.forms import Form, Spread
from tokenloom.attention.ops import AttentionSpec, dense
from tokenloom.attention.sequence import ring, token_ring
from tokenloom.attention.spread import order, plain, spread
from tokenloom.model.config import llama_config
from tokenloom.tests.engines import greedy, same_tokens
from tokenloom.tests.shapes import ALL

SPECS = {
    "causal": AttentionSpec(0.3),
    "window": AttentionSpec(0.3, window=19),
    "capped": AttentionSpec(0.3, softcap=5.0),
    "chunks": AttentionSpec(0.3, chunk=16),
}
B, R, C, PAGE, WIDTH, DIM = 8, 4, 64, 32, 4, 16


def drawn(draw: np.random.Generator, shape: Shape, before: int) -> Batch:
    """A ragged batch, some of its prompt rows behind up to `before` stored tokens."""
    rows, used = shape.rows, draw.integers(shape.C // 2, shape.C + 1) if shape.C else 0
    counts = np.diff(np.sort(draw.integers(0, used + 1, R - 1)), prepend=0, append=used) if shape.R else []
    starts = draw.integers(0, PAGE * WIDTH - shape.C - 1, rows)
    starts[shape.B :] = np.where(draw.random(shape.R) < 0.5, 0, np.minimum(starts[shape.B :], before))
    lengths = starts + np.concatenate([np.ones(shape.B), counts]).astype(np.int64)
    lengths[: shape.B][draw.random(shape.B) < 0.3] = 0
    live = np.concatenate([lengths[: shape.B] > 0, np.asarray(counts) > 0])
    lengths = lengths * live
    table = draw.permutation(np.arange(1, rows * WIDTH + 1)).reshape(rows, WIDTH)
    return make_batch(
        shape, PAGE,
        tokens=jnp.zeros(shape.T, jnp.int32), lengths=jnp.asarray(lengths, jnp.int32),
        page_table=jnp.asarray(table, jnp.int32),
        query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        seats=jnp.arange(rows, dtype=jnp.int32),
    )  # fmt: skip


def filled(draw: np.random.Generator, pages: PagedKV) -> PagedKV:
    """These pages with stored numbers everywhere."""

    def one(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.int8:
            return jnp.asarray(draw.integers(-127, 128, x.shape), jnp.int8)
        return jnp.asarray(
            draw.random(x.shape) / 100 if x.ndim == 3 else draw.standard_normal(x.shape), x.dtype
        )

    return jax.tree.map(one, pages)


def layer(devices: int) -> None:
    """Texts over all devices: decodes, and prompts in every form."""
    split = Split(Mesh(np.array(jax.devices()[:devices]), ("seq",)))
    held(split, 4, [
        (Shape(B, 1, 0, 0), None, "causal", "float32"),
        (Shape(B, 1, 0, 0), None, "window", "int8"),
        (Shape(0, 1, R, C), "ring", "causal", "float32"),
        (Shape(B, 1, R, C), "ring", "window", "float32"),
        (Shape(0, 1, R, C), "ring", "chunks", "int8"),
        (Shape(B, 1, R, C), "token_ring", "capped", "float32"),
        (Shape(0, 1, R, C), "gather", "window", "float32"),
        (Shape(B, 1, R, C), None, "capped", "float32"),
    ])  # fmt: skip


def shared(devices: int) -> None:
    """Two KV heads, each shared by half of the devices, which have its query heads in parts."""
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(2, -1), ("kv", "rep"))
    held(Split(mesh, "rep", ("kv", "rep"), "kv"), 2 * devices, [
        (Shape(B, 1, 0, 0), None, "causal", "float32"),
        (Shape(B, 1, 0, 0), None, "window", "int8"),
        (Shape(0, 1, R, C), None, "chunks", "int8"),
        (Shape(B, 1, R, C), None, "capped", "float32"),
    ])  # fmt: skip


def held(split: Split, heads: int, cases: list[tuple[Shape, Form | None, str, str]]) -> None:
    """The second of two layers that share arrays: split pages give what whole pages give, its outputs and what it
    stores. cases: shape, form, mask, dtype of pages."""
    mesh, devices, draw = split.mesh, split.devices, np.random.default_rng(0)
    for shape, form, name, dtype in cases:
        count = shape.rows * WIDTH + 1
        pages = PagedKV.empty(
            count, PAGE, 2, DIM, jnp.dtype(dtype), (Blockwise(query_block=16),), layers=2
        )  # fmt: skip
        cut = SplitKV(pages, split)
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cut.partition())

        @jax.jit
        def whole(pages, q, k, v, batch, name=name):
            out, new = pages.layer(1).attend(q, k, v, batch, SPECS[name])
            return out, pages.put(1, new)

        @jax.jit
        def parted(cut, q, k, v, batch, shape=shape, form=form, name=name):
            if form is not None:
                there = order(shape, devices)
                batch, q, k, v = spread(batch, Spread(devices, form)), q[there], k[there], v[there]
            out, new = cut.layer(1).attend(q, k, v, batch, SPECS[name])
            return (out if form is None else plain(out, shape, devices)), cut.put(1, new)

        for trial in range(3):
            batch = drawn(draw, shape, before=40 * trial)
            before = filled(draw, pages)
            q = jnp.asarray(draw.standard_normal((shape.T, heads, DIM)), jnp.float32)
            k, v = jnp.asarray(draw.standard_normal((2, shape.T, 2, DIM)), jnp.float32)
            out, after = whole(before, q, k, v, batch)
            got, new = parted(jax.device_put(SplitKV(before, split), places), q, k, v, batch)
            live = np.asarray(batch.valid)
            np.testing.assert_allclose(np.asarray(got)[live], np.asarray(out)[live], atol=1e-5, rtol=1e-5)
            for mine, wanted in zip(jax.tree.leaves(new.pages), jax.tree.leaves(after)):
                assert mine.addressable_shards[0].data.size * mesh.size == wanted.size
                off = np.abs(np.asarray(mine, np.float64) - np.asarray(wanted, np.float64))
                off = off.reshape(2, count, *off.shape[1:])[:, 1:]
                assert off.max() <= (1 if wanted.dtype == jnp.int8 else 1e-6)
        print("equal", shape.kind, form, name, dtype)


def beams(devices: int) -> None:
    """Beams that fork shared pages are those of one device."""
    config, found = ALL["llama"](), []
    prompts = [[7 * i % 300 for i in range(41)], [5, 6, 7]]
    for size in (devices, 1):
        llm = LLM.from_config(
            config, 0, max_num_seqs=4, max_num_batched_tokens=32, page_size=16, max_model_len=96, progress=False,
            tensor_parallel_size=size,
        )  # fmt: skip
        (entry, *_) = llm.engine.programs.state
        assert isinstance(entry, SplitKV) == (size > 1)
        results = BeamSearch(4).generate(llm, prompts, SamplingParams(max_tokens=12, ignore_eos=True))
        found.append([[list(one.completion.token_ids) for one in each.hypotheses] for each in results])
        llm.close()
    assert found[0] == found[1]
    print("equal beams")


def rings(devices: int) -> None:
    """Keys that travel and queries that travel give what dense attention gives, lse too."""
    mesh, draw = Mesh(np.array(jax.devices()[:devices]), ("seq",)), np.random.default_rng(1)
    shape = Shape(0, 1, 1, 24 * devices)
    there = order(shape, devices)
    back = np.argsort(there)
    for name, spec in {**SPECS, "full": AttentionSpec(0.3, causal=False)}.items():
        rows = np.sort(draw.integers(0, 3, shape.C)).astype(np.int32)
        positions = np.concatenate([np.arange(n) for n in np.bincount(rows, minlength=3)]).astype(np.int32)
        positions[-5:] = -1
        lengths = np.bincount(rows[:-5], minlength=3).astype(np.int32)[rows]
        q, k, v = (draw.standard_normal((shape.C, heads, DIM)).astype(np.float32) for heads in (6, 2, 2))
        marks = Marks(*(jnp.asarray(x[there].reshape(devices, -1)) for x in (rows, positions, lengths)))

        def both(q, kv, spec=spec, marks=marks):
            def of(index):
                return jax.tree.map(lambda leaf: leaf[index], marks)

            mine = of(jax.lax.axis_index("seq"))
            by_keys = ring(kv, lambda kv, at: flat(q, kv[0], kv[1], mine, of(at), spec), "seq", devices)
            by_queries = token_ring(
                q, lambda q, at: flat(q, kv[0], kv[1], of(at), mine, spec), "seq", devices
            )
            return by_keys, by_queries

        some = PartitionSpec("seq")
        run = jax.shard_map(
            both, mesh=mesh, in_specs=(some, PartitionSpec(None, "seq")), out_specs=some, check_vma=False
        )
        results = jax.jit(run)(q[there], np.stack([k[there], v[there]]))
        for row in range(3):
            here = (rows == row) & (positions >= 0)
            out, lse = dense(q[here], k[here], v[here], positions[here], positions[here], spec)
            for got, got_lse in results:
                np.testing.assert_allclose(np.asarray(got)[back][here], out, atol=1e-5, rtol=1e-5)
                np.testing.assert_allclose(np.asarray(got_lse)[back][here], lse, atol=1e-5, rtol=1e-5)
        for got, got_lse in results:
            assert np.isneginf(np.asarray(got_lse)[back][-5:]).all() and not np.asarray(got)[back][-5:].any()
        print("equal", name)


def long(tokens: int, chunk: int) -> None:
    """A prompt of so many tokens in chunks, over all devices, against one device."""
    config = llama_config(
        layers=2, hidden=64, heads=2, kv_heads=2, intermediate=128, vocab=300, max_position=tokens + 128
    )
    asked, answers = [[(7 * i * i + i) % 300 for i in range(tokens)]], []
    for devices in (jax.device_count(), 1):
        start = time.perf_counter()
        llm = LLM.from_config(
            config, 0, max_num_seqs=1, max_num_batched_tokens=chunk, progress=False, sequence_parallel_size=devices,
        )  # fmt: skip
        built = time.perf_counter()
        answers.append(llm.generate(asked, greedy(8))[0])
        print(
            f"{devices} devices: {built - start:.1f} s to build, {time.perf_counter() - built:.1f} s to generate"
        )
        if devices > 1:
            (place,) = {entry.pages.v.addressable_shards[0].data.size / entry.pages.v.size
                        for entry in llm.engine.programs.state}  # fmt: skip
            assert place == 1 / devices
        llm.close()
    same_tokens(*answers)
    apart = [
        abs(x[token].logprob - y[token].logprob)
        for x, y in zip(*(answer.outputs[0].logprobs for answer in answers))
        for token in x.keys() & y.keys()
    ]
    assert max(apart) < 1e-4, apart
    print(f"equal, 1/{jax.device_count()} of the pages on each device")


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "layer":
        layer(jax.device_count())
        shared(jax.device_count())
        rings(jax.device_count())
    elif what == "beams":
        beams(jax.device_count())
    else:
        long(*map(int, rest))
