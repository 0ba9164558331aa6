"""Texts split over devices, in numbers that need no devices: work, bytes and the form that the cost formula chooses.

    python benchmarks/sequence.py

Work: pairs of blocks that `attention.flat` meets on the busiest device at each hop of the ring, summed over hops and
over the fair share of what a causal prompt has; in zigzag order, and with one run of tokens on each device. Bytes: what
a device sends a layer. Seconds: `attention.forms`, a layer of a model on TPU v5e and on GPUs with NVLink.
"""

from __future__ import annotations

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from common import table
from tokenloom.attention.batch import Shape
from tokenloom.attention.flat import KEYS, QUERIES, Marks, meets
from tokenloom.attention.forms import FORMS, Load, choose
from tokenloom.attention.ops import AttentionSpec
from tokenloom.attention.spread import order
from tokenloom.sharding.spreading import NVLINK, speeds_of_kind

LAYERS = {
    "8B, 32 heads with 8 KV heads": (32, 8, 218_000_000),
    "7B, 32 heads of their own": (32, 32, 202_000_000),
}
LINKS = {"v5e": speeds_of_kind("TPU v5 lite"), "NVLink": NVLINK}
CASES = ((64, 0), (512, 32_768), (8192, 0), (8192, 120_000), (32_768, 0), (2048, 500_000))


def busiest(places: np.ndarray, length: int) -> float:
    """Work of the busiest device of each hop over a fair share; places i32[N,c]: positions that each device has."""
    devices, spec, total = len(places), AttentionSpec(1.0), 0
    marks = Marks(np.zeros_like(places), places, np.full_like(places, length))

    def blocks(device: int, size: int) -> Marks:
        return jax.tree.map(lambda x: jnp.asarray(x[device]), marks).blocks(size)

    every = []
    for hop in range(devices):
        work = [
            int(meets(blocks(one, QUERIES), blocks((one - hop) % devices, KEYS), spec).sum())
            for one in range(devices)
        ]
        total += max(work)
        every.append(sum(work))
    return total / (sum(every) / devices)


def main() -> None:
    rows = [("busiest device of each hop over a fair share", "zigzag", "one run of tokens each")]
    for devices in (2, 4, 8, 16):
        length = 1024 * devices
        zigzag = order(Shape(0, 1, 1, length), devices).reshape(devices, -1)
        runs = np.arange(length, dtype=np.int32).reshape(devices, -1)
        shares = (f"{busiest(places, length):.3f}" for places in (zigzag, runs))
        rows.append((f"{devices} devices of 1,024 tokens", *shares))
    print(table(rows))
    rows = [("layer", "links", "tokens", "stored", "ring MB", "queries MB", *FORMS, "chosen")]
    for (layer, (heads, kv_heads, parameters)), (links, speeds) in product(LAYERS.items(), LINKS.items()):
        for tokens, stored in CASES:
            load = Load(8, tokens, stored, heads, kv_heads, 128, 2, parameters)
            ring = 7 * 2 * tokens / 8 * kv_heads * 128 * 2
            queries = 7 * tokens / 8 * heads * (128 * 2 + 129 * 4)
            times = [f"{1e6 * load.seconds(form, speeds):,.0f}" for form in FORMS]
            numbers = f"{tokens:,}", f"{stored:,}", f"{ring / 1e6:.1f}", f"{queries / 1e6:.1f}"
            rows.append((layer, links, *numbers, *times, choose(load, speeds)))
    print(f"\nover 8 devices; microseconds of a layer by form\n{table(rows)}")


if __name__ == "__main__":
    main()
