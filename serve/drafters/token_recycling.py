"""Token Recycling (Luo et al. 2024, arXiv 2408.08696): the candidates that a model did not choose are the next drafts.

For each token of the vocabulary a matrix i32[V,k] keeps the k most likely successors that any pass saw last. A draft is
a fixed tree filled by looking tokens up, level by level; the pass that verifies it writes new rows. The matrix is one
an engine, shared by its requests: it changes how fast tokens come, never which.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...attention.batch import Batch
from ..sampling.sampler import Sampler, SamplerState
from .draft import Accepted, Draft, DraftShape, Model, Pass, Rows, Target
from .matching import SampleMatching


@cache
def template(nodes: int, k: int, depth: int, fall: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(parents, ranks) of the `nodes` slots below the root that are most likely to be accepted, breadth first.

    A child of rank r is taken to follow with a probability in proportion to (r + 1) ** -fall, so a path is as likely as
    the product of its ranks'; the paper's template 2.2.2 (80 nodes, 8, 21, 25, 15, 8, 3 by depth) has the same form.
    """
    share = np.arange(1, k + 1, dtype=np.float64) ** -fall
    share /= share.sum() * 1.25  # the true token is none of the k in a fifth of all cases
    heap: list[tuple[float, tuple[int, ...]]] = [(-share[rank], (rank,)) for rank in range(k)]
    chosen: list[tuple[int, ...]] = []
    heapq.heapify(heap)
    while len(chosen) < nodes and heap:
        weight, path = heapq.heappop(heap)
        chosen.append(path)
        if len(path) < depth:
            for rank in range(k):
                heapq.heappush(heap, (weight * share[rank], (*path, rank)))
    paths = sorted(chosen, key=lambda path: (len(path), path))
    slots: dict[tuple[int, ...], int] = {(): 0}
    slots |= {path: index + 1 for index, path in enumerate(paths)}
    return tuple(slots[path[:-1]] for path in paths), tuple(path[-1] for path in paths)


@dataclass(frozen=True)
class TokenRecycling:
    """nodes: drafted slots a row (the paper's 80; fewer where computing them costs time, as on a CPU); candidates: k;
    depth: the longest line; fall: how fast the template trusts lower ranks less."""

    nodes: int = 80
    candidates: int = 8
    depth: int = 6
    fall: float = 1.7

    def __post_init__(self) -> None:
        for name in ("nodes", "candidates", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def shapes(self) -> tuple[DraftShape, ...]:
        parents, _ = template(self.nodes, self.candidates, self.depth, self.fall)
        return (DraftShape(len(parents) + 1, _deepest(parents), chain=False),)

    def open(self, target: Target) -> OpenedTokenRecycling:
        if self.candidates > target.config.vocab_size:
            raise ValueError(
                f"candidates={self.candidates} exceeds the vocabulary of {target.config.vocab_size}; lower it"
            )
        return OpenedTokenRecycling(self, target.config.vocab_size)


def _deepest(parents: tuple[int, ...]) -> int:
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    return max(depths)


class OpenedTokenRecycling:
    """params: nothing. state: the matrix i32[V,k]; a row of zeros is a token not seen yet."""

    history, follows, taps = False, False, ()
    verifier = SampleMatching()

    def __init__(self, settings: TokenRecycling, vocab: int):
        self.settings, self.params = settings, {}
        self.state = jax.device_put(np.zeros((vocab, settings.candidates), np.int32))
        self.parents, self.ranks = template(
            settings.nodes, settings.candidates, settings.depth, settings.fall
        )

    def follow(self, params: Any, state: jax.Array, batch: Batch) -> jax.Array:
        return state

    def propose(
        self, params: Any, state: jax.Array, rows: Rows, shape: DraftShape, sampler: Sampler,
        seated: SamplerState, model: Model,
    ) -> tuple[Draft, jax.Array, tuple]:  # fmt: skip
        B, token, depth, valid = len(rows.root), [rows.root], [0], [jnp.ones(rows.root.shape, bool)]
        for parent, rank in zip(self.parents, self.ranks):
            successors = state[token[parent]]
            token.append(successors[:, rank])
            depth.append(depth[parent] + 1)
            valid.append(valid[parent] & (successors != 0).any(1))

        def whole(numbers: list[int]) -> jax.Array:
            return jnp.broadcast_to(jnp.array(numbers, jnp.int32), (B, len(numbers)))

        draft = Draft(jnp.stack(token, 1), whole([-1, *self.parents]), whole(depth), jnp.stack(valid, 1))
        return draft, state, model.state

    def commit(
        self, params: Any, state: jax.Array, rows: Rows, draft: Draft, made: Pass, accepted: Accepted
    ) -> jax.Array:
        """Rows of the matrix for all tokens computed; of several slots with one token the one with the smallest slot,
        then row, writes."""
        V, k = state.shape
        used = (draft.valid & rows.live[:, None]).T.reshape(-1)
        token = jnp.where(used, draft.token.T.reshape(-1), V)
        order = jnp.arange(len(token), dtype=jnp.int32)
        first = jnp.full((V + 1,), len(token), jnp.int32).at[token].min(order)
        _, best = jax.lax.top_k(jnp.swapaxes(made.logits, 0, 1).reshape(-1, V), k)
        target = jnp.where(first[token] == order, token, V)
        return state.at[target].set(best.astype(jnp.int32), mode="drop")
