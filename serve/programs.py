"""The compiled programs of a step.

A step is two programs, dispatched back to back: the backbone (by token bucket), which runs the blocks and
gathers one row of x per request, and the head (by request bucket), which normalises, projects, processes and
samples. So programs are a sum and not a product. Backbones are one function keyed by Shape(B, q, R, C).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..attention.batch import Shape, descriptor_size, unpack
from ..attention.caches.recurrent import RecurrentState
from ..sharding.tokens import Alike, StepTokens
from .buckets import BucketPlan
from .compilations import Compilations
from .compiled import Compiler, Job, specs
from .drafters.draft import DraftShape
from .drafters.speculation import Speculation
from .sampling.params import SamplingParams
from .sampling.sampler import Sampled, Sampler, prompt_logprobs

SCORE_ROWS = 32


def backbone(
    graphdef: nnx.GraphDef, shape: Shape, width: int, page_size: int, prompt: int,
    tokens: StepTokens = Alike(),
) -> Callable:  # fmt: skip
    """(params, state, last_token, length, packed, prompt_length) -> (x rows [B+R,E], prompt x, state); state is
    donated. prompt_length: tokens of each seat's prompt, for models whose generated tokens take fewer layers.

    Prompt x is padded to the largest chunk, [prompt,E], so that one program scores every chunk size; without a
    prompt part it is [0,E]. On a mesh, `tokens` says how its devices share the step.
    """

    def run(
        params: Any, state: tuple, last_token: jax.Array, length: jax.Array, packed: jax.Array,
        prompt_length: jax.Array | None = None,
    ):  # fmt: skip
        model = nnx.merge(graphdef, params)
        batch = unpack(shape, width, page_size, packed, last_token, length)
        if prompt_length is not None:
            batch = replace(batch, prompt_lengths=prompt_length[batch.seats])
        parts = tokens.split(batch)
        xs = tuple(tokens.placed(model.embed(part.tokens, part), part) for part in parts)
        xs, state = model.run(xs, state, parts, range(model.num_layers))
        x = tokens.joined(xs, shape)
        rest = x[shape.B * shape.q :]
        pad = prompt - shape.C if shape.C else 0
        return x[batch.last_tokens], jnp.pad(rest, ((0, pad), (0, 0))), state

    return run


def head(graphdef: nnx.GraphDef, sampler: Sampler) -> Callable:
    """(params, sampler_state, x [N,E], meta i32[3N]) -> (Sampled, sampler_state); sampler_state is donated.

    meta: lengths, seats, and 1 where the row samples; the length by seat is the position of the sampled token.
    """

    def run(params: Any, sampler_state: Any, x: jax.Array, meta: jax.Array):
        model = nnx.merge(graphdef, params)
        _, seats, samples = meta.reshape(3, x.shape[0])
        logits = model.head(model.normalise(x))
        return sampler.sample(sampler_state, logits, seats, sampler_state.length[seats], samples > 0)

    return run


def score(graphdef: nnx.GraphDef, max_logprobs: int) -> Callable:
    """(params, prompt x [C,E], targets i32[C], used) -> packed log-probabilities of the targets, a block of rows
    at a time, for as many blocks as hold `used` tokens."""

    def run(params: Any, x: jax.Array, targets: jax.Array, used: jax.Array):
        model = nnx.merge(graphdef, params)
        rows = min(SCORE_ROWS, x.shape[0])
        pad = -x.shape[0] % rows
        x, targets = jnp.pad(x, ((0, pad), (0, 0))), jnp.pad(targets, (0, pad))

        def block(index, out):
            part = jax.lax.dynamic_slice_in_dim(x, index * rows, rows)
            goals = jax.lax.dynamic_slice_in_dim(targets, index * rows, rows)
            packed = prompt_logprobs(model.head(model.normalise(part)), goals, max_logprobs)
            return jax.lax.dynamic_update_slice_in_dim(out, packed, index * rows, 0)

        K = min(max_logprobs, model.config.vocab_size)
        out = jnp.zeros((x.shape[0], 2 + 2 * K), jnp.int32)
        return jax.lax.fori_loop(0, (used + rows - 1) // rows, block, out)

    return run


def copy_rows(state: tuple, source: jax.Array, target: jax.Array) -> tuple:
    """Recurrent entries of a state (donated): row `source` of each, a seat or a snapshot slot, -> `target`."""
    return tuple(entry.copy(source, target) for entry in state)


class Programs:
    """The compiled grid of one model, with the arrays that outlive a step: state and sampler state."""

    def __init__(
        self, graphdef: nnx.GraphDef, params: Any, state: tuple, sampler: Sampler, plan: BucketPlan, *,
        page_size: int, width: int, period: int | None = None, strict: bool = False,
        whole: jax.sharding.Sharding | None = None, speculation: Speculation | None = None,
        tokens: StepTokens = Alike(), compiler: Compiler | None = None,
    ):  # fmt: skip
        """`whole`: the sharding of what is replicated, all but params and state; None: the default device."""
        self.graphdef, self.params, self.state = graphdef, params, state
        self.sampler, self.plan, self.speculation, self.tokens = sampler, plan, speculation, tokens
        self.page_size, self.width, self.period = page_size, width, period
        self.compiler = compiler or Compiler()
        self.whole, self.sampler_state = whole, sampler.start(self.compiler, whole)
        self.compiled: dict[Any, Any] = {}
        self.compilations = Compilations(strict, str(plan))

    def _jobs(self) -> dict[Any, Job]:
        """The programs by key."""
        plan, hidden = self.plan, jax.eval_shape(self.hidden, self.params)
        params, state, sampler_state = specs(self.params), specs(self.state), specs(self.sampler_state)
        given = partial(jax.ShapeDtypeStruct, sharding=self.whole)
        row = jax.tree.map(
            lambda a: given(a.shape, a.dtype), self.sampler.row(SamplingParams(), prompt_ids=[0])
        )
        ints = partial(given, dtype=jnp.int32)

        def x(rows: int) -> jax.ShapeDtypeStruct:
            return given((rows, *hidden.shape[1:]), hidden.dtype)

        def build(
            name: str, function: Callable, donate: tuple[int, ...], *args: Any, out: Any = self.whole,
            options: dict[str, str | bool] | None = None,
        ):  # fmt: skip
            function = jax.named_scope(name)(function)  # in traces: the program and its operations
            function.__name__ = name
            placed = {} if self.whole is None else {"out_shardings": out}
            return Job(jax.jit(function, donate_argnums=donate, **placed), args, options=options or {})

        def places(specs: tuple) -> tuple:
            return jax.tree.map(lambda spec: spec.sharding, specs)

        jobs: dict[Any, Job] = {}
        for shape in plan.backbones():
            run = backbone(self.graphdef, shape, self.width, self.page_size, plan.chunks[-1], self.tokens)
            packed = ints((descriptor_size(shape, self.width),))
            name = f"{shape.kind}_B{shape.B}_q{shape.q}_R{shape.R}_C{shape.C}"
            out = self.whole, self.whole, places(state)
            seated = sampler_state.last_token, sampler_state.length
            given_all = *seated, packed, sampler_state.prompt_length
            options = self.tokens.options(shape)
            jobs[shape] = build(name, run, (1,), params, state, *given_all, out=out, options=options)
        for rows in plan.heads():
            run = head(self.graphdef, self.sampler)
            jobs["head", rows] = build(
                f"head_{rows}", run, (1,), params, sampler_state, x(rows), ints((3 * rows,))
            )
        run, chunk = score(self.graphdef, self.sampler.max_logprobs), plan.chunks[-1]
        jobs["score"] = build("score", run, (), params, x(chunk), ints((chunk,)), ints(()))
        if self._recurrent(state):
            kept = self._recurrent(state)
            jobs["copy"] = build("copy", copy_rows, (0,), kept, ints(()), ints(()), out=places(kept))
        for rows in plan.widths if self.sampler.constrains else ():
            masks = given((rows, -(-self.sampler.vocab_size // 32)), jnp.uint32)
            run = self.sampler.constrain
            jobs["mask", rows] = build("mask", run, (0,), sampler_state, ints((rows,)), masks)
        jobs["admit"] = build("admit", self.sampler.admit, (0,), sampler_state, ints(()), row)
        if self.speculation is not None:
            jobs |= self.speculation.jobs(self, build, specs, ints, places(state))
        return jobs

    def hidden(self, params: Any) -> jax.Array:
        """A row of x as the head takes it, [1,E]; only its shape and dtype say something."""
        model = nnx.merge(self.graphdef, params)
        return model.normalise(jnp.zeros((1, model.config.hidden_size), model.numerics.dtype))

    def compile(self, progress: bool = True) -> None:
        """Make the whole grid, in parallel threads."""
        self.compiled = self.compiler.compile(self._jobs(), progress)

    def save(self, folder: str | Path, progress: bool = True) -> Path:
        """Compile the whole grid anew and write it to a new folder, for engines that start on it."""
        return self.compiler.save(folder, self._jobs(), progress)

    @staticmethod
    def _recurrent(state: tuple) -> tuple:
        return tuple(entry for entry in state if isinstance(entry, RecurrentState))

    def copy(self, source: int, target: int) -> None:
        """Copy a row of the recurrent state in place: seats come first, snapshot slots after them."""
        moved = iter(self.compiled["copy"](self._recurrent(self.state), np.int32(source), np.int32(target)))
        self.state = tuple(next(moved) if isinstance(e, RecurrentState) else e for e in self.state)

    def admit(self, seat: int, row: dict[str, np.ndarray]) -> None:
        """Put a request's sampling parameters into a seat."""
        self.sampler_state = self.compiled["admit"](self.sampler_state, np.int32(seat), row)

    def constrain(self, seats: np.ndarray, masks: np.ndarray) -> None:
        """Put the masks u32[M, ceil(V/32)] of grammars at seats i32[M]; M is one of the plan's widths."""
        self.sampler_state = self.compiled["mask", len(seats)](self.sampler_state, seats, masks)

    def step(
        self, shape: Shape, packed: np.ndarray, between: Callable[[jax.Array], Sampled | None] | None = None,
        draft: DraftShape | None = None,
    ) -> tuple[Sampled, jax.Array | None]:  # fmt: skip
        """Dispatch the two programs of a step, with what is to be done `between` them (given x; what it sampled, if
        it did, stands for the head's), or the one of a step with drafts; nothing waits. Returns (Sampled, prompt x
        [C,E])."""
        if self.speculation is not None and draft is not None:
            return self.speculation.step(self, draft, shape.B, packed), None
        with jax.profiler.TraceAnnotation(shape.kind):
            if self.speculation is not None:
                self.speculation.follow(self, shape, packed)
            x, prompt_x, self.state = self.compiled[shape](
                self.params,
                self.state,
                self.sampler_state.last_token,
                self.sampler_state.length,
                packed,
                self.sampler_state.prompt_length,
            )
            sampled = None if between is None else between(x)
            if sampled is None:
                meta = packed[: 3 * shape.rows]
                sampled, self.sampler_state = self.compiled["head", shape.rows](
                    self.params, self.sampler_state, x, meta
                )
        return sampled, prompt_x

    def measure(self, chunk: int, repeats: int = 3) -> float:
        """Seconds of a step with `chunk` prompt tokens beside decodes at full width: the best of `repeats`. Its
        rows are all idle, so they write where padding does and no request's state changes."""
        plan = self.plan
        shape = Shape(plan.max_num_seqs if plan.max_num_seqs > 1 else 0, 1, plan.prompt_rows, chunk)
        packed = np.zeros(descriptor_size(shape, self.width), np.int32)
        packed[shape.rows : 2 * shape.rows] = plan.max_num_seqs
        best = float("inf")
        for _ in range(repeats + 1):
            start = time.perf_counter()
            jax.block_until_ready(self.step(shape, packed)[0].token)
            best = min(best, time.perf_counter() - start)
        return best

    def score(self, prompt_x: jax.Array, targets: np.ndarray, used: int) -> jax.Array:
        """Packed log-probabilities of `targets` i32[C] after each of the first `used` prompt tokens."""
        return self.compiled["score"](self.params, prompt_x, targets, np.int32(used))

    def close(self) -> None:
        """Free the device memory."""
        drafting = None if self.speculation is None else (self.speculation.params, self.speculation.state)
        for leaf in jax.tree.leaves((self.params, self.state, self.sampler_state, drafting)):
            leaf.delete()
        self.compiled.clear()
