"""A step on its way: what was dispatched, and what the host reads of it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .drafters.draft import DraftShape
from .gang import Gang
from .outputs import Logprob
from .request import make_logprobs
from .sampling.sampler import Sampled, read
from .scheduler import Chunk, Sequence
from .tokenizer import Tokenizer


class Emitted(NamedTuple):
    """A token, its log-probabilities if they were asked for, and what its request must bring along to resume."""

    token: int
    entry: dict[int, Logprob] | None
    carry: list[float] | None


@dataclass(frozen=True)
class Launched:
    """A dispatched step: its sampled tokens (on the device), which row belongs to whom, prompt scores, what was drafted
    in it, and the gangs that chose in it."""

    sampled: Sampled
    rows: list[tuple[int, Sequence, int]]
    logprobs: bool
    carry: bool
    scores: Any
    scored: list[tuple[int, Chunk]]
    draft: DraftShape | None = None
    gangs: tuple[Gang, ...] = ()

    def send(self) -> None:
        """Start the copies to the host of what will be read."""
        sampled = self.sampled
        for array, wanted in (
            (sampled.token, True),
            (sampled.detail, self.logprobs),
            (sampled.carry, self.carry),
        ):
            if wanted:
                array.copy_to_host_async()
        if sampled.count is not None:
            sampled.count.copy_to_host_async()

    @property
    def ready(self) -> bool:
        """Whether `read` need not wait."""
        token: Any = self.sampled.token
        return token.is_ready()

    def read(self, tokenizer: Tokenizer | None) -> Iterator[tuple[Sequence, list[Emitted]]]:
        """What each sequence emitted, where it is the generation that was dispatched still. Waits for the device."""
        sampled = self.sampled
        tokens = np.asarray(sampled.token)
        tokens = tokens.reshape(len(tokens), -1)
        rows, T = tokens.shape
        counts = np.ones(rows, np.int32) if sampled.count is None else np.asarray(sampled.count)
        detail = np.asarray(sampled.detail) if self.logprobs else None
        scores = None if detail is None else read(detail.reshape(rows * T, -1))
        carry = np.asarray(sampled.carry).reshape(rows, T, -1) if self.carry else None
        for row, sequence, epoch in self.rows:
            if sequence.finished or sequence.epoch != epoch:
                continue
            params, emitted = sequence.owner.request.params, []
            for place, token in enumerate(tokens[row, : counts[row]].tolist()):
                entry = None
                if scores is not None and params.logprobs is not None:
                    entry = make_logprobs(tokenizer, token, scores, row * T + place, params.logprobs)
                held = carry[row, place].tolist() if carry is not None and params.carries else None
                emitted.append(Emitted(token, entry, held))
            yield sequence, emitted
