"""The identity of a text's blocks: what two sequences must have in common to share pages or snapshots."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b


@dataclass(slots=True)
class Chain:
    """The keys of a text's full blocks: key i = digest(key i-1, tokens of block i).

    `root` (adapter, cache salt) and the version of the weights start the chain: texts that differ there share
    nothing. `registered` counts the leading blocks whose pages were offered to the cache.
    """

    root: tuple[str | None, str | None] = (None, None)
    version: int = -1
    keys: list[bytes] = field(default_factory=list)
    registered: int = 0

    def key(self, index: int, tokens: Sequence[int], block: int) -> bytes:
        """The key of block `index`; `tokens` reach its end at least."""
        while len(self.keys) <= index:
            at = len(self.keys)
            parent = self.keys[-1] if at else repr((self.root, self.version)).encode()
            text = array("i", tokens[at * block : (at + 1) * block]).tobytes()
            self.keys.append(blake2b(parent + text, digest_size=16).digest())
        return self.keys[index]
