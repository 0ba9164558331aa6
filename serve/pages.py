"""The page allocator: who owns which page of the KV pool, and which pages' contents can be shared.

Page 0 is the null page: padding writes go there, nobody owns it, nobody reads it.

Prefix cache (vLLM's automatic prefix caching; Kwon et al. 2023, arXiv 2309.06180, section 4.4): a full page is
registered under a chained key, so that equal keys mean equal text from the first token on. A page has as many
owners as tables hold it. Without an owner it keeps its contents and waits, least recently used first, until the
allocator needs it; that is the only place where something is evicted. Nobody writes into a shared page: hits
are whole pages and tables are append-only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from .chain import Chain
from .snapshots import Snapshots

NULL_PAGE = 0


class PageAllocator:
    """`num_pages` pages of `page_size` tokens, the null page included.

    `off` says why pages are not shared; None: full pages are registered and found again. `snapshots` holds what
    recurrent layers remember at the ends of pages. `lookup_tokens` and `hit_tokens` count the prompt tokens that
    new sequences looked up and found. `hold`: a sequence owns pages for its text so far ("text"), from its start on for
    all that it may become ("limit": it cannot be recomputed), or until its prompt is computed ("prompt").
    "whole": as "limit", and prompts are not cut where that can be helped.
    """

    def __init__(
        self, num_pages: int, page_size: int, *, off: str | None = None, snapshots: Snapshots | None = None,
        hold: Literal["text", "limit", "whole", "prompt"] = "text",
    ):  # fmt: skip
        if num_pages < 2 or page_size < 1:
            raise ValueError(
                f"a page pool needs at least 2 pages (one is the null page) of at least 1 token; "
                f"got num_pages={num_pages}, page_size={page_size}"
            )
        self.num_pages, self.page_size, self.off = num_pages, page_size, off
        self.snapshots, self.hold, self.weight_version = snapshots, hold, 0
        self.lookup_tokens = self.hit_tokens = 0
        self._owners = [0] * num_pages
        self._blank = list(range(num_pages - 1, 0, -1))  # free, nothing worth keeping inside
        self._idle: OrderedDict[int, None] = OrderedDict()  # free, registered; the next to evict comes first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def sharing(self) -> bool:
        return self.off is None

    @property
    def free(self) -> int:
        """Pages that nobody owns, cached ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def cached(self) -> int:
        """Pages that are registered, owned or not."""
        return len(self._page_of)

    @property
    def capacity(self) -> int:
        """Tokens that one sequence could hold if it owned every page."""
        return (self.num_pages - 1) * self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    # -- owning --------------------------------------------------------------------------------------------

    def grow(self, pages: list[int], tokens: int) -> bool:
        """Extend `pages` to hold `tokens`; False, and nothing changed, when the pool has too few."""
        missing = self.pages_for(tokens) - len(pages)
        if missing > self.free:
            return False
        for _ in range(missing):
            page = self._blank.pop() if self._blank else self._evict()
            self._owners[page] = 1
            pages.append(page)
        return True

    def extend(self, pages: list[int], tokens: int) -> bool:
        """Room for a generation that is `tokens` long; False as `grow`."""
        if self.hold == "prompt":
            self.release(pages)
        return self.hold == "prompt" or self.grow(pages, tokens)

    def claim(self, pages: list[int], hits: list[int], tokens: int) -> bool:
        """Fill the empty table `pages` with the cached pages `hits` and fresh ones, to hold `tokens`; False, and
        nothing changed, when the pool has too few."""
        idle = sum(page in self._idle for page in hits)
        if self.pages_for(tokens) - len(hits) > self.free - idle:
            return False
        for page in hits:
            self._owners[page] += 1
            self._idle.pop(page, None)
        pages.extend(hits)
        return self.grow(pages, tokens)

    def release(self, pages: list[int], chain: Chain | None = None) -> None:
        """Give up all of `pages`, last first, and empty the list: leaves are evicted before their prefixes.

        Every key of `chain` is touched, whichever page holds it (a twin, when two sequences computed the same
        block side by side), so a prefix is never evicted before a text that continues it.
        """
        current = self.sharing and chain is not None and chain.version == self.weight_version
        while pages:
            page, index = pages.pop(), len(pages)
            self._owners[page] -= 1
            if chain is not None and current and index < chain.registered:
                holder = self._register(chain.keys[index], page)
                if holder in self._idle:
                    self._idle.move_to_end(holder)
            if self._owners[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def expire(self, keys: Sequence[bytes]) -> None:
        """Evict these blocks before all others, the last one first; not while somebody owns them."""
        for key in keys:
            page = self._page_of.get(key, NULL_PAGE)
            if page in self._idle:
                self._idle.move_to_end(page, last=False)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    # -- sharing -------------------------------------------------------------------------------------------

    def lookup(self, chain: Chain, tokens: Sequence[int]) -> list[int]:
        """The cached pages that `tokens` begin with, as many as leave one token to compute. Owns nothing."""
        hits: list[int] = []
        if not self.sharing:
            return hits
        for index in range((len(tokens) - 1) // self.page_size):
            page = self._page_of.get(chain.key(index, tokens, self.page_size))
            if page is None:
                break
            hits.append(page)
        return hits

    def cost(self, chain: Chain, tokens: Sequence[int], lookup: bool = True) -> int:
        """Free pages that a sequence of `tokens` would take: a cached page with an owner costs none."""
        self.renew(chain)
        hits = self.lookup(chain, tokens) if lookup else []
        return self.pages_for(len(tokens)) - sum(self._owners[page] > 0 for page in hits)

    def register(self, pages: list[int], chain: Chain, tokens: Sequence[int], stored: int) -> None:
        """Offer the full pages of a sequence, of whose known `tokens` the scheduled steps store `stored`.

        The device runs in order, so what is scheduled later may read them, in the same step too: a program
        writes its K and V before it reads.
        """
        full = min(stored, len(tokens)) // self.page_size
        if full <= chain.registered or not self.sharing or chain.version != self.weight_version:
            return
        for index in range(chain.registered, full):
            self._register(chain.key(index, tokens, self.page_size), pages[index])
        chain.registered = full

    def _register(self, key: bytes, page: int) -> int:
        """The page that holds `key`: `page`, unless another one did already."""
        holder = self._page_of.setdefault(key, page)
        if holder == page:
            self._key_of[page] = key
        return holder

    def renew(self, chain: Chain) -> None:
        """Let the chain of a sequence that starts (again) stand for the present weights."""
        if chain.version != self.weight_version:
            chain.version = self.weight_version
            chain.keys.clear()
        chain.registered = 0

    def new_weights(self) -> None:
        """Forget all contents: what was computed before is never found again, and its free pages are blank.
        Pages of running sequences stay theirs, and are never offered again under these chains."""
        self.weight_version += 1
        self._page_of.clear()
        self._key_of.clear()
        self._blank.extend(self._idle)
        self._idle.clear()
        if self.snapshots is not None:
            self.snapshots.clear()
