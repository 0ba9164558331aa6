"""What the laws of caches run on: texts of random queries, keys and values, served by one layer's state."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenloom.attention.batch import Shape, make_batch
from tokenloom.attention.caches.policy import CachePolicy, Capacity
from tokenloom.attention.caches.relay import pass_on
from tokenloom.attention.ops import AttentionSpec, dense
from tokenloom.model.config import AttentionConfig, RopeConfig
from tokenloom.model.rope import rotate

PAGE, WIDTH, DIM = 4, 8, 16
CONFIG = AttentionConfig(4, 2, DIM, 0.25, RopeConfig(10000.0, DIM))
SPEC = AttentionSpec(CONFIG.scale)
MIXED = Shape(2, 1, 2, 16)
SEATS = 4

Text = tuple[np.ndarray, np.ndarray, np.ndarray]


def turn(x, positions):
    return rotate(x, positions, CONFIG.rope)


def text(length: int, seed: int) -> Text:
    """Raw q [T,Hq,D], k and v [T,Hkv,D]; a few keys are much larger, as in models."""
    draw = np.random.default_rng(seed)
    q = draw.standard_normal((length, CONFIG.heads, DIM)) * 2
    k, v = draw.standard_normal((2, length, CONFIG.kv_heads, DIM))
    return tuple(x.astype(np.float32) for x in (q, k * (1 + 2 * (draw.random((length, 1, 1)) > 0.8)), v))


def dense_outputs(one: Text, spec: AttentionSpec = SPEC, seen: np.ndarray | None = None) -> np.ndarray:
    """What full attention gives: [T,Hq,D]; `seen` bool[T,T] (query, key) hides more."""
    positions = jnp.arange(len(one[0]), dtype=jnp.int32)
    q, k = (turn(jnp.asarray(x), positions) for x in one[:2])
    return np.asarray(dense(q, k, jnp.asarray(one[2]), positions, positions, spec, seen)[0])


@dataclass
class Layer:
    """A layer's state and its rows: texts sit in seats and have pages, in a shuffled order. Where layers differ, two
    run with the same queries, keys and values, and the second one's output counts."""

    policy: CachePolicy
    spec: AttentionSpec = SPEC
    layers: tuple[int, ...] = (2, 3)
    page: int = PAGE
    width: int = WIDTH
    shape: Shape = MIXED
    state: Any = None
    step: Any = None
    done: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        capacity = Capacity(1 + SEATS * self.width, self.page, SEATS, width=self.width)
        layers = self.layers[-1:] if self.policy.abilities.layers_alike else self.layers
        self.state = [self.policy.create(CONFIG, layer, capacity) for layer in layers]
        pages = np.random.default_rng(0).permutation(np.arange(1, 1 + SEATS * self.width))
        self.tables = pages.reshape(SEATS, self.width).astype(np.int32)
        self.step = jax.jit(partial(_step, spec=self.spec, shape=self.shape, page=self.page))

    def run(
        self, texts: dict[int, Text], decodes: dict[int, int], prompts: dict[int, tuple[int, int]],
        final: tuple[int, ...] = (), garbage: float = 0.0,
    ) -> dict[int, np.ndarray]:  # fmt: skip
        """One step: `decodes` gives rows {seat: place of its token}, `prompts` {seat: (start, stop)}; `final` seats'
        prompts are complete. Padding tokens hold `garbage`. Returns {seat: out [n,Hq,D]}."""
        shape, rows = self.shape, self.shape.rows
        lengths, seats = np.zeros(rows, np.int32), np.full(rows, SEATS, np.int32)
        table, starts, ends = (
            np.zeros((rows, self.width), np.int32),
            np.zeros(shape.R + 1, np.int32),
            np.zeros(rows, bool),
        )
        flat = [np.full((shape.T, *x.shape[1:]), garbage, np.float32) for x in next(iter(texts.values()))]
        where = {}
        for row, (seat, place) in enumerate(decodes.items()):
            lengths[row], seats[row], table[row], ends[row] = place + 1, seat, self.tables[seat], True
            where[seat] = slice(row, row + 1)
            for all_, one in zip(flat, texts[seat]):
                all_[row] = one[place]
        at = 0
        for row, (seat, (start, stop)) in enumerate(prompts.items()):
            index, count = shape.B + row, stop - start
            lengths[index], seats[index], table[index], ends[index] = (
                stop,
                seat,
                self.tables[seat],
                seat in final,
            )
            where[seat] = slice(shape.B + at, shape.B + at + count)
            for all_, one in zip(flat, texts[seat]):
                all_[where[seat]] = one[start:stop]
            at += count
            starts[row + 1 :] = at
        assert at <= shape.C
        packed = dict(lengths=lengths, page_table=table, query_starts=starts, seats=seats, ends=ends)
        out, self.state = self.step(self.state, *flat, {k: jnp.asarray(x) for k, x in packed.items()})
        out = np.asarray(out)
        return {seat: out[place] for seat, place in where.items()}

    def serve(self, seat: int, one: Text, prompt: int, chunks: int | None = None) -> np.ndarray:
        """A text alone: its prompt in chunks of so many tokens, then a token a step; out [T,Hq,D]."""
        chunks, parts = chunks or self.shape.C, []
        for start in range(0, prompt, chunks):
            stop = min(start + chunks, prompt)
            final = (seat,) if stop == prompt else ()
            parts.append(self.run({seat: one}, {}, {seat: (start, stop)}, final)[seat])
        for place in range(prompt, len(one[0])):
            parts.append(self.run({seat: one}, {seat: place}, {})[seat])
        return np.concatenate(parts)


def _step(state, q, k, v, packed, *, spec, shape, page):
    batch = make_batch(shape, page, tokens=jnp.zeros(shape.T, jnp.int32), **packed)
    out = None
    for index, entry in enumerate(state := list(state)):
        out, state[index] = entry.attend(q, k, v, batch, spec, turn)
        pass_on(state, index)
    return out, state
