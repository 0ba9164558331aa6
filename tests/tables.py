"""Draft and target models that are tables over the last token, and many rows that draw from them at once."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenloom.serve.drafters.draft import Accepted, Draft, Rows, Verifier
from tokenloom.serve.drafters.drawn_tree import Growth, draw_tree
from tokenloom.serve.sampling.sampler import Sampler, SamplerState


class Drawn(NamedTuple):
    """Trees that were drawn, one a row, and the target's logits of all their slots."""

    sampler: Sampler
    state: SamplerState
    rows: Rows
    tree: Draft
    logits: jax.Array
    depth: int

    def judged(self, verifier: Verifier) -> Accepted:
        """What a verifier emits."""

        @jax.jit
        def run(state, tree, logits, rows):
            return verifier.accept(self.sampler, state, tree, logits, rows, self.depth)[0]

        return run(self.state, self.tree, self.logits, self.rows)


def draw(growth: Growth, depth: int, target: np.ndarray, draft: np.ndarray, draws: int) -> Drawn:
    """Trees of `depth` levels below token 0 in `draws` rows; target and draft f64[V,V]: the law behind each token."""
    p, q = (jnp.log(jnp.asarray(table, jnp.float32)) for table in (target, draft))
    sampler, ids = Sampler(len(target), draws, (), max_logprobs=1), jnp.arange(draws, dtype=jnp.int32)
    seeds = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (draws + 1, 2)), jnp.uint32)
    lengths = jnp.full((draws,), 5, jnp.int32)
    state = replace(
        sampler.init(), seeds=seeds, greedy=jnp.zeros(draws + 1, bool), length=jnp.append(lengths, 0)
    )
    rows = Rows(lengths, ids, jnp.ones(draws, bool), jnp.zeros((draws, 0), jnp.int32), jnp.zeros_like(ids))

    @jax.jit
    def run(rows, state):
        def look(tree, first, level, held):
            return q[tree.token[:, first:]], held

        tree, _ = draw_tree(growth, look, None, rows, depth, sampler, state)
        return tree, p[tree.token]

    return Drawn(sampler, state, rows, *run(rows, state), depth)
