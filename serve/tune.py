"""`tokenloom tune`: measure tiles of the attention kernels on the device at hand, and remember the best.

A case (`Case`) is tried on several calls, which differ in batch and in lengths, because one choice serves them all: a
row's result must not depend on its batch. A candidate's score is the geometric mean of its times over the heuristic's.
One field of the tiles is searched after the other, all its candidates in turn in each round.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from ..attention.backends import backends
from ..attention.blockwise import Blockwise
from ..attention.ops import Backend
from ..model.config import AttentionConfig, ModelConfig
from ..pallas_kernels.attention.tiles import Case, TpuTiles, TritonTiles, TwinTiles
from ..pallas_kernels.attention.tpu import TpuKernels
from ..pallas_kernels.attention.triton import TritonKernels
from ..pallas_kernels.attention.tuned import Tuned, save, tiles_folder
from ..pallas_kernels.chips import Chip
from .buckets import BucketPlan
from .build import Build, choose_length, choose_numerics, pool_bytes, usual_page_size
from .workload import Heads, Inputs, Work, bursts, side_by_side

PLATFORMS = ("cpu", "tpu", "gpu", "cuda", "rocm")
# A choice must beat the heuristic by this much, and by a tenth of the noise: below that, chance decides.
MARGIN = 0.03
# Candidates that take this many times as long as the best of a round are not measured again.
SLACK = 1.5
# Above it the report says that something disturbs the device.
NOISE = 0.25

Tiles = TwinTiles | TpuTiles | TritonTiles


@dataclass(frozen=True)
class Sizes:
    """What the engine will be built with: tokens a sequence, sequences, tokens a step."""

    max_model_len: int = 4096
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 512

    def __post_init__(self) -> None:
        if min(self.max_model_len, self.max_num_seqs, self.max_num_batched_tokens) < 1:
            raise ValueError(f"{self} must have sizes of at least 1")


@dataclass(frozen=True)
class Choice:
    """Tiles for a case. `ratio`: their time over the heuristic's, the geometric mean of `works`; `seconds`: of each
    work, with the tiles chosen; `noise`: how far its median time lies above the smallest. `reason`: why the kernel
    cannot do the case; there are no tiles then."""

    case: Case
    works: tuple[Work, ...]
    heuristic: Tiles
    best: Tiles | None
    ratio: float = 1.0
    seconds: tuple[float, ...] = ()
    noise: float = 0.0
    reason: str = ""


def model_heads(config: ModelConfig, page_size: int, dtype: str, kv_dtype: str) -> list[Heads]:
    """The different attention layers of a model; ValueError when it has none."""
    mixers = [block.mixer for block in config.blocks if isinstance(block.mixer, AttentionConfig)]
    if not mixers:
        raise ValueError(f"{config.model_type} has no attention layer: there is nothing to tune")
    shapes = dict.fromkeys((m.heads, m.kv_heads, m.head_dim) for m in mixers)
    return [Heads(*shape, page_size, dtype, kv_dtype) for shape in shapes]


def works(heads: Heads, sizes: Sizes, quick: bool) -> list[tuple[Work, ...]]:
    """What is timed, one tuple a case: decodes of one sequence and of all, and prompts in every second chunk size,
    fresh and far into a text. Texts are as long as memory allows, at most `max_model_len`."""
    width, seats = -(-sizes.max_model_len // heads.page_size), sizes.max_num_seqs
    room = pool_bytes() // (4 * heads.token_bytes)

    def fitting(length: int, count: int = 1) -> int:
        return max(1, min(length, sizes.max_model_len, room // count))

    long, short = sizes.max_model_len, max(1, sizes.max_model_len // 8)
    decodes = [Work("rows", (fitting(long, seats),) * seats, width)]
    if not quick:
        short = fitting(short, 2 * seats)
        decodes += [Work("rows", (short,) * seats, width), Work("rows", (fitting(long),), width)]
        # One long text among short ones: the longest must not decide how long all take.
        decodes.append(Work("rows", (fitting(long, 2), *(short,) * (seats - 1)), width))
    found = [tuple(dict.fromkeys(decodes))]
    chunks = BucketPlan.make(seats, sizes.max_num_batched_tokens).chunks[::-1]
    for chunk in chunks[:1] if quick else chunks[::2]:
        count = -(-chunk // sizes.max_model_len)  # prompts that share it
        tokens = chunk // count
        far = fitting(tokens + sizes.max_model_len // 2, count)
        calls = [Work("prompt", (length,) * count, width, tokens) for length in (tokens, far)]
        found.append(tuple(calls[: 1 if quick or far <= tokens else 2]))
    return found


def fields(kind: type[Tiles], part: str) -> tuple[str, ...]:
    """The fields of these tiles that matter to a part, in the order in which they are searched."""
    rows = part == "rows"
    if kind is TwinTiles:
        return ("pages",) if rows else ("queries",)
    if kind is TpuTiles:
        return ("pages", "segment") if rows else ("queries", "pages")
    return (("keys", "segment", "programs") if rows else ("queries", "keys")) + ("warps", "stages")


def candidates(tiles: Tiles, name: str, case: Case, chip: Chip) -> list[Tiles]:
    """These tiles, and with one field changed: what a step of them needs fits in the chip's memory."""
    values = [value for value in _values(tiles, name, case, chip) if value != getattr(tiles, name)]
    return [tiles, *(other for value in values if fits(other := replace(tiles, **{name: value}), case, chip))]


def _values(tiles: Tiles, name: str, case: Case, chip: Chip) -> list[int]:
    size, tokens = case.page_size, max(16, case.tokens)
    if isinstance(tiles, TwinTiles):
        return _doubling(1, 32) if name == "pages" else _doubling(16, min(512, tokens))
    if isinstance(tiles, TpuTiles):
        if name == "pages":
            return _doubling(1, max(1, min(case.width, 2048 // size)))
        if name == "queries":
            return _doubling(8, min(512, tokens))
        step = tiles.pages * size
        lengths = (2048, 4096, 8192, 16384) if chip.cores > 1 else ()
        return [0, *(-(-length // step) * step for length in lengths)]
    return {
        "keys": _doubling(16, 256),
        "segment": [length for length in _doubling(128, 4096) if length % tiles.keys == 0],
        "queries": _doubling(max(1, 16 // case.group), max(1, 256 // case.group)),
        "warps": [1, 2, 4, 8],
        "stages": [1, 2, 3, 4],
        "programs": [1, 2, 3, 4, 6, 8],
    }[name]


def fits(tiles: Tiles, case: Case, chip: Chip) -> bool:
    """Whether the numbers go together, and the estimate of what a step needs is within the chip's fast memory."""
    if isinstance(tiles, TpuTiles):
        return tiles.vmem_bytes(case) <= chip.memory
    if isinstance(tiles, TritonTiles):
        return tiles.segment % tiles.keys == 0 and tiles.shared_bytes(case) <= chip.memory
    return True


def _doubling(first: int, last: int) -> list[int]:
    return [first << i for i in range(32) if first << i <= last]


def kind_of(backend: Backend) -> type[Tiles]:
    """The tiles that a back end has; ValueError when it has none."""
    kinds: list[tuple[type, type[Tiles]]] = [
        (Blockwise, TwinTiles), (TpuKernels, TpuTiles), (TritonKernels, TritonTiles)
    ]  # fmt: skip
    for kernel, kind in kinds:
        if isinstance(backend, kernel):
            return kind
    raise ValueError(f"{type(backend).__name__} has no tiles to tune")


def tune_case(backend: Backend, chip: Chip, heads: Heads, calls: tuple[Work, ...], rounds: int) -> Choice:
    """Search the tiles of one case: see the head of this file."""
    case, kind = calls[0].case(heads), kind_of(backend)
    heuristic = best = kind.choose(case, chip)
    inputs = [Inputs(work, heads, backend, _copies(work, heads)) for work in calls]
    bench = _Bench(backend, case, heads, inputs)
    try:
        bench.times([heuristic], rounds=0)
    except NotImplementedError as reason:
        return Choice(case, calls, heuristic, None, reason=str(reason))
    for name in fields(kind, case.part):
        others = candidates(best, name, case, chip)
        if len(others) > 1:
            best = others[min(range(len(others)), key=bench.scores(others, rounds).__getitem__)]
    ratio, seconds, noise = bench.compare(heuristic, best, 3 * rounds)
    if best == heuristic or ratio > 1 - max(MARGIN, noise / 10):
        return Choice(case, calls, heuristic, heuristic, 1.0, tuple(pair[0] for pair in seconds), noise)
    return Choice(case, calls, heuristic, best, ratio, tuple(pair[1] for pair in seconds), noise)


@dataclass(frozen=True)
class _Bench:
    """The calls of one case, with their inputs on the device."""

    backend: Any
    case: Case
    heads: Heads
    inputs: list[Inputs]

    def times(self, tiles: Sequence[Tiles], rounds: int) -> list[list[float]]:
        """Seconds [tiles][work], side by side. Candidates that the compiler or the kernel refuses take forever,
        unless it is the first one: the error comes through."""
        columns = []
        for one in self.inputs:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                calls = list(pool.map(partial(self._call, one, first=tiles[0]), tiles))
            taken = iter(side_by_side([call for call in calls if call is not None], rounds, slack=SLACK))
            columns.append([math.inf if call is None else next(taken) for call in calls])
        return [list(row) for row in zip(*columns)]

    def compare(self, before: Tiles, after: Tiles, rounds: int) -> tuple[float, list[list[float]], float]:
        """(ratio, seconds of both for each work, noise): the geometric mean over works of after to before, of the
        smallest times or of the medians of pairs of one round, whichever speaks less for a change; noise is how far
        the median lies above the smallest, at worst."""
        seconds, medians, noise = [], [], 0.0
        for one in self.inputs:
            calls = [one.caller(self._with(tiles), self.heads.spec()) for tiles in (before, after)]
            taken = [times[1:] for times in bursts(calls, rounds)]
            medians.append(median(b / a for a, b in zip(*taken)))
            seconds.append([min(times) for times in taken])
            noise = max(noise, median(taken[0]) / min(taken[0]) - 1)
        ratio = max(_mean(b / a for a, b in seconds), _mean(medians))
        return ratio, seconds, noise

    def scores(self, tiles: Sequence[Tiles], rounds: int) -> list[float]:
        """The mean ratio of each to the first."""
        times = self.times(tiles, rounds)
        return [_mean(a / b for a, b in zip(row, times[0])) for row in times]

    def _call(self, one: Inputs, tiles: Tiles, first: Tiles) -> Callable[[], Any] | None:
        try:
            return one.caller(self._with(tiles), self.heads.spec())
        except (NotImplementedError, jax.errors.JaxRuntimeError):
            if tiles == first:
                raise
            return None

    def _with(self, tiles: Tiles) -> Backend:
        return replace(self.backend, tuned=Tuned(((self.case, tiles),)))


def _mean(ratios: Iterable[float]) -> float:
    """The geometric mean."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logarithms) / len(logarithms))


def _copies(work: Work, heads: Heads) -> int:
    """Sets of pages, so that caches of up to 64 MiB hold no call's pages until their next turn."""
    return max(
        1,
        min(16, -(-(128 << 20) // max(1, work.kv_bytes(heads))), pool_bytes() // (4 * work.kv_bytes(heads))),
    )


def tune(shapes: Sequence[Heads], sizes: Sizes, folder: Path, quick: bool, console: Console) -> list[Choice]:
    """Measure every case of these layers on the default device, print a table, and save what was found.

    ValueError when the device has no tiles, or the table in `folder` cannot be written.
    """
    device = jax.devices()[0]
    if device.platform not in PLATFORMS:
        raise ValueError(
            f"{device.platform} has no attention kernels to tune; there are some for {', '.join(PLATFORMS)}"
        )
    chip, rounds = Chip.of(device), 2 if quick else 5
    backend = backends(chip)[0]
    kind_of(backend)
    save(folder, chip, [])  # a table that cannot be written says so now
    console.print(f"{type(backend).__name__} on {device.device_kind} ({chip.name}), {sizes}")
    choices = []
    for heads in shapes:
        for calls in works(heads, sizes, quick):
            with console.status(
                f"{heads.heads}/{heads.kv_heads} heads of {heads.head_dim}: {', '.join(map(str, calls))}"
            ):
                choices.append(tune_case(backend, chip, heads, calls, rounds))
    console.print(as_table(choices))
    measured = [
        (one.case, one.best, {"ratio": round(one.ratio, 4), "seconds": max(one.seconds)})
        for one in choices
        if one.best
    ]
    path = save(folder, chip, measured)
    better = sum(one.best is not None and one.best != one.heuristic for one in choices)
    console.print(f"{len(measured)} cases measured, {better} better than the heuristic; saved in {path}")
    noise = max((one.noise for one in choices), default=0.0)
    if noise > NOISE:
        console.print(
            f"times vary by {noise:.0%}: other work disturbs this device; tune again when it is quiet"
        )
    return choices


def as_table(choices: Sequence[Choice]) -> Table:
    """The heuristic beside the best of each case."""
    table = Table(
        "heads", "dtype", "works", "heuristic", "best", "ms", "time / heuristic", header_style="bold"
    )
    for one in choices:
        case = one.case
        table.add_row(
            f"{case.kv_heads * case.group}/{case.kv_heads} x {case.head_dim}",
            case.kv_dtype,
            "\n".join(map(str, one.works)),
            _shown(one.heuristic, case),
            one.reason if one.best is None else "=" if one.best == one.heuristic else _shown(one.best, case),
            "\n".join(f"{seconds * 1e3:.3f}" for seconds in one.seconds),
            "" if one.best is None else f"{one.ratio:.2f}",
        )
    return table


def _shown(tiles: Tiles, case: Case) -> str:
    return " ".join(f"{name}={getattr(tiles, name)}" for name in fields(type(tiles), case.part))


def run(
    model: str | None, heads: tuple[int, int, int], dtype: str | None, kv_cache_dtype: str | None,
    page_size: int | None, max_model_len: int | None, seats: int, tokens: int, quick: bool,
) -> list[Choice]:  # fmt: skip
    """The command: layers from a model's config, or (heads, KV heads, head dim); sizes as the engine's."""
    from ..model import checkpoint

    config = None if model is None else checkpoint.load_config(checkpoint.resolve(model))[1]
    numerics = choose_numerics(dtype, "bfloat16" if config is None else config.dtype)
    length = max_model_len or (4096 if config is None else choose_length(config, None))
    size = page_size or usual_page_size(length)
    build = Build(length, seats, tokens, None, size, 0, False, kv_cache_dtype=kv_cache_dtype)
    dtypes = numerics.dtype.name, build.kv_dtype(numerics.dtype).name
    shapes = [Heads(*heads, size, *dtypes)] if config is None else model_heads(config, size, *dtypes)
    return tune(shapes, Sizes(length, seats, tokens), tiles_folder(), quick, Console())
