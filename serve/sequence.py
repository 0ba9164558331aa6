"""What the scheduler speaks of: a sequence, a chunk of its prompt, and the work of a step. Plain Python, no arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .chain import Chain
from .snapshots import Trail

if TYPE_CHECKING:
    from .drafters.draft import DraftShape
    from .gang import Gang


@dataclass(eq=False, slots=True)
class Sequence:
    """One generation. `tokens` are those the host has read; `pending` were sampled but not yet read.

    `computed` counts tokens whose K and V the dispatched steps store; `limit` is the length at which the
    sequence ends; `ahead` counts what drafts may add at most to the certain `computed` and `known` (the device knows,
    the host will read it); `epoch` rises at each preemption, and results of an older epoch are dropped.

    `chain` names its blocks to the prefix cache, where it looks itself up if `lookup` says so; `cached` tokens
    were found when it first started; `branch` and `trail` are the marks of `snapshots`, `rank` is the policy's.
    `gang` are those that it runs in lock-step with: only the first of these `members` waits in line.
    """

    tokens: list[int]
    limit: int
    owner: Any = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    pending: int = 0
    ahead: int = 0
    epoch: int = 0
    seat: int = -1
    decoding: bool = False
    finished: bool = False
    chain: Chain = field(default_factory=Chain)
    lookup: bool = True
    cached: int = 0
    branch: int = 0
    trail: Trail | None = None
    priority: int = 0
    tenant: str | None = None
    rank: Any = None
    gang: Gang | None = None

    @property
    def members(self) -> list[Sequence]:
        return [self] if self.gang is None else self.gang.members

    @property
    def known(self) -> int:
        return len(self.tokens) + self.pending


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` prompt tokens of a sequence from `start`; `final` when they reach its last known token."""

    sequence: Sequence
    start: int
    count: int
    final: bool


@dataclass(frozen=True, slots=True)
class Work:
    """One step: the sequences that decode one token (or verify a `draft`), the prompt chunks, and who took a seat.

    Recurrent state is copied slot -> seat before the step (`loads`) and seat -> slot after it (`saves`).
    """

    decodes: list[Sequence]
    chunks: list[Chunk]
    admitted: list[Sequence]
    loads: list[tuple[int, int]] = field(default_factory=list)
    saves: list[tuple[int, int]] = field(default_factory=list)
    draft: DraftShape | None = None
