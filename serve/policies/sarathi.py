"""Sarathi-Serve's stall-free batching (Agrawal et al. 2024, arXiv 2403.02310, sections 4.2 and 4.3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from collections.abc import Sequence as Row

from .policy import FirstCome


class SarathiServe(FirstCome):
    """Every ready decode in every step, then unfinished prompts, then new ones, under one token budget.

    Args:
        inter_token_ms: how long a step may take (ms), and so how long a stream may wait between two tokens.
            The budget becomes the largest compiled chunk whose step, measured beside decodes at full width,
            meets that (section 4.3). The measured step has no context: attention over long texts comes on top.
            None: the engine's max_num_batched_tokens.
    """

    def __init__(self, inter_token_ms: float | None = None):
        if inter_token_ms is not None and not inter_token_ms > 0:
            raise ValueError(f"inter_token_ms={inter_token_ms!r} must be a time in milliseconds, or None")
        super().__init__()
        self.inter_token_ms = inter_token_ms
        self.measured_ms: dict[int, float] = {}
        self.chosen: int | None = None

    def budget(self, limit: int) -> int:
        return limit if self.chosen is None else min(limit, self.chosen)

    def calibrate(self, chunks: Row[int], measure: Callable[[int], float]) -> None:
        if self.inter_token_ms is None:
            return
        self.chosen = chunks[0]
        for chunk in chunks:
            self.measured_ms[chunk] = 1e3 * measure(chunk)
            if self.measured_ms[chunk] > self.inter_token_ms:
                break
            self.chosen = chunk
        if self.measured_ms[chunks[0]] > self.inter_token_ms:
            warnings.warn(
                f"inter_token_ms={self.inter_token_ms} is not met: a step with the smallest chunk, {chunks[0]} "
                f"tokens, takes {self.measured_ms[chunks[0]]:.2f} ms; lower max_num_seqs, or allow more",
                stacklevel=2,
            )
