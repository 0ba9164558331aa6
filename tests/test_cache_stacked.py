"""Caches of layers that run under a scan and share arrays: layer by layer the numbers of arrays of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom.attention.caches.gear import Int4KV
from tokenloom.attention.caches.h2o import H2O
from tokenloom.attention.caches.policy import CachePolicy, Capacity
from tokenloom.attention.caches.streaming import StreamingLLM
from tokenloom.tests.cache_cases import CONFIG, PAGE, SEATS, WIDTH, Layer, text

# Where codes are rounded, a last bit may become a step of f16.
POLICIES = {
    "streaming": (StreamingLLM(2, 6), 1e-5),
    "h2o": (H2O(4, 3), 1e-5),
    "int4": (Int4KV(4, 4, 4), 3e-3),
}
LENGTH, PROMPT, LAYERS = 16, 9, 2


class Stacked(Layer):
    """Layer `at` of LAYERS that share arrays, as a scan hands it out."""

    def __init__(self, policy: CachePolicy):
        super().__init__(policy)
        capacity = Capacity(1 + SEATS * WIDTH, PAGE, SEATS, width=WIDTH)
        self.at, self.state = 0, [policy.create(CONFIG, 0, capacity, LAYERS)]
        plain = self.step

        def step(state, *given):
            index = jnp.int32(self.at)
            out, (new,) = plain([state[0].layer(index)], *given)
            return out, [state[0].put(index, new)]

        self.step = step


@pytest.mark.parametrize("name", list(POLICIES))
def test_layers_that_share_arrays_are_those_that_do_not(name):
    policy, near = POLICIES[name]
    plain, both, states = Layer(policy), Stacked(policy), []
    empty = jax.tree.map(jnp.copy, both.state)
    for at in range(LAYERS):
        both.at, one = at, text(LENGTH, at)
        np.testing.assert_allclose(both.serve(0, one, PROMPT), plain.serve(0, one, PROMPT), atol=near)
        states.append(both.state[0])
    second = jnp.int32(1)
    for a, b in zip(*(jax.tree.leaves(one.layer(second)) for one in (empty[0], states[0]))):
        if a.ndim and a.shape[0] == SEATS + 1:  # by seat; pools are whole
            np.testing.assert_array_equal(a, b, "the first layer wrote to the second one's seats")
    again = both.at = 0
    place, one = LENGTH - 1, text(LENGTH, again)
    got = (
        both.run({0: one}, {0: place}, {})[0] if name != "h2o" else None
    )  # its state moved on with that token
    if got is not None:
        np.testing.assert_allclose(got, plain.serve(0, one, PROMPT)[place:], atol=near)
