"""Text as it is written, for loops and async loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from .interrupt import deferred_interrupt
from .outputs import RequestOutput
from .request import Request

if TYPE_CHECKING:
    from .llm import LLM


class Stream:
    """An iterator and an async iterator over pieces of one generation's text."""

    def __init__(self, llm: LLM, request: Request):
        self._llm, self._request, self._shown = llm, request, 0

    @property
    def output(self) -> RequestOutput:
        return self._request.output()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        sample = self._request.samples[0]
        with deferred_interrupt() as interrupted:
            while True:
                with self._llm._lock:
                    done = sample.finish_reason is not None
                    piece = sample.text[self._shown :]
                    if piece or done:
                        break
                    self._llm.engine.step()
                if interrupted():
                    self.close()
                    raise KeyboardInterrupt
        if not piece:
            raise StopIteration
        self._shown += len(piece)
        return piece

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        piece = await asyncio.to_thread(next, self, None)
        if piece is None:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Stop generating."""
        if not self._llm._closed:
            self._llm._abort([self._request])

    def __del__(self) -> None:
        # Garbage is collected anywhere, in the midst of a step too: the next step ends the request.
        self._llm.engine.cancelled.append(self._request)
