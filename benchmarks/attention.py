"""Attention over paged KV on one device: kernels and plain twin beside what the device can do, in one run.

    python benchmarks/attention.py [--device gpu] [--dtype bfloat16] [--kv-dtype int8] [--tiny]

32 query and 8 KV heads of 128. Decode, as a share of the measured copy bandwidth: the bytes of the live keys and
values over the time. One text of 128k tokens beside 63 of 1k, against the same bytes evenly spread. Prefill, as a
share of the measured matmul rate, and beside cuDNN (on the CPU: XLA) over contiguous keys and values. Calls that are
compared take turns; each has pages of its own that no cache holds. `--tiny` shrinks every size, to see that it runs;
on the CPU the GPU's kernels are then interpreted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import copy_bandwidth, matmul_rate, use_device
from rich.console import Console
from rich.table import Table

SLOW = 10.0  # a contender so many times slower than the best is not run again


@dataclass(frozen=True)
class Plan:
    """Sizes of a run; texts in tokens."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 128
    contexts: tuple[int, ...] = (1024, 8192, 32768)
    batches: tuple[int, ...] = (1, 16, 64)
    uneven: tuple[int, int, int] = (131072, 1024, 63)  # one text, the others, how many others
    prompts: tuple[int, ...] = (2048, 8192, 32768)
    chunk: int = 512
    copied_mib: int = 2048
    side: int = 8192
    rounds: int = 5


TINY = Plan(
    heads=4, kv_heads=2, head_dim=64, page_size=32, contexts=(64, 128), batches=(1, 3), uneven=(256, 32, 3),
    prompts=(64,), chunk=32, copied_mib=8, side=256, rounds=1,
)  # fmt: skip


class Bench:
    """The contenders of one device, and its ceilings."""

    def __init__(self, device: Any, plan: Plan, dtype: str, kv_dtype: str):
        from tokenloom.attention.backends import backends
        from tokenloom.attention.blockwise import Blockwise
        from tokenloom.pallas_kernels.attention.triton import TritonKernels
        from tokenloom.pallas_kernels.attention.tuned import tiles_folder
        from tokenloom.pallas_kernels.chips import GPUS, Chip
        from tokenloom.serve.workload import Heads

        chip = Chip.of(device)
        self.kernels = backends(chip, tiles_folder())[0]
        if chip.platform == "cpu":
            self.kernels = TritonKernels(GPUS["H200"], interpret=True)
        self.plan, self.cpu = plan, chip.platform == "cpu"
        self.heads = Heads(plan.heads, plan.kv_heads, plan.head_dim, plan.page_size, dtype, kv_dtype)
        self.twin = Blockwise(lie=self.kernels.layout(plan.head_dim))
        self.bandwidth = copy_bandwidth(plan.copied_mib)
        self.compute = matmul_rate(plan.side, dtype)

    def times(self, work: Any, *others: Callable[[], Any]) -> list[float]:
        """Seconds of the kernels, of the twin, and of other contenders for the same work."""
        from tokenloom.serve.workload import Inputs, side_by_side

        size = work.kv_bytes(self.heads)
        # 256 MiB of pages or more: nothing of a call is left in a cache when its turn comes again.
        copies = 1 if self.plan is TINY else max(1, min(64, -(-(256 << 20) // size)))
        inputs = Inputs(work, self.heads, self.kernels, copies)
        calls = [inputs.caller(backend, self.heads.spec()) for backend in (self.kernels, self.twin)]
        return side_by_side([*calls, *others], self.plan.rounds, seconds=0.05, slack=SLOW)

    def library(self, tokens: int) -> Callable[[], Any]:
        """Causal attention of one prompt over contiguous keys and values: cuDNN's on a GPU, else XLA's."""
        import jax
        import jax.numpy as jnp

        heads, implementation = self.heads, None if self.cpu else "cudnn"
        shapes = [
            (1, tokens, count, heads.head_dim) for count in (heads.heads, heads.kv_heads, heads.kv_heads)
        ]
        q, k, v = (
            jax.random.normal(jax.random.key(seed), shape, jnp.dtype(heads.dtype))
            for seed, shape in enumerate(shapes)
        )

        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

        compiled = jax.jit(run).lower(q, k, v).compile()
        return lambda: compiled(q, k, v)


def decode(bench: Bench) -> Table:
    """Share of the copy bandwidth, by context and batch."""
    from tokenloom.serve.workload import Work

    plan, table = (
        bench.plan,
        columns("decode", "kernels ms", "of copy bandwidth", "twin ms", "twin / kernels"),
    )
    for context in plan.contexts:
        for batch in plan.batches:
            work = Work("rows", (context,) * batch, -(-context // plan.page_size))
            ours, twin = bench.times(work)
            share = work.kv_bytes(bench.heads) / ours / bench.bandwidth
            table.add_row(f"{batch} x {context}", ms(ours), f"{share:.1%}", ms(twin), f"{twin / ours:.1f}")
    return table


def uneven(bench: Bench) -> Table:
    """One long text among short ones against as many bytes in equal texts."""
    from tokenloom.serve.workload import Work

    long, short, count = bench.plan.uneven
    even = -(-(long + short * count) // (count + 1))
    table = columns("decode", "MB", "kernels ms", "of copy bandwidth", "time / even", "twin ms")
    width, first = -(-long // bench.plan.page_size), 0.0
    for lengths in ((even,) * (count + 1), (long, *(short,) * count)):
        work = Work("rows", lengths, width)
        ours, twin = bench.times(work)
        first, size = first or ours, work.kv_bytes(bench.heads)
        share = size / ours / bench.bandwidth
        table.add_row(
            str(work), f"{size / 1e6:.1f}", ms(ours), f"{share:.1%}", f"{ours / first:.2f}", ms(twin)
        )
    return table


def prefill(bench: Bench) -> Table:
    """Share of the matmul rate, and the library's time; then a chunk far into a text, which the library has not."""
    from tokenloom.serve.workload import Work

    plan, name = bench.plan, "XLA" if bench.cpu else "cuDNN"
    table = columns(
        "prefill", "kernels ms", "of matmul rate", f"{name} ms", f"{name} of matmul rate", f"speed / {name}", "twin ms"
    )  # fmt: skip
    far = max(plan.prompts)
    for tokens, length in [(n, n) for n in plan.prompts] + [(plan.chunk, far)]:
        work = Work("prompt", (length,), -(-length // plan.page_size), tokens)
        flops = work.flops(bench.heads)
        others = [bench.library(tokens)] if tokens == length else []
        ours, twin, *library = bench.times(work, *others)
        row = [str(work), ms(ours), f"{flops / ours / bench.compute:.1%}"]
        for taken in library:
            row += [ms(taken), f"{flops / taken / bench.compute:.1%}", f"{taken / ours:.2f}"]
        table.add_row(*row, *[""] * (3 - 3 * len(library)), ms(twin))
    return table


def columns(*names: str) -> Table:
    table = Table(header_style="bold")
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left")
    return table


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="gpu", choices=["gpu", "tpu", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", help="of queries, and of matmuls that are the ceiling")
    parser.add_argument("--kv-dtype", help="of the pages: int8, float8_e4m3fn; default: as --dtype")
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = use_device(arguments.device)
    dtype = arguments.dtype
    bench = Bench(device, TINY if arguments.tiny else Plan(), dtype, arguments.kv_dtype or dtype)
    console = Console(width=120)
    console.print(
        f"{device.device_kind}: copies {bench.bandwidth / 1e9:.0f} GB/s, multiplies {bench.compute / 1e12:.1f} TFLOP/s "
        f"({dtype}); kernels {type(bench.kernels).__name__}, pages of {bench.plan.page_size}, {bench.heads.kv_dtype}"
    )
    for part in PARTS:
        if part.__name__ in arguments.parts:
            console.print(part(bench))


PARTS = (decode, uneven, prefill)

if __name__ == "__main__":
    main()
