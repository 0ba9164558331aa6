"""Exact cycles at the end of an output, found at the token that completes them.

A pattern of p tokens repeated c times is a run of p * (c - 1) tokens that each equal the token p places before.
So one number for each pattern size is kept, the length of that run, and a token costs one comparison a size,
whatever the length of the output. Names are vLLM's (`RepetitionDetectionParams`); `min_covered` is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

MAX_PATTERN_SIZE = 4096
MAX_COUNT = 1_000_000


@dataclass(frozen=True)
class RepetitionDetectionParams:
    """When an output that repeats itself ends, with finish_reason "repetition".

    max_pattern_size  longest pattern that is looked for, in tokens; 0 looks for none
    min_pattern_size  shortest one; 0 means 1. (A pattern of 1 repeated 12 times is also one of 4 repeated 3
                      times: to spare short repeats, raise min_count or min_covered.)
    min_count         copies of the pattern, one behind the other, that end the output; at least 2
    min_covered       tokens that the copies must cover together, so that short patterns need more of them
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0
    min_covered: int = 0

    def __post_init__(self) -> None:
        limits = {"max_pattern_size": MAX_PATTERN_SIZE, "min_pattern_size": MAX_PATTERN_SIZE}
        for field in fields(self):
            value, high = getattr(self, field.name), limits.get(field.name, MAX_COUNT)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
                raise ValueError(
                    f"repetition_detection: {field.name}={value!r} must be a whole number from 0 to {high}"
                )
        if self.max_pattern_size == 0:
            return
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError(
                f"repetition_detection: min_pattern_size={self.min_pattern_size} is more than "
                f"max_pattern_size={self.max_pattern_size}; lower the former or raise the latter"
            )
        if self.min_count < 2:
            raise ValueError(
                f"repetition_detection: min_count={self.min_count} must be at least 2 where "
                f"max_pattern_size={self.max_pattern_size} looks for patterns; a pattern that stands once does "
                "not repeat (max_pattern_size=0 turns the detection off)"
            )

    @staticmethod
    def of(value: Any) -> RepetitionDetectionParams | None:
        """None, the parameters themselves, or a dict of their fields, as a JSON request brings it."""
        if value is None or isinstance(value, RepetitionDetectionParams):
            return value
        known = [field.name for field in fields(RepetitionDetectionParams)]
        if not isinstance(value, Mapping) or not set(value) <= set(known):
            raise ValueError(
                f"repetition_detection={value!r} must be RepetitionDetectionParams, or a dict of some of "
                f"{', '.join(known)}"
            )
        return RepetitionDetectionParams(**value)


class RepetitionDetector:
    """Watches one output. `push` takes the next token and tells whether a qualifying repetition ends with it."""

    def __init__(self, params: RepetitionDetectionParams):
        sizes = np.arange(max(1, params.min_pattern_size), params.max_pattern_size + 1)
        self._first = sizes[0] - 1
        self._needed = np.maximum(sizes * (params.min_count - 1), params.min_covered - sizes)
        self._runs = np.zeros(len(sizes), np.int64)
        self._recent = np.full(params.max_pattern_size, -1, np.int64)  # newest first

    def push(self, token: int) -> bool:
        self._runs += 1
        self._runs *= self._recent[self._first :] == token
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = token
        return bool((self._runs >= self._needed).any())
