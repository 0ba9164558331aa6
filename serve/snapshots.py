"""Snapshots of recurrent state: what a recurrent layer remembers at the end of a block of tokens.

Pages keep every position; a recurrent state is only what it is now, so a prefix can be taken up again only
where somebody copied the state. Copies lie in a bounded pool of slots, least recently used out first, under the
chain key of the block that they end (`chain.Chain`). A hit needs the pages and a snapshot at one boundary.

Which boundaries are worth a slot, and a chunk that ends there (compare Marconi, arXiv 2411.19379, section 4):
- a prompt's last full block, always: a repeated prompt and the next turn of a chat begin with it. The cut costs
  one more chunk of less than a block, which mostly rides along with decodes;
- a branch: the last block that an earlier text shares (its pages are registered, but nobody kept a snapshot).
  One more text with this prefix was seen, so a third is likely; the first time nobody could have known;
- the trail: where the budget cuts a prompt anyhow (rounded down to a block, if one is left), and each block end
  of a generation. It costs no chunk, but a long text has many: a sequence keeps its newest only, for the next
  turn and for its own return after a preemption.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scheduler import Sequence


@dataclass(slots=True)
class Trail:
    """A sequence's newest copy at `length` tokens; without `key` while the host has not read them all."""

    slot: int
    length: int
    key: bytes | None = None


class Snapshots:
    """`slots` copies at ends of blocks of `block` tokens. Saves of a step are found from the next one on."""

    def __init__(self, slots: int, block: int):
        self.slots, self.block = slots, block
        self._free = list(range(slots - 1, -1, -1))
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # the next to evict comes first
        self._saves: list[tuple[int, int]] = []
        self._coming: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Slots that hold nothing, or a copy that may be evicted."""
        return len(self._free) + len(self._slot_of)

    # -- finding -------------------------------------------------------------------------------------------

    def deepest(self, keys: Row[bytes]) -> int:
        """How many of the leading blocks `keys` the longest copied prefix has."""
        return next((n for n in range(len(keys), 0, -1) if keys[n - 1] in self._slot_of), 0)

    def load(self, key: bytes) -> int:
        """The slot of a key that `deepest` found."""
        self._slot_of.move_to_end(key)
        return self._slot_of[key]

    def comes(self, key: bytes) -> bool:
        """True when the step being scheduled copies this block's end: worth waiting a step for."""
        return key in self._coming

    # -- saving --------------------------------------------------------------------------------------------

    def end(self, sequence: Sequence, end: int) -> int:
        """Where a chunk that could reach `end` should stop."""
        start, known, block = sequence.computed, sequence.known, self.block
        if start < sequence.branch < end:
            return sequence.branch
        goal = (known - 1 if end == known else end) // block * block
        return goal if start < goal else end

    def save(self, sequence: Sequence, version: int, *, prompt: bool) -> None:
        """Copy the state after this step, when it ends a block that is worth it. `prompt`: the step computes
        a prompt chunk."""
        at, block, chain = sequence.computed, self.block, sequence.chain
        if at % block or chain.version != version:
            return
        key = chain.key(at // block - 1, sequence.tokens, block) if at <= len(sequence.tokens) else None
        if key is not None and (key in self._slot_of or key in self._coming):
            return
        keep = prompt and at in (sequence.branch, (sequence.known - 1) // block * block)
        if not keep:
            self._forget(sequence)
        slot = self._take()
        if slot is None:
            return
        self._saves.append((sequence.seat, slot))
        if key is not None:
            self._coming[key] = slot
        if not keep:
            sequence.trail = Trail(slot, at, key)

    def settle(self, sequence: Sequence, version: int) -> None:
        """Name the trail of a generation once the host has read its tokens."""
        trail = sequence.trail
        if trail is None or trail.key is not None or len(sequence.tokens) < trail.length:
            return
        if sequence.chain.version == version:
            trail.key = sequence.chain.key(trail.length // self.block - 1, sequence.tokens, self.block)
            self._name(trail.key, trail.slot)

    def close(self, sequence: Sequence, version: int) -> None:
        """The sequence leaves its seat: its trail stays when it can be named."""
        self.settle(sequence, version)
        if sequence.trail is not None and sequence.trail.key is None:
            self._free.append(sequence.trail.slot)
        sequence.trail = None

    def _forget(self, sequence: Sequence) -> None:
        """Give up the copy that a newer one replaces."""
        trail, sequence.trail = sequence.trail, None
        if trail is None:
            return
        if trail.key is None:
            self._free.append(trail.slot)
        elif self._slot_of.get(trail.key) == trail.slot:
            self._free.append(self._slot_of.pop(trail.key))

    def flush(self) -> list[tuple[int, int]]:
        """(seat, slot) to copy after the step that was scheduled."""
        saves, self._saves = self._saves, []
        for key, slot in self._coming.items():
            self._name(key, slot)
        self._coming.clear()
        return saves

    def clear(self) -> None:
        """Forget every copy."""
        self._free.extend(self._slot_of.values())
        self._slot_of.clear()

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        return self._slot_of.popitem(last=False)[1] if self._slot_of else None

    def _name(self, key: bytes, slot: int) -> None:
        if key in self._slot_of:
            self._free.append(slot)
        else:
            self._slot_of[key] = slot
