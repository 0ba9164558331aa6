"""How evenly attention's lists of work share a chip, counted: no device, no times.

    python benchmarks/balance.py

Decode of one long sequence beside 63 short ones: the keys of the busiest worker over the mean, for the segments that
the GPU kernel walks, for whole sequences and for a fixed number of pieces each (both given longest first to the idlest
worker), and for the two cores of a TPU. Causal prefill of one prompt on TPU: the steps on the list, of all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from common import table
from tokenloom.pallas_kernels.attention.spec import AttentionSpec, Share
from tokenloom.pallas_kernels.attention.tiles import Case, TpuTiles, TritonTiles
from tokenloom.pallas_kernels.attention.triton_rows import Cut
from tokenloom.pallas_kernels.attention.worklist import flatten, prompt_ranges, row_ranges
from tokenloom.pallas_kernels.chips import GPUS, TPUS

LONG, SHORT, SHORTS, KV_HEADS, GROUP, DIM, PROMPT, TILE = 131_072, 1_024, 63, 8, 4, 128, 8_192, 64
LENGTHS = np.array([LONG] + [SHORT] * SHORTS, np.int32)
CAUSAL = AttentionSpec(1.0)


def case(part: str, tokens: int, page_size: int, reach: int) -> Case:
    return Case(part, tokens, KV_HEADS, GROUP, DIM, page_size, reach // page_size, "bfloat16", "bfloat16")


def tiled(keys: float) -> int:
    """Keys that a kernel computes for a piece: whole tiles."""
    return -(-math.ceil(keys) // TILE) * TILE


def idlest_first(items: Iterable[int], workers: int) -> float:
    """Busiest over mean (of the keys that exist) when each item, the largest first, goes to the idlest worker."""
    loads = [0] * workers
    for item in sorted(items, reverse=True):
        heapq.heapreplace(loads, loads[0] + item)
    return max(loads) * workers / (int(LENGTHS.sum()) * KV_HEADS)


def gpu_segments(name: str) -> float:
    """Busiest multiprocessor over mean: programs walk the list with a stride, as the kernel does."""
    chip = GPUS[name]
    tiles = TritonTiles.choose(case("rows", 1, 64, LONG), chip)
    start, size, count = map(
        np.asarray, Cut(CAUSAL, 1, LONG, tiles.keys, tiles.segment).of(jnp.asarray(LENGTHS), Share())
    )
    keys = [
        min(length, begin + (part + 1) * step) - (begin + part * step)
        for length, begin, step, parts in zip(LENGTHS, start, size, count)
        for part in range(parts)
        for _ in range(KV_HEADS)
    ]
    loads = np.zeros(chip.cores * tiles.programs)
    np.add.at(loads, np.arange(len(keys)) % len(loads), keys)
    return float(loads.reshape(tiles.programs, chip.cores).sum(0).max() * chip.cores / sum(keys))


def tpu_cores(name: str) -> float:
    """Busier core's steps over the mean."""
    chip = TPUS[name]
    tiles = TpuTiles.choose(case("rows", 1, 128, LONG), chip)
    step, segments = tiles.pages * 128, -(-LONG // tiles.segment)
    ranges = row_ranges(jnp.asarray(LENGTHS), 1, CAUSAL.visible, step, segments, tiles.segment)
    slots = len(LENGTHS) * segments
    starts = np.asarray(flatten(ranges, slots, slots * tiles.segment // step, chip.cores).starts)
    return float(np.diff(starts).max() * chip.cores / starts[-1])


def causal_steps(name: str) -> tuple[int, int]:
    """(steps on the list, all steps) of a fresh prompt."""
    tiles = TpuTiles.choose(case("prompt", PROMPT, 128, PROMPT), TPUS[name])
    blocks, step = PROMPT // tiles.queries, tiles.pages * 128
    starts, lengths = jnp.array([0, PROMPT], jnp.int32), jnp.array([PROMPT], jnp.int32)
    visited = prompt_ranges(starts, lengths, lengths, blocks, tiles.queries, CAUSAL.visible, step).count.sum()
    return int(visited), blocks * (PROMPT // step)


def main() -> None:
    cores = GPUS["H200"].cores
    rows = [(f"{LONG:,} tokens beside {SHORTS} x {SHORT:,}, {KV_HEADS} KV heads", "busiest over mean")]
    rows.append((f"H200, {cores} multiprocessors: segments, as the kernel", f"{gpu_segments('H200'):.3f}"))
    for pieces in (1, 4, 16, 64):
        items = [tiled(length / pieces) for length in LENGTHS for _ in range(KV_HEADS * pieces)]
        name = "whole sequences" if pieces == 1 else f"{pieces} pieces of every sequence"
        rows.append((f"the same: {name}", f"{idlest_first(items, cores):.3f}"))
    rows.append(("v5p, two cores: segments, as the kernel", f"{tpu_cores('TPU v5p'):.3f}"))
    print(table(rows))
    visited, every = causal_steps("TPU v5e")
    print(f"\ncausal prefill of {PROMPT:,} on v5e: {visited} of {every} steps ({visited / every:.2f})")


if __name__ == "__main__":
    main()
