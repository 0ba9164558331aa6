"""Attention over paged KV on TPU (Mosaic): FlashAttention's online softmax along one flat list of steps.

A step brings `tiles.pages` pages of one row (all KV heads, fetched through the page table by the pipeline while the
step before computes, also across rows) and one block of queries. Decode and prefill are the same kernel: a decode's
block is a row's own tokens, a prefill's is an aligned block of the flat chunk, which takes in the pages of every row
that it overlaps. What a query sees is data: its first and last key, its row, its place in a draft tree.
(FlashAttention: Dao et al. 2022, arXiv 2205.14135; Lean Attention: Sanovar et al. 2024, arXiv 2405.10480.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..chips import Chip
from .spec import LANES, NEG_INF, AttentionSpec, Layout, PagedView, Tree, multiplied
from .tiles import Case, TpuTiles
from .tuned import Tuned
from .worklist import Ranges, Steps, flatten, prompt_ranges, row_ranges

SMEM = 1 << 20  # of every TPU from v4 on
FIRST, LAST, OWNER, ROOT, WORDS = range(5)


@dataclass(frozen=True)
class TpuKernels:
    """`interpret` runs the kernel on CPU: True, or `pltpu.InterpretParams` (memory spaces, races). Tiles are the
    `tuned` ones of the nearest case, or a heuristic's; `tiles` overrides both, for measuring."""

    chip: Chip
    interpret: bool | pltpu.InterpretParams = False
    tiles: TpuTiles | None = None
    tuned: Tuned[TpuTiles] = Tuned()

    def layout(self, head_dim: int) -> Layout:
        if 2 * head_dim == LANES:
            return "paired"
        return "padded" if head_dim % LANES else "rows"

    def rows(
        self, q: jax.Array, view: PagedView, spec: AttentionSpec, tree: Tree | None = None
    ) -> tuple[jax.Array, jax.Array]:
        B, n, heads, dim = q.shape
        tiles = self._tiles("rows", n, q, view)
        step, kv_heads, group = tiles.pages * view.page_size, view.kv_heads, heads // view.kv_heads
        reach = view.table.shape[1] * view.page_size
        segments = -(-reach // tiles.segment) if tiles.segment else 1
        sees = partial(view.share.visible, spec)
        ranges = row_ranges(view.lengths, n, sees, step, segments, tiles.segment)
        blocks = q.reshape(B, n, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
        info = _row_info(view, n, spec, tree)
        out, lse = self._run(
            blocks.reshape(B, kv_heads, n * group, dim), jnp.repeat(info, group, 1), view, spec, tiles, ranges,
            slots=B * segments, size=B * (-(-reach // step) + segments - 1),
            dtype=jnp.dtype(jnp.float32) if segments > 1 else q.dtype,
        )  # fmt: skip
        if segments > 1:
            out, lse = _merge(
                out.reshape(B, segments, *out.shape[1:]), lse.reshape(B, segments, *lse.shape[1:])
            )
        out = out.reshape(B, kv_heads, n, group, dim).transpose(0, 2, 1, 3, 4).reshape(B, n, heads, dim)
        lse = lse.reshape(B, kv_heads, n, group).transpose(0, 2, 1, 3).reshape(B, n, heads)
        return out.astype(q.dtype), lse

    def prompt(
        self, q: jax.Array, view: PagedView, query_starts: jax.Array, spec: AttentionSpec,
        ends: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        C, heads, dim = q.shape
        tiles = self._tiles("prompt", C, q, view)
        step, kv_heads, group = tiles.pages * view.page_size, view.kv_heads, heads // view.kv_heads
        queries, R = tiles.queries, view.lengths.shape[0]
        blocks = -(-C // queries)
        ends, sees = view.lengths if ends is None else ends, partial(view.share.visible, spec)
        ranges = prompt_ranges(query_starts, view.lengths, ends, blocks, queries, sees, step)
        padded = jnp.pad(q, ((0, blocks * queries - C), (0, 0), (0, 0)))
        padded = padded.reshape(blocks, queries, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
        info = _prompt_info(query_starts, view, ends, blocks * queries, spec).reshape(blocks, queries, -1)
        out, lse = self._run(
            padded.reshape(blocks, kv_heads, queries * group, dim), jnp.repeat(info, group, 1), view, spec, tiles,
            ranges, slots=blocks, size=(blocks + R) * -(-view.table.shape[1] // tiles.pages), dtype=q.dtype,
        )  # fmt: skip
        out = out.reshape(blocks, kv_heads, queries, group, dim).transpose(0, 2, 1, 3, 4)
        lse = lse.reshape(blocks, kv_heads, queries, group).transpose(0, 2, 1, 3)
        return out.reshape(-1, heads, dim)[:C], lse.reshape(-1, heads)[:C]

    def _tiles(self, part: str, tokens: int, q: jax.Array, view: PagedView) -> TpuTiles:
        """Chosen tiles, after refusing what the kernel cannot do on this chip."""
        kv_dtype, size = view.k_pages.dtype, view.page_size
        if view.layout == "transposed":
            raise NotImplementedError("keys are transposed inside a page; the kernel wants rows or pairs")
        if self.chip.platform != "tpu":
            raise NotImplementedError(f"compiled for {self.chip.name}: this kernel is for TPU")
        if not self.interpret and size % (32 // kv_dtype.itemsize):
            raise NotImplementedError(
                f"pages of {size} tokens of {kv_dtype}: a TPU tile has {32 // kv_dtype.itemsize} rows"
            )
        case = Case(
            part, tokens, view.kv_heads, q.shape[-2] // view.kv_heads, q.shape[-1], size, view.table.shape[1],
            q.dtype.name, kv_dtype.name,
        )  # fmt: skip
        tiles = self.tiles or self.tuned.lookup(case)
        if tiles is None or (self.tiles is None and tiles.vmem_bytes(case) > self.chip.memory):
            tiles = TpuTiles.choose(case, self.chip)
        if tiles.vmem_bytes(case) > self.chip.memory:
            raise NotImplementedError(
                f"{tiles} need {tiles.vmem_bytes(case) >> 20} MiB of VMEM; {self.chip.name} has "
                f"{self.chip.memory >> 20} MiB"
            )
        return tiles

    def _run(
        self, q: jax.Array, info: jax.Array, view: PagedView, spec: AttentionSpec, tiles: TpuTiles,
        ranges: Ranges, *, slots: int, size: int, dtype: jnp.dtype,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """q [blocks,Hkv,N,D], info i32[blocks,N,..]; slot s belongs to block s // (slots/blocks).

        Returns out [slots,Hkv,N,D] in `dtype` and lse f32[slots,Hkv,N].
        """
        blocks, _, N, dim = q.shape
        scalars = 4 * (4 * size + view.table.shape[0] * -(-view.table.shape[1] // LANES) * LANES)
        if scalars > SMEM * 7 // 8:
            raise NotImplementedError(
                f"the list of {size} steps and the page table take {scalars >> 10} KiB of {SMEM >> 10} KiB of SMEM"
            )
        steps = flatten(ranges, slots, size, self.chip.cores)
        rows, lanes = -(-N // 16) * 16, view.k_pages.shape[-1]
        q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - N), (0, lanes - dim)))
        info = jnp.pad(info, ((0, 0), (0, rows - N), (0, 0)), constant_values=-1)
        call = _Call(
            self.chip, spec, tiles, view.page_size, view.parts, slots // blocks, view.layout == "paired"
        )
        out, lse = call(q, info, view, steps, slots, dtype, self.interpret)
        live = steps.counts > 0
        out = out[..., dim:] if view.layout == "paired" else out[..., :dim]
        out = jnp.where(live[:, None, None, None], out[:slots, :, :N], 0)
        return out, jnp.where(live[:, None, None], lse[:slots, :, :N], -jnp.inf)


def _row_info(view: PagedView, n: int, spec: AttentionSpec, tree: Tree | None) -> jax.Array:
    """i32[B,n,4+words]: first and last key (as `Share` counts), row, the tree's root (counted from the first token
    that lies here), and words of bits of each query."""
    B, lengths, share = view.lengths.shape[0], view.lengths[:, None], view.share
    depths = jnp.arange(n, dtype=jnp.int32)[None] if tree is None else tree.depths
    first, last = share.visible(spec, lengths - n + depths, lengths)
    if tree is not None:
        last = jnp.broadcast_to(share.before(lengths) - 1, depths.shape)
    owner = jnp.arange(B, dtype=jnp.int32)[:, None]
    root = lengths - n if share.first is None else lengths - n - share.first
    columns = [jnp.broadcast_to(x, (B, n)) for x in (first, last, owner, root)]
    words = [] if tree is None else [tree.bits[..., w] for w in range(tree.bits.shape[-1])]
    return jnp.stack(columns + words, -1)


def _prompt_info(
    query_starts: jax.Array, view: PagedView, ends: jax.Array, tokens: int, spec: AttentionSpec
) -> jax.Array:
    """i32[tokens,4]: as `_row_info`, for the flat chunk; tokens of no row have row -1."""
    lengths = view.lengths
    R, index = lengths.shape[0], jnp.arange(tokens, dtype=jnp.int32)
    row = (index[:, None] >= query_starts[None, 1:R]).sum(-1, dtype=jnp.int32)
    first, last = view.share.visible(spec, index - query_starts[row + 1] + ends[row], lengths[row])
    owner = jnp.where(index < query_starts[R], row, -1)
    return jnp.stack([first, last, owner, jnp.zeros_like(owner)], -1)


def _merge(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Partial results of segments, out f32[B,S,...,D] and lse f32[B,S,...], into one, in order."""
    top = lse.max(1)
    origin = jnp.where(jnp.isneginf(top), 0.0, top)

    def add(part: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weight = jnp.exp(lse[:, part] - origin)
        return carry[0] + weight[..., None] * out[:, part], carry[1] + weight

    start = jnp.zeros_like(out[:, 0]), jnp.zeros_like(top)
    merged, total = lax.fori_loop(0, out.shape[1], add, start)
    safe = jnp.maximum(total, 1e-30)
    return merged / safe[..., None], jnp.where(total > 0, origin + jnp.log(safe), -jnp.inf)


@dataclass(frozen=True)
class _Call:
    """The pallas_call of one case: block shapes, index maps, and the body."""

    chip: Chip
    spec: AttentionSpec
    tiles: TpuTiles
    page_size: int
    parts: int
    segments: int
    paired: bool

    def __call__(
        self, q: jax.Array, info: jax.Array, view: PagedView, steps: Steps, slots: int, dtype: jnp.dtype,
        interpret: bool | pltpu.InterpretParams,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        _, kv_heads, rows, lanes = q.shape
        pages, cores = self.tiles.pages, self.chip.cores
        flags = steps.opens.astype(jnp.int32) + 2 * steps.closes.astype(jnp.int32)
        stored = view.share.before(view.lengths)
        prefetch = (steps.starts, steps.slot, steps.row, steps.group, flags, view.table, stored)
        values = () if self.paired else (view.v_pages,)
        paged = [view.k_pages, *values]
        scales = [] if view.k_scales is None else [view.k_scales, view.v_scales]

        def page(j: int):
            return pl.BlockSpec((1, kv_heads, self.page_size, lanes), partial(self._page, j, 4))

        def scale(j: int):
            return pl.BlockSpec((1, kv_heads, self.page_size), partial(self._page, j, 3))

        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(cores, jnp.maximum((steps.starts[1:] - steps.starts[:-1]).max(), 1)),
            in_specs=[
                pl.BlockSpec((1, kv_heads, rows, lanes), self._block),
                pl.BlockSpec((1, rows, info.shape[-1]), lambda *at: self._block(*at)[:3]),
                *(page(j) for _ in paged for j in range(pages)),
                *(scale(j) for _ in scales for j in range(pages)),
            ],
            out_specs=[
                pl.BlockSpec((1, kv_heads, rows, lanes), lambda *at: (self._written(slots, *at), 0, 0, 0)),
                pl.BlockSpec((1, kv_heads, rows), lambda *at: (self._written(slots, *at), 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((kv_heads, rows, lanes), jnp.float32),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
            ],
        )
        arrays = [array for array in (*paged, *scales) for _ in range(pages)]
        return pl.pallas_call(
            partial(self._body, len(paged), len(scales)),
            grid_spec=grid,
            out_shape=[
                jax.ShapeDtypeStruct((slots + cores - 1, kv_heads, rows, lanes), dtype),
                jax.ShapeDtypeStruct((slots + cores - 1, kv_heads, rows), jnp.float32),
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=self.chip.memory
            ),
            interpret=interpret,
            name=f"paged_attention_{rows}x{pages * self.page_size}",
        )(*prefetch, q, info, *arrays)

    def _item(self, core, step, starts):
        """The core's step as a place in the list; surplus steps repeat the core's last, which copies nothing."""
        return jnp.clip(starts[core] + step, 0, jnp.maximum(starts[core + 1] - 1, 0))

    def _written(self, slots, core, step, starts, slot, *_):
        """The slot that a step writes. A core without work has nothing to say, yet its pipeline writes a block: a
        later core's goes behind the slots, where nobody reads (the first core idles only when all do)."""
        idle = starts[core] == starts[core + 1]
        return jnp.where(idle, jnp.where(core > 0, slots + core - 1, 0), slot[self._item(core, step, starts)])

    def _block(self, core, step, starts, slot, *_):
        return lax.div(slot[self._item(core, step, starts)], jnp.int32(self.segments)), 0, 0, 0

    def _page(self, j: int, ndim: int, core, step, starts, slot, row, group, flags, table, lengths):
        item = self._item(core, step, starts)
        place = jnp.minimum(group[item] * self.tiles.pages + j, table.shape[1] - 1)
        return (table[row[item], place], *(0,) * (ndim - 1))

    def _body(self, stored: int, scaled: int, *refs) -> None:
        starts, _, row_ref, group_ref, flags, _, lengths = refs[:7]
        q_ref, info_ref, *rest = refs[7:]
        out_ref, lse_ref, acc_ref, top_ref, sum_ref = rest[-5:]
        pages = self.tiles.pages
        inputs = [rest[at * pages : (at + 1) * pages] for at in range(stored + scaled)]
        keys, values = inputs[0], inputs[stored - 1]
        k_scales, v_scales = inputs[stored:] if scaled else (None, None)
        core, step = pl.program_id(0), pl.program_id(1)
        item = self._item(core, step, starts)
        live = starts[core] + step < starts[core + 1]

        @pl.when(live & (flags[item] & 1 == 1))
        def _open():
            acc_ref[...] = jnp.zeros_like(acc_ref)
            top_ref[...] = jnp.full_like(top_ref, NEG_INF)
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(live)
        def _take_in():
            row = row_ref[item]
            base = group_ref[item] * (pages * self.page_size)
            seen = [self._seen(info_ref, row, base + j * self.page_size) for j in range(pages)]
            left = lengths[row] - base

            def head(h, _):
                self._head(h, q_ref, seen, left, keys, values, k_scales, v_scales, acc_ref, top_ref, sum_ref)
                return 0

            lax.fori_loop(0, q_ref.shape[1], head, 0, unroll=q_ref.shape[1] <= 8)

        @pl.when(live & (flags[item] >= 2))
        def _close():
            def head(h, _):
                total = sum_ref[h][:, :1]
                out_ref[0, h] = (acc_ref[h] / jnp.maximum(total, 1e-30)).astype(out_ref.dtype)
                lse = jnp.where(total > 0, top_ref[h][:, :1] + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)
                rows = lse.shape[0]
                across = lax.broadcasted_iota(jnp.int32, (rows, rows), 0)
                across = across == lax.broadcasted_iota(jnp.int32, (rows, rows), 1)
                lse_ref[0, pl.ds(h, 1)] = jnp.where(across, lse, 0.0).sum(0, keepdims=True)
                return 0

            lax.fori_loop(0, q_ref.shape[1], head, 0)

    def _seen(self, info_ref, row, base) -> jax.Array:
        """bool[N,ps]: which keys of a page each query sees; its first is key `base` of those of `row` that lie here."""
        info = info_ref[0]
        key = base + lax.broadcasted_iota(jnp.int32, (info.shape[0], self.page_size), 1)
        seen = (key >= info[:, FIRST : FIRST + 1]) & (key <= info[:, LAST : LAST + 1])
        seen &= info[:, OWNER : OWNER + 1] == row
        if info.shape[1] > WORDS:
            words = [info[:, w : w + 1] for w in range(WORDS, info.shape[1])]
            # With `parts` a page of a text is as many times as long, and so is what is in front of it.
            key = key if self.parts == 1 else key + base * (self.parts - 1)
            seen &= Tree.sees(words, key - info[:, ROOT : ROOT + 1])
        return seen

    def _head(
        self, h, q_ref, seen, left, keys, values, k_scales, v_scales, acc_ref, top_ref, sum_ref
    ) -> None:
        """One KV head takes in the pages of a step: the online softmax of FlashAttention, over all pages at once."""
        q = q_ref[0, h]
        dtype = multiplied(q.dtype, keys[0].dtype)
        exact = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
        q = q.astype(dtype)
        scores = []
        for j, page in enumerate(keys):
            s = lax.dot_general(
                q, page[0, h].astype(dtype), (((1,), (1,)), ((), ())), precision=exact,
                preferred_element_type=jnp.float32,
            ) * self.spec.scale  # fmt: skip
            if k_scales is not None:
                s = s * k_scales[j][0, pl.ds(h, 1)]
            if self.spec.softcap is not None:
                s = self.spec.softcap * jnp.tanh(s / self.spec.softcap)
            scores.append(jnp.where(seen[j], s, NEG_INF))
        old = top_ref[h][:, :1]
        top = old
        for s in scores:
            top = jnp.maximum(top, s.max(1, keepdims=True))
        # A query that has seen nothing yet: its weights must be 0, not exp(0).
        origin = jnp.where(top > NEG_INF, top, 0.0)
        shrink = jnp.exp(old - origin)
        total, acc = sum_ref[h][:, :1] * shrink, acc_ref[h] * shrink
        for j, (s, page) in enumerate(zip(scores, values)):
            weights = jnp.exp(s - origin)
            total = total + weights.sum(1, keepdims=True)
            if v_scales is not None:
                weights = weights * self._stored(v_scales[j][0, pl.ds(h, 1)], left - j * self.page_size, 1)
            v = self._stored(page[0, h].astype(dtype), left - j * self.page_size, 0)
            acc = acc + lax.dot_general(
                weights.astype(dtype), v, (((1,), (0,)), ((), ())), precision=exact,
                preferred_element_type=jnp.float32,
            )  # fmt: skip
        acc_ref[h] = acc
        top_ref[h] = jnp.broadcast_to(top, top_ref.shape[1:])
        sum_ref[h] = jnp.broadcast_to(total, sum_ref.shape[1:])

    def _stored(self, page: jax.Array, left: jax.Array, axis: int) -> jax.Array:
        """Zeros behind the row's last token: what others left there may be NaN, and 0 * NaN is not 0."""

        def cut(page: jax.Array) -> jax.Array:
            at = lax.broadcasted_iota(jnp.int32, page.shape, axis)
            return jnp.where(at < left, page, jnp.zeros_like(page))

        return lax.cond(left < self.page_size, cut, lambda page: page, page)
