"""Trees drawn from a draft model, level by level: what SpecTr and Recursive Speculative Decoding have in common.

A level is the same number of slots in every row. The draft model runs the whole tree so far once a level, since a tree
mask speaks of a row's last slots only; its head runs on the newest level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ..sampling.keys import Purpose
from ..sampling.sampler import Sampler, SamplerState
from .draft import Draft, DraftShape, Model, Rows, Target, Verifier
from .draft_model import OpenedModel, open_model
from .speculation import tree_batch


class Choices(NamedTuple):
    """What a level is drawn from: logits behind all processors z and the distribution q f32[B,w,V] below each of the w
    slots of the level above (all on one token in greedy rows), greedy bool[B], valid bool[B,w], and keys[B]."""

    z: jax.Array
    q: jax.Array
    greedy: jax.Array
    valid: jax.Array
    keys: jax.Array


class Level(NamedTuple):
    """Drawn slots, siblings in the order in which they are to be tried: token and above i32[B,n], the place of each
    one's parent in the level above, and valid bool[B,n]; `memory` is handed to the next level's `grow`."""

    token: jax.Array
    above: jax.Array
    valid: jax.Array
    memory: Any = None


class Growth(Protocol):
    """How a level is drawn: the law that the verifier relies on."""

    @property
    def verifier(self) -> Verifier: ...

    def grow(self, choices: Choices, level: int, memory: Any) -> Level:
        """Level 1 and up; memory is None at level 1."""
        ...


# (tree so far, first slot of its newest level, level, state) -> (logits f32[B,w,V] of that level, state)
Look = Callable[[Draft, int, int, Any], tuple[jax.Array, Any]]


def draw_tree(
    growth: Growth, look: Look, state: Any, rows: Rows, depth: int, sampler: Sampler, seated: SamplerState
) -> tuple[Draft, Any]:
    """(a tree of `depth` levels below the root, with the distributions it was drawn from, state)."""
    B, zeros = len(rows.root), jnp.zeros((len(rows.root), 1), jnp.int32)
    tree = Draft(rows.root[:, None], zeros - 1, zeros, jnp.ones((B, 1), bool))
    first, probs, memory = 0, [], None
    for level in range(1, depth + 1):
        logits, state = look(tree, first, level - 1, state)
        w, position = logits.shape[1], rows.lengths + level - 1
        flat = logits.astype(jnp.float32).reshape(B * w, -1)
        seats, positions, live = (jnp.repeat(x, w) for x in (rows.seats, position, rows.live))
        z = sampler.process(seated, flat, seats, positions, live)
        q = sampler.probabilities(seated, z, seats).reshape(B, w, -1)
        keys = sampler.keys(seated, rows.seats, position, Purpose.DRAFT)
        greedy = seated.greedy[rows.seats]
        choices = Choices(z.reshape(q.shape), q, greedy, tree.valid[:, first:], keys)
        grown = growth.grow(choices, level, memory)
        memory, first, above = grown.memory, first + w, grown.above + first
        probs.append(q)
        tree = Draft(
            jnp.concatenate([tree.token, grown.token], 1), jnp.concatenate([tree.parent, above], 1),
            jnp.concatenate([tree.depth, jnp.full_like(above, level)], 1),
            jnp.concatenate([tree.valid, grown.valid], 1),
        )  # fmt: skip
    probs.append(jnp.zeros((B, tree.token.shape[1] - first, probs[0].shape[2]), jnp.float32))
    return replace(tree, probs=jnp.concatenate(probs, 1)), state


class OpenedTree(OpenedModel):
    """A draft model that draws trees."""

    def __init__(self, model: Any, seed: int, siblings: int, growth: Growth, target: Target):
        if siblings > target.config.vocab_size:
            raise ValueError(
                f"{growth!r} drafts {siblings} siblings, but the vocabulary has {target.config.vocab_size} tokens; "
                "lower it"
            )
        super().__init__(*open_model(model, seed, target), growth.verifier)
        self.growth = growth

    def propose(
        self, params: Any, state: tuple, rows: Rows, shape: DraftShape, sampler: Sampler, seated: SamplerState,
        model: Model,
    ) -> tuple[Draft, tuple, tuple]:  # fmt: skip
        def look(tree: Draft, first: int, level: int, state: tuple) -> tuple[jax.Array, tuple]:
            B, n = tree.token.shape
            batch = tree_batch(rows, tree, DraftShape(n, level, chain=n == 1), model.page_size)
            net, x, state = self.run(params, state, batch)
            newest = x.reshape(B, n, -1)[:, first:]
            logits = net.head(net.normalise(newest.reshape(B * (n - first), -1)))
            return logits.reshape(B, n - first, -1), state

        draft, state = draw_tree(self.growth, look, state, rows, shape.depth, sampler, seated)
        return draft, state, model.state
