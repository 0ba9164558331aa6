"""Collectives of a compiled program, read from its scheduled text.

XLA prints a scheduled module's instructions in the order in which they run, so between a collective's start and its
done stands what runs meanwhile. Loops are multiplied by their trip count, which is a constant of the loop's condition.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod

import numpy as np

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
WORK = (
    "fusion",
    "dot",
    "convolution",
    "custom-call",
    "while",
    "sort",
    "scatter",
    "gather",
    "ragged-dot",
    "call",
)
"""Operations during which a transfer counts as hidden."""
BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4,
    "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|called_computations|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a program. kind; axis: the mesh axes over which devices meet ("?" when the text does not
    say); group: devices that meet; bytes: of the largest buffer on one device, each time; times: how often in one run;
    hidden: it is asynchronous and something is computed between its start and its done."""

    kind: str
    axis: str
    group: int
    bytes: int
    times: int
    hidden: bool

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a run at least: a ring's, which is optimal (Thakur et al. 2005)."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes * self.times


@dataclass(frozen=True)
class _Line:
    """An instruction: its result's type, operation, operands and the rest of its line."""

    name: str
    type: str
    operation: str
    rest: str


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """The collectives of one run of a scheduled program on a mesh of these axes, equal ones counted together."""
    computations, entry = _computations(text)
    found: dict[Collective, int] = {}
    for one in _walk(computations, entry, 1, mesh, False):
        key = replace(one, times=0)
        found[key] = found.get(key, 0) + one.times
    return [replace(key, times=times) for key, times in found.items()]


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """Every computation's instructions in order, and the name of the entry."""
    computations: dict[str, list[_Line]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_parse(match[1], match[2]))
    if not entry:
        raise ValueError("the program's text has no ENTRY computation: give the text of a compiled module")
    return computations, entry


def _parse(name: str, text: str) -> _Line:
    """`type operation(operands), attributes`; the type of several results is in parentheses."""
    end, depth = text.find(" "), 0
    if text.startswith("("):
        for place, letter in enumerate(text):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                end = place + 1
                break
    operation, _, rest = text[end + 1 :].partition("(")
    return _Line(name, text[:end], operation, rest)


def _walk(
    computations: dict[str, list[_Line]], name: str, times: int, mesh: dict[str, int], hidden: bool
) -> Iterator[Collective]:
    """The collectives of a computation that runs `times` times, and of those that it calls; of a conditional, those
    of all branches."""
    lines = computations.get(name, [])
    yield from _in_fusions(computations, lines, times, mesh, hidden)
    for at, line in enumerate(lines):
        kind, called = line.operation.removesuffix("-start"), _called(computations, line)
        if kind in KINDS:
            starts = line.operation.endswith("-start")
            yield _collective(line, kind, times, mesh, hidden or (starts and _computes_until_done(lines, at)))
        elif line.operation == "async-start":
            for inner in called:
                yield from _walk(computations, inner, times, mesh, _computes_until_done(lines, at))
        elif line.operation == "while":
            for inner in called:
                yield from _walk(computations, inner, times * _trips(computations, line), mesh, hidden)
        elif line.operation in ("call", "conditional", "custom-call"):  # the last: what a SparseCore does
            for inner in called:
                yield from _walk(computations, inner, times, mesh, hidden)


def _called(computations: dict[str, list[_Line]], line: _Line) -> list[str]:
    """The computations that an instruction names."""
    names = [name for part in _CALLED.findall(line.rest) for name in _NAME.findall(part)]
    return [name for name in names if name in computations]


def _in_fusions(
    computations: dict[str, list[_Line]], lines: list[_Line], times: int, mesh: dict[str, int], hidden: bool
) -> Iterator[Collective]:
    """Collectives inside the fusions of a computation. libtpu writes an asynchronous one into several, which begin it,
    compute beside it (called async_collective_fusion, in a loop too) and end it, all naming its channel; one that
    stands alone there is waited for, unless the fusion multiplies too. An all-reduce of which only a slice is kept is a
    reduce-scatter."""
    places: dict[str, list[tuple[int, _Line, list[_Line]]]] = {}
    for at, line in enumerate(lines):
        beside = "calls=%async_collective_fusion" in line.rest
        inside = _inside(computations, line) if line.operation == "fusion" and not beside else []
        for one in inside:
            if one.operation in KINDS:
                channel = re.search(r"channel_id=(\d+)", one.rest)
                places.setdefault(channel[1] if channel else one.name, []).append((at, one, inside))
    for found in places.values():
        (first, one, inside), last = found[0], found[-1][0]
        busy = any(line.operation in WORK for line in lines[first + 1 : last])
        multiplies = any(line.operation in ("dot", "convolution") for line in inside)
        result = _collective(one, one.operation, times, mesh, hidden or busy or multiplies)
        sliced = one.operation == "all-reduce" and inside[-1].operation == "dynamic-slice"
        yield replace(result, kind="reduce-scatter") if sliced else result


def _inside(computations: dict[str, list[_Line]], fusion: _Line) -> list[_Line]:
    """The instructions of a fusion, those of fusions in it too."""
    found = []
    for name in _called(computations, fusion):
        for line in computations[name]:
            found += [*(_inside(computations, line) if line.operation == "fusion" else ()), line]
    return found


def _computes_until_done(lines: list[_Line], at: int) -> bool:
    """Whether work stands between a start and the instruction that ends it; where an update between them brings what
    is sent, between that and the end."""
    name, computes = lines[at].name, False
    for line in lines[at + 1 :]:
        if re.search(rf"%{re.escape(name)}(?![\w.\-])", line.rest):
            if line.operation.endswith("-done"):
                return computes
            if line.operation == "async-update":
                name, computes = line.name, False
        computes = computes or line.operation in WORK
    return computes


def _trips(computations: dict[str, list[_Line]], loop: _Line) -> int:
    """How often a loop's body runs: the constant that its condition compares with, over what the body adds to the
    counter (an unrolled loop more than 1); 1 when it is not constant."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
    lines = computations.get(condition[1], []) if condition else []
    constants = _constants(lines)
    for line in lines:
        if line.operation == "compare" and "direction=LT" in line.rest:
            for operand in _NAME.findall(line.rest.split(")")[0]):
                if operand in constants:
                    return -(-constants[operand] // _step(computations, loop))
    return 1


def _constants(lines: list[_Line]) -> dict[str, int]:
    """The whole numbers among the constants of a computation."""
    found = {line.name: re.match(r"\d+", line.rest) for line in lines if line.operation == "constant"}
    return {name: int(match[0]) for name, match in found.items() if match}


def _step(computations: dict[str, list[_Line]], loop: _Line) -> int:
    """What a loop's body adds to its counter, the first of its numbers that it counts up; 1 where that is not plain."""
    body = re.search(r"body=%([\w.\-]+)", loop.rest)
    lines = computations.get(body[1], []) if body else []
    by_name, constants = {line.name: line for line in lines}, _constants(lines)
    for name in _NAME.findall(lines[-1].rest) if lines else ():
        line = by_name.get(name)
        if line is not None and line.operation == "add" and line.type.startswith(("s32[]", "u32[]")):
            steps = [constants[one] for one in _NAME.findall(line.rest.split(")")[0]) if one in constants]
            return steps[0] if steps else 1
    return 1


def _collective(line: _Line, kind: str, times: int, mesh: dict[str, int], hidden: bool) -> Collective:
    groups = device_groups(line.rest)
    shapes = [prod(map(int, dims.split(","))) * BYTES.get(kind_, 4) if dims else BYTES.get(kind_, 4)
              for kind_, dims in _SHAPE.findall(line.type) if kind_ in BYTES]  # fmt: skip
    if groups is None:
        group, axis = prod(mesh.values()), "?"
    else:
        group, axis = len(groups[0]), _axis(groups, mesh)
    # A start returns its operand beside its result; a scatter's buffer is what goes in, a group of results.
    size = max(shapes, default=0) if line.operation.endswith("-start") else sum(shapes)
    return Collective(kind, axis, group, size * (group if kind == "reduce-scatter" else 1), times, hidden)


def device_groups(attributes: str) -> list[tuple[int, ...]] | None:
    """Who meets whom, from `replica_groups=` in any of XLA's three forms; None when there is none. Of a permute's pairs
    of sources and targets, those that are joined by any number of hops.

    {{0,1},{2,3}} lists; [2,2]<=[2,2]T(1,0) is an iota, reshaped, transposed and cut into rows; mesh['a'=2,'b'=2] {'b'}
    names axes of a row-major mesh.
    """
    if match := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", attributes):
        return _joined([tuple(_ints(part)) for part in re.findall(r"\{([\d, ]+)\}", match[1])])
    if match := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes):
        return [tuple(map(int, part.split(","))) for part in re.findall(r"\{([\d, ]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        rows, dims = _ints(match[1]), _ints(match[2])
        order = np.arange(prod(dims)).reshape(dims)
        order = order.transpose(_ints(match[3])) if match[3] else order
        return [tuple(map(int, row)) for row in order.reshape(rows)]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        chosen = re.findall(r"'([^']+)'", match[2])
        if all(name in sizes for name in chosen) and ":" not in match[2]:
            return _over(sizes, tuple(chosen))
    return None


def _joined(pairs: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Devices that pairs connect, directly or not."""
    groups: list[set[int]] = []
    for pair in pairs:
        touched = [group for group in groups if group.intersection(pair)]
        groups = [group for group in groups if group not in touched] + [set(pair).union(*touched)]
    return [tuple(sorted(group)) for group in groups]


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _over(mesh: dict[str, int], axes: tuple[str, ...]) -> list[tuple[int, ...]]:
    """The groups of devices that differ in these axes of a row-major mesh only."""
    names = list(mesh)
    order = [names.index(name) for name in names if name not in axes] + [names.index(name) for name in axes]
    devices = np.arange(prod(mesh.values())).reshape(list(mesh.values())).transpose(order)
    return [tuple(map(int, row)) for row in devices.reshape(-1, prod(mesh[name] for name in axes))]


def _axis(groups: list[tuple[int, ...]], mesh: dict[str, int]) -> str:
    """The mesh axes whose groups these are, as "kv x rep"; "?" when they are none's."""
    wanted = {frozenset(group) for group in groups}
    for count in range(1, len(mesh) + 1):
        for axes in combinations(mesh, count):
            if {frozenset(group) for group in _over(mesh, axes)} == wanted:
                return " x ".join(axes)
    return "?"
