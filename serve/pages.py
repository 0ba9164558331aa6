"""The page allocator: who owns which page of the KV pool. Plain Python, no arrays.

Page 0 is the null page: padding writes go there, nobody owns it, nobody reads it.
"""

from __future__ import annotations

from collections import deque

NULL_PAGE = 0


class PageAllocator:
    """`num_pages` pages of `page_size` tokens, the null page included."""

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 2 or page_size < 1:
            raise ValueError(
                f"a page pool needs at least 2 pages (one is the null page) of at least 1 token; "
                f"got num_pages={num_pages}, page_size={page_size}"
            )
        self.num_pages, self.page_size = num_pages, page_size
        self._free = deque(range(1, num_pages))

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that one sequence could hold if it owned every page."""
        return (self.num_pages - 1) * self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def grow(self, pages: list[int], tokens: int) -> bool:
        """Extend `pages` to hold `tokens`; False, and nothing changed, when the pool has too few."""
        missing = self.pages_for(tokens) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            pages.append(self._free.popleft())
        return True

    def release(self, pages: list[int]) -> None:
        """Give back all of `pages`, last first, and empty the list."""
        while pages:
            self._free.append(pages.pop())
