"""What one layer found out for the layers behind it: it rides in the state's entries while a step runs.

An entry's `choice` is None between steps. A decoder calls `pass_on` behind each layer, which moves the layer's choice
to the next entry that takes one, whatever layers lie between.
"""

from __future__ import annotations

from typing import Any, Self


class Relay:
    """An entry that takes what an earlier one chose, and may choose."""

    choice: Any

    def given(self, choice: Any) -> Self:
        """The same with this choice; a new one replaces it in `attend`."""
        raise NotImplementedError


def pass_on(entries: list, index: int) -> None:
    """Layer `index` has run: its choice goes to the next entry that takes one, or is forgotten."""
    entry = entries[index]
    if not isinstance(entry, Relay) or entry.choice is None:
        return
    entries[index] = entry.given(None)
    for later in range(index + 1, len(entries)):
        following = entries[later]
        if isinstance(following, Relay):
            entries[later] = following.given(entry.choice)
            return
