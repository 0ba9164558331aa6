"""Speculation in an engine: its programs, its part of a step, and what it achieved.

A step with drafts is one program: propose, the target's pass over all slots, accept, commit. A step that carries a
prompt chunk, or a row whose next tokens hang on the host (a grammar), drafts nothing; the drafter then follows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...attention.batch import Batch, Shape, descriptor_size, make_batch, unpack
from ...attention.caches.policy import CachePolicy
from ...model.config import ModelConfig
from ...model.decoder import Decoder
from ..sampling.sampler import Sampled, Sampler, SamplerState
from .controller import Always, Controller
from .draft import Draft, Drafter, DraftShape, Model, Pass, Rows, Target
from .history import History

if TYPE_CHECKING:
    from ..programs import Programs


@dataclass
class Acceptance:
    """What speculation achieved: `rows` verified with `drafted` tokens at most, and how many of them emitted at least
    i + 1 tokens (`emitted[i]`; the first is the target's own)."""

    rows: int = 0
    drafted: int = 0
    emitted: list[int] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a row's verification emitted on average; 1 is plain decoding."""
        return sum(self.emitted) / self.rows if self.rows else 0.0

    def add(self, depth: int, count: int) -> None:
        self.rows += 1
        self.drafted += depth
        self.emitted.extend([0] * (depth + 1 - len(self.emitted)))
        for place in range(count):
            self.emitted[place] += 1


def stand(programs: Programs, length: int) -> None:
    """Let the padding seat's text be so long, for steps that are measured."""
    state = programs.sampler_state
    lengths = np.array(state.length)
    lengths[programs.plan.max_num_seqs] = length
    programs.sampler_state = replace(state, length=jax.device_put(lengths, state.length.sharding))


class Speculation:
    """A drafter and its controller, bound to a target."""

    def __init__(self, drafter: Drafter, target: Target, controller: Controller | None = None):
        self.drafter, self.opened = drafter, drafter.open(target)
        self.controller = Always() if controller is None else controller
        self.params, self.state = self.opened.params, self.opened.state
        self.acceptance = Acceptance()

    @property
    def shapes(self) -> tuple[DraftShape, ...]:
        return self.drafter.shapes

    @property
    def slots(self) -> int:
        """The most slots of a draft."""
        return max(shape.slots for shape in self.shapes)

    def sampler(self, sampler: Sampler, size: int) -> Sampler:
        """The sampler with what the drafter wants to know of each seat's text, of at most `size` tokens."""
        if not self.opened.history:
            return sampler
        return sampler.with_processor(History(size))

    def calibrate(self, programs: Programs) -> None:
        """Let the controller measure the compiled programs."""
        self.controller.calibrate(self.shapes, programs.plan.widths, partial(self.measure, programs))

    def measure(self, programs: Programs, shape: DraftShape | None, rows: int, repeats: int = 3) -> float:
        """Seconds of a step of decodes with this draft (None: plain) at a width: the best of `repeats`. All its rows
        stand at the padding seat, half way to the longest text, so no request's state changes."""
        plain = Shape(rows, 1, 0, 0)
        packed = np.zeros(descriptor_size(plain, programs.width), np.int32)
        packed[:rows], packed[rows : 2 * rows], packed[2 * rows : 3 * rows] = 1, programs.plan.max_num_seqs, 1
        best, half = float("inf"), programs.width * programs.page_size // 2
        for _ in range(repeats + 1):
            stand(programs, half)
            start = time.perf_counter()
            jax.block_until_ready(programs.step(plain, packed, draft=shape)[0].token)
            best = min(best, time.perf_counter() - start)
        stand(programs, 0)
        return best

    def choose(self, rows: int) -> DraftShape | None:
        """The draft of the next step, for so many rows; None: decode plainly."""
        return self.controller.choose(rows)

    def observe(self, shape: DraftShape, emitted: list[int]) -> None:
        """What each row of a step with this draft emitted."""
        for count in emitted:
            self.acceptance.add(shape.depth, count)
        self.controller.observe(shape, emitted)

    # -- a step --------------------------------------------------------------------------------------------

    def step(self, programs: Programs, shape: DraftShape, rows: int, packed: np.ndarray) -> Sampled:
        """Dispatch a step with drafts for a width of `rows`."""
        with jax.profiler.TraceAnnotation("verify"):
            sampled, programs.state, programs.sampler_state, self.state = programs.compiled[shape, rows](
                programs.params, programs.state, programs.sampler_state, self.params, self.state, packed
            )
        return sampled

    def follow(self, programs: Programs, shape: Shape, packed: np.ndarray) -> None:
        """Dispatch what the drafter does beside a step without drafts."""
        if self.opened.follows:
            seated = programs.sampler_state
            self.state = programs.compiled["follow", shape](
                self.params, self.state, seated.last_token, seated.length, packed
            )

    # -- programs ------------------------------------------------------------------------------------------

    def jobs(
        self, programs: Programs, build: Callable[..., Any], spec: Callable[[Any], Any], ints: Callable[..., Any],
        places: Any,
    ) -> dict[Any, Callable[[], Any]]:  # fmt: skip
        """Key -> what compiles that program; `build`, `spec` and `ints` are those of `Programs`, `places` is where the
        target's state lies."""
        plan, width, size = programs.plan, programs.width, programs.page_size
        params, state, seated = spec(programs.params), spec(programs.state), spec(programs.sampler_state)
        drafting, drafts, whole = spec(self.params), spec(self.state), programs.whole
        jobs: dict[Any, Callable[[], Any]] = {}
        for draft in self.shapes:
            for rows in plan.widths:
                run = self.verifies(programs.graphdef, programs.sampler, draft, rows, width, size)
                packed = ints((descriptor_size(Shape(rows, 1, 0, 0), width),))
                jobs[draft, rows] = build(
                    f"verify_B{rows}_q{draft.slots}", run, (1, 2, 4), params, state, seated, drafting, drafts, packed,
                    out=(whole, places, whole, whole),
                )  # fmt: skip
        for shape in plan.backbones() if self.opened.follows else ():
            run, packed = self.follows(shape, width, size), ints((descriptor_size(shape, width),))
            name = f"follow_B{shape.B}_C{shape.C}"
            jobs["follow", shape] = build(
                name, run, (1,), drafting, drafts, seated.last_token, seated.length, packed
            )
        return jobs

    def verifies(self, graphdef: nnx.GraphDef, sampler: Sampler, shape: DraftShape, rows: int, width: int,
                 page_size: int) -> Callable:  # fmt: skip
        """(params, state, sampler_state, draft params, draft state, packed) -> (Sampled, state, sampler_state, draft
        state); the three states are donated."""
        opened = self.opened

        def run(
            params: Any, state: tuple, seated: SamplerState, drafting: Any, drafts: Any, packed: jax.Array
        ):
            decoder = nnx.merge(graphdef, params)
            row = read_rows(rows, width, packed, seated)
            model = Model(decoder, state, page_size)
            draft, drafts, state = opened.propose(drafting, drafts, row, shape, sampler, seated, model)
            batch = tree_batch(row, draft, shape, page_size)
            made, state = target_pass(decoder, state, batch, opened.taps)
            logits = made.logits
            accepted, seated = opened.verifier.accept(sampler, seated, draft, logits, row, shape.depth)
            if not shape.chain:
                state = tuple(entry.commit(batch, accepted.path) for entry in state)
            drafts = opened.commit(drafting, drafts, row, draft, made, accepted)
            return accepted.sampled, state, seated, drafts

        return run

    def follows(self, shape: Shape, width: int, page_size: int) -> Callable:
        """(draft params, draft state, last_token, length, packed) -> draft state, donated: a step without drafts."""
        opened = self.opened

        def run(drafting: Any, drafts: Any, last_token: jax.Array, length: jax.Array, packed: jax.Array):
            return opened.follow(
                drafting, drafts, unpack(shape, width, page_size, packed, last_token, length)
            )

        return run


def read_rows(B: int, width: int, packed: jax.Array, seated: SamplerState) -> Rows:
    """The rows of a step's descriptor; how long they are only the device knows."""
    seats, live = packed[B : 2 * B], packed[:B] > 0
    table = packed[3 * B : (3 + width) * B].reshape(B, width)
    return Rows(jnp.where(live, seated.length[seats], 1), seats, live, table, seated.last_token[seats])


def tree_batch(rows: Rows, draft: Draft, shape: DraftShape, page_size: int) -> Batch:
    """The target's batch: slot j of a row is stored j behind its root."""
    B, N = draft.token.shape
    return make_batch(
        Shape(B, N, 0, 0), page_size, tokens=draft.token.reshape(-1),
        lengths=jnp.where(rows.live, rows.lengths - 1 + N, 0), page_table=rows.page_table,
        query_starts=jnp.zeros((1,), jnp.int32), seats=rows.seats,
        depths=None if shape.chain else draft.depth,
        ancestors=None if shape.chain else draft.ancestors(),
    )  # fmt: skip


def target_pass(decoder: Decoder, state: tuple, batch: Batch, taps: tuple[int, ...]) -> tuple[Pass, tuple]:
    """(the pass over a draft's slots, state), in spans of layers between the taps."""
    x, seen, B, N = decoder.embed(batch.tokens, batch), [], batch.shape.B, batch.shape.q
    for first, last in pairwise((0, *taps, decoder.num_layers)):
        x, state = decoder.run(x, state, batch, range(first, last))
        seen.append(x.reshape(B, N, -1))
    logits = decoder.head(decoder.normalise(x)).reshape(B, N, -1)
    return Pass(logits, tuple(seen[:-1]), decoder), state


def check_drafter(drafter: Drafter, cache: CachePolicy, config: ModelConfig, *, devices: int) -> None:
    """ValueError where an engine cannot speculate."""
    if config.recurrent:
        raise ValueError(
            f"drafter={drafter!r} needs rejected tokens forgotten, but {config.model_type} has recurrent layers, whose "
            "state cannot go back; leave drafter=None"
        )
    if not cache.abilities.can_roll_back:
        raise ValueError(
            f"drafter={drafter!r} needs rejected tokens forgotten, which cache={cache!r} cannot; leave one of them None"
        )
    if devices > 1:
        raise ValueError(
            f"drafter={drafter!r} drafts on one device, but the model is split over {devices}; leave one of them out"
        )
