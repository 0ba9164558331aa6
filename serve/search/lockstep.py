"""The device's part of a search in lock-step: choosing parents and tokens for all beams, and copying pages.

One backbone call serves all beams; then one program processes their logits, walks the groups in order (a scan over
[B', V] slices), and moves the state of every logits processor from parent to child. Programs depend on the number of
beams and of groups alone and are compiled when the first search of that kind is queued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..compiled import Job, compile_jobs, specs
from ..sampling.params import MAX_STOP_TOKENS
from ..sampling.sampler import Sampled, Sampler, SamplerState

if TYPE_CHECKING:
    from ..programs import Programs

# End-of-text and stop tokens of a request, as many as `TokenMask` bans for min_tokens.
ENDS = MAX_STOP_TOKENS + 16


class Given(NamedTuple):
    """What the host says of a choice for K beams in G groups.

    seats   i32[K]     where the beams sit
    score   f32[K]     their accumulated objective, penalties for diversity included; -inf: no beam yet
    logprob f32[K]     their accumulated log-probability
    live    bool[G]    groups that go on; the others weigh on nobody
    diversity f32[]    what a token costs for each beam of an earlier group that took it at this step
    ends    i32[ENDS]  tokens that end a text; V: unused
    """

    seats: Any
    score: Any
    logprob: Any
    live: Any
    diversity: Any
    ends: Any


class Chosen(NamedTuple):
    """What a choice brings, each [2,K] (on the device i32[5,2,K]): row 0 are the next beams, row 1 the texts
    that end (score -inf: none), best first in each group.

    parent i32, token i32, score f32 and logprob f32 (accumulated, with the token), own f32 (the token's own)
    """

    parent: Any
    token: Any
    score: Any
    logprob: Any
    own: Any

    @staticmethod
    def of(packed: Any) -> Chosen:
        """Read on the host; waits for the device."""
        numbers = np.asarray(packed)
        return Chosen(*numbers[:2], *np.ascontiguousarray(numbers[2:]).view(np.float32))


def choose_group(counts: jax.Array, group: tuple, diversity: jax.Array, ends: jax.Array) -> tuple:
    """(counts f32[V], chosen): one group of Diverse Beam Search (Vijayakumar et al. 2016, arXiv 1610.02424, equation 6
    with Hamming diversity); with counts 0 plain beam search. group: logp f32[b,V], score f32[b], live bool[].

    The next beams are the b best texts that go on; a text ends where it is among the b best of all. counts: how
    many beams of earlier groups took each token at this step, ended ones included.
    """
    logp, score, live = group
    b, V = logp.shape
    objective = score[:, None] + (logp - diversity * counts)
    going = objective.at[:, ends].set(-jnp.inf, mode="drop")
    row_best, row_token = jax.lax.top_k(going, min(b, V))
    best, at = jax.lax.top_k(row_best.reshape(-1), b)
    parent, token = at // row_best.shape[1], row_token.reshape(-1)[at]
    ending = jnp.where(ends < V, objective[:, jnp.minimum(ends, V - 1)], -jnp.inf)
    top, place = jax.lax.top_k(jnp.concatenate([best, ending.reshape(-1)]), b)
    ended = place >= b
    end_parent, end_token = (place - b) // len(ends), ends[(place - b) % len(ends)]
    parents = jnp.stack([parent, jnp.where(ended, end_parent, 0)])
    tokens = jnp.stack([token, jnp.where(ended, end_token, 0)])
    scores = jnp.stack([best, jnp.where(ended, top, -jnp.inf)])
    taken = (live & (scores > -jnp.inf)).astype(counts.dtype)
    counts = counts.at[tokens].add(taken, mode="drop")
    return counts, (parents, tokens, scores)


def choose(logp: jax.Array, given: Given) -> jax.Array:
    """i32[5,2,K], a packed `Chosen`, from log-probabilities f32[K,V]: group after group."""
    K, V = logp.shape
    G = len(given.live)
    grouped = jax.tree.map(lambda a: a.reshape(G, K // G, *a.shape[1:]), (logp, given.score))
    step = partial(choose_group, diversity=given.diversity, ends=given.ends)
    _, chosen = jax.lax.scan(step, jnp.zeros((V,), jnp.float32), (*grouped, given.live))
    parent, token, score = (jnp.moveaxis(a, 0, 1).reshape(2, K) for a in chosen)
    parent = parent + jnp.repeat(jnp.arange(G, dtype=jnp.int32) * (K // G), K // G)
    own = logp[parent, token]
    floats = jnp.stack([score, given.logprob[parent] + own, own])
    return jnp.concatenate([jnp.stack([parent, token]), jax.lax.bitcast_convert_type(floats, jnp.int32)])


def select(graphdef: nnx.GraphDef, sampler: Sampler) -> Callable:
    """(params, sampler_state, x [K,E], Given) -> (Sampled, sampler_state); the latter is donated. `detail` of what is
    sampled is a packed `Chosen`; each seat holds the state of its beam's parent, its token learned."""

    def run(params: Any, seated: SamplerState, x: jax.Array, given: Given):
        model = nnx.merge(graphdef, params)
        seats, positions = given.seats, seated.length[given.seats]
        live = jnp.ones(seats.shape, bool)
        z = sampler.process(seated, model.head(model.normalise(x)), seats, positions, live)
        chosen = choose(jax.nn.log_softmax(z, -1), given)
        parent, token = chosen[0, 0], chosen[1, 0]
        source = seats[parent]
        moved = jax.tree.map(lambda held: held.at[seats].set(held[source]), seated.processors)
        seated = sampler.learn(replace(seated, processors=moved), z[parent], token, seats, positions, live)
        return Sampled(token, chosen, jnp.zeros((len(seats), 0), jnp.float32)), seated

    return run


def take_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x [N,E] -> its rows i32[K], [K,E]."""
    return x[rows]


def copy_pages(state: tuple, sources: jax.Array, targets: jax.Array, layers: tuple[int, ...]) -> tuple:
    """Paged entries of a state (donated): page sources[i] of every layer -> page targets[i]. An entry's arrays hold
    the pages of so many `layers` one behind the other."""

    def copied(array: jax.Array, count: int) -> jax.Array:
        first = jnp.arange(count, dtype=jnp.int32)[:, None] * (array.shape[0] // count)
        source, target = (first + sources).reshape(-1), (first + targets).reshape(-1)
        return array.at[target].set(array[source])

    return tuple(
        jax.tree.map(partial(copied, count=count), entry) for entry, count in zip(state, layers, strict=True)
    )


class Key(NamedTuple):
    """Names a search's program among an engine's: what it does, for so many beams, groups, rows of x."""

    name: str
    beams: int
    groups: int = 1
    rows: int = 0


def compile_programs(programs: Programs, beams: int, groups: int) -> None:
    """Compile what a search of this size needs, unless it is there."""
    if Key("select", beams, groups) in programs.compiled:
        return

    def given(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=programs.whole)

    def build(function: Callable, donate: tuple[int, ...], *args: Any, out: Any = programs.whole) -> Job:
        placed = {} if programs.whole is None else {"out_shardings": out}
        return Job(jax.jit(function, donate_argnums=donate, **placed), args)

    x = jax.eval_shape(programs.hidden, programs.params)
    rows, state = given((beams,), jnp.int32), specs(programs.state)
    copying = partial(copy_pages, layers=tuple(entry.layers for entry in programs.state))
    jobs = {
        Key("select", beams, groups): build(
            select(programs.graphdef, programs.sampler), (1,), specs(programs.params), specs(programs.sampler_state),
            given((beams, *x.shape[1:]), x.dtype),
            jax.tree.map(lambda a: given(a.shape, a.dtype), blank(beams, groups)),
        ),
        Key("copy", beams): build(
            copying, (0,), state, rows, rows, out=jax.tree.map(lambda a: a.sharding, state)
        ),
    }  # fmt: skip
    for count in programs.plan.heads():
        wide = given((count, *x.shape[1:]), x.dtype)
        jobs[Key("rows", beams, rows=count)] = build(take_rows, (), wide, rows)
    programs.compiled |= compile_jobs(jobs)


def blank(beams: int, groups: int) -> Given:
    """The arrays of a choice, empty."""
    floats = np.zeros(beams, np.float32)
    return Given(
        np.zeros(beams, np.int32), floats, floats.copy(), np.ones(groups, bool), np.float32(0), np.zeros(ENDS, np.int32)
    )  # fmt: skip


def run_select(programs: Programs, x: jax.Array, rows: Sequence[int], given: Given) -> Sampled:
    """Dispatch a choice for the beams that stand in these rows of x."""
    beams = len(rows)
    picked = programs.compiled[Key("rows", beams, rows=x.shape[0])](x, np.array(rows, np.int32))
    sampled, programs.sampler_state = programs.compiled[Key("select", beams, len(given.live))](
        programs.params, programs.sampler_state, picked, given
    )
    sampled.detail.copy_to_host_async()
    return sampled


def run_copies(programs: Programs, beams: int, copies: Sequence[tuple[int, int]]) -> None:
    """Dispatch copies of pages (source, target), fewer than there are beams; the rest is the null page's."""
    if not copies:
        return
    pairs = np.zeros((2, beams), np.int32)
    pairs[:, : len(copies)] = np.array(copies, np.int32).T
    programs.state = programs.compiled[Key("copy", beams)](programs.state, pairs[0], pairs[1])
