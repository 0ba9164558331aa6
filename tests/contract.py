"""The exactness contract: what a request generates does not depend on how it was served.

Tokens are identical, except where the two candidates at the first difference lie within 2e-4 after processors and
noise, or where an edge of min-p, top-k or top-p does; such places are counted. A sampled token is the inverse of a
cumulative sum at one uniform number, so two candidates are near there when a shift of 2e-4 between the logits on
both sides of the boundary moves it over the number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenloom.attention.batch import rectangle
from tokenloom.attention.caches.recurrent import Stateless
from tokenloom.attention.caches.uncached import Uncached
from tokenloom.model.config import AttentionConfig, ModelConfig
from tokenloom.serve.engine import Engine
from tokenloom.serve.outputs import CompletionOutput, RequestOutput
from tokenloom.serve.pages import PageAllocator
from tokenloom.serve.policies.policy import Policy
from tokenloom.serve.programs import Programs
from tokenloom.serve.request import bad_word_ids
from tokenloom.serve.sampling.keys import Purpose, row_keys, uniform
from tokenloom.serve.sampling.params import SamplingParams
from tokenloom.serve.sampling.processors import Context
from tokenloom.serve.sampling.sampler import Sampler
from tokenloom.serve.sampling.truncation import Truncation
from tokenloom.serve.snapshots import Snapshots
from tokenloom.tests.drawn import Drawn
from tokenloom.tests.engines import NEAR_TIE, TOLERANCE

ROUNDING = 1e-6  # of a cumulative sum of probabilities in float32
NEAR, EDGE, WRONG = "near tie", "edge", "WRONG"


@dataclass(eq=False)
class Grid:
    """Compiled programs, around which engines of any bookkeeping are built: they share no more than the arrays."""

    config: ModelConfig
    first: Engine

    @property
    def programs(self) -> Programs:
        return self.first.programs

    def engine(
        self, *, overlap: bool = True, cache: bool = True, policy: Policy | None = None,
        num_pages: int | None = None,
    ) -> Engine:  # fmt: skip
        """A fresh engine. num_pages: at most as many as the programs were compiled for."""
        pages, old = self.first.pages, self.first
        slots = pages.snapshots.slots if pages.snapshots is not None and cache else 0
        allocator = PageAllocator(
            num_pages or pages.num_pages, pages.page_size, off=None if cache else "off",
            snapshots=Snapshots(slots, pages.page_size) if slots else None,
        )  # fmt: skip
        return Engine(
            old.programs, allocator, max_model_len=old.max_model_len, vocab_size=old.vocab_size,
            budget=old.scheduler.budget, tokenizer=old.tokenizer, eos_ids=old.eos_ids, policy=policy,
            overlap=overlap,
        )  # fmt: skip


# -- the plain model's scores ------------------------------------------------------------------------------


@cache
def _plain(grid: Grid):
    """(params, tokens i32[max_model_len], count) -> logits f32[V] behind the first `count` tokens."""
    graphdef = grid.programs.graphdef
    states = tuple(
        Uncached() if isinstance(block.mixer, AttentionConfig) else Stateless()
        for block in grid.config.blocks
    )

    @jax.jit
    def run(params, tokens, count):
        model = nnx.merge(graphdef, params)
        batch = rectangle(tokens[None])
        x, _ = model.run(model.embed(batch.tokens, batch), states, batch, range(model.num_layers))
        return model.head(model.normalise(x[count - 1][None]))[0]

    return run


@cache
def _scorer(vocab: int, processors: tuple):
    """(row, logits f32[V], position) -> (logits after all processors but truncation f32[V], uniform number)."""
    sampler = Sampler(vocab, 1, processors)

    @jax.jit
    def run(row, logits, position):
        state, seats = sampler.admit(sampler.init(), 0, row), jnp.zeros(1, jnp.int32)
        ctx = Context(position[None], position[None] - state.prompt_length[seats], jnp.ones(1, bool))
        z = logits.astype(jnp.float32)[None]
        for processor, held in zip(sampler.processors, state.processors, strict=True):
            if not isinstance(processor, Truncation):
                z = processor.apply(held, seats, z, ctx)
        keys = row_keys(state.seeds[seats], state.sample_index[seats], ctx.positions, Purpose.SAMPLE)
        return z[0], uniform(keys)[0]

    return run


@dataclass(frozen=True)
class Choice:
    """The plain model's choice of one token: processed logits z f64[V] and the uniform number u in [0, 1)."""

    params: SamplingParams
    z: np.ndarray
    u: float

    @staticmethod
    def of(grid: Grid, drawn: Drawn, index: int, output: Sequence[int]) -> Choice:
        """Of the token behind `output` in sample `index`."""
        first, params = grid.first, drawn.params
        words = bad_word_ids(first.tokenizer, params.bad_words or ()) if first.tokenizer else []
        row = grid.programs.sampler.row(
            params, prompt_ids=drawn.prompt, output_ids=output,
            eos_ids=() if params.ignore_eos else sorted(first.eos_ids), seed=params.seed or 0,
            sample_index=index, bad_word_ids=words,
        )  # fmt: skip
        known = [*drawn.prompt, *output]
        tokens = np.zeros(first.max_model_len, np.int32)
        tokens[: len(known)] = known
        logits = _plain(grid)(grid.programs.params, tokens, np.int32(len(known)))
        run = _scorer(first.vocab_size, grid.programs.sampler.processors)
        z, u = run(row, logits, np.int32(len(known)))
        return Choice(params, np.asarray(z, np.float64), float(u))

    def kept(self) -> list[np.ndarray]:
        """The sets bool[V] of tokens that min-p, top-k and top-p may keep: the nominal one first, then those
        that differ by an edge within the tolerance."""
        params, found = self.params, []
        for shift in (0.0, -NEAR_TIE, NEAR_TIE) if params.min_p > 0 else (0.0,):
            low = np.log(params.min_p) + shift if params.min_p > 0 else -np.inf
            order = np.argsort(-self.z, kind="stable")
            order = order[(self.z[order] - self.z.max() >= low) & (self.z[order] > -np.inf)]
            limit = params.top_k if 0 < params.top_k < len(order) else len(order)
            for some in self._cut(order, limit):
                for final in self._nucleus(some):
                    mask = np.zeros(len(self.z), bool)
                    mask[final] = True
                    if not any((mask == other).all() for other in found):
                        found.append(mask)
        return found

    def _cut(self, order: np.ndarray, count: int) -> list[np.ndarray]:
        """The first `count` of `order`, and each set with a near one from beyond the edge in its place."""
        found, edge = [order[:count]], self.z[order[count - 1]]
        inside = [i for i in range(count) if self.z[order[i]] - edge <= NEAR_TIE]
        beyond = [i for i in range(count, len(order)) if edge - self.z[order[i]] <= NEAR_TIE]
        for i in inside:
            for j in beyond:
                if self.z[order[i]] - self.z[order[j]] <= NEAR_TIE:
                    found.append(np.array([*order[:i], *order[i + 1 : count], order[j]]))
        return found

    def _nucleus(self, order: np.ndarray) -> list[np.ndarray]:
        top_p = self.params.top_p
        if top_p >= 1.0:
            return [order]
        order = order[np.argsort(-self.z[order], kind="stable")]
        weights = np.exp(self.z[order] - self.z.max())
        mass = np.cumsum(weights) / weights.sum()
        found = []
        for goal in (top_p, top_p - _slack(top_p), top_p + _slack(top_p)):
            count = min(int(np.searchsorted(mass, goal)) + 1, len(order))
            found += self._cut(order, count)
        return found

    def reaches(self, token: int, kept: np.ndarray) -> bool:
        """Whether `token` is chosen within the tolerance, when the tokens `kept` are left."""
        if not kept[token]:
            return False
        if self.params.greedy:
            return bool(self.z[token] >= self.z.max() - NEAR_TIE)
        weights = np.where(kept, np.exp(self.z - self.z[kept].max()), 0.0)
        ends = np.cumsum(weights) / weights.sum()
        low = ends[token] - weights[token] / weights.sum()
        return bool(low - _slack(low) <= self.u <= ends[token] + _slack(ends[token]))


def _slack(share: float) -> float:
    """How far a boundary at `share` of the probability moves when the logits on its two sides shift by the
    tolerance against each other: the derivative of the logistic function."""
    return NEAR_TIE * share * (1.0 - share) + ROUNDING


def explain(grid: Grid, drawn: Drawn, index: int, a: Sequence[int], b: Sequence[int]) -> str:
    """Why sample `index` of a request became `a` here and `b` there: "near tie", "edge" (of a truncation), or
    "WRONG" where nothing excuses it."""
    at = next((i for i, (s, t) in enumerate(zip(a, b)) if s != t), None)
    if at is None:
        return WRONG
    choice = Choice.of(grid, drawn, index, a[:at])
    first, *others = (
        [np.isfinite(choice.z)] if drawn.params.greedy else choice.kept()
    )  # the most likely token is kept in any case
    if choice.reaches(a[at], first) and choice.reaches(b[at], first):
        return NEAR
    if all(any(choice.reaches(token, kept) for kept in (first, *others)) for token in (a[at], b[at])):
        return EDGE
    return WRONG


# -- comparing ---------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What one configuration's outputs were against the reference's."""

    requests: int = 0
    tokens: int = 0
    near_ties: int = 0
    edges: int = 0
    wrong: list[str] = field(default_factory=list)
    preemptions: int = 0
    hits: int = 0

    @property
    def excused(self) -> int:
        return self.near_ties + self.edges

    @property
    def allowed(self) -> int:
        """One in 10,000 tokens."""
        return max(1, self.tokens // 10_000)

    def check(self) -> None:
        assert not self.wrong, f"{len(self.wrong)} wrong: {self.wrong[:3]}"
        assert self.excused <= self.allowed, f"{self.excused} excused of {self.tokens} tokens: {self}"

    def compare(self, grid: Grid, drawn: Drawn, expected: RequestOutput, found: RequestOutput) -> None:
        """Count one request. An output that was ended early ("abort", "timeout") is compared as far as it went."""
        self.requests += 1
        same = True
        for a, b in zip(expected.outputs, found.outputs, strict=True):
            self.tokens += len(b.token_ids)
            same &= self._sample(grid, drawn, a, b)
        x, y = expected.prompt_logprobs, found.prompt_logprobs
        if same and found.outputs[0].finish_reason not in ("abort", "timeout") and x != y:
            if x is None or y is None or len(x) != len(y):
                self._wrong(drawn, "prompt_logprobs are missing")
            elif not all(_near(one or {}, other or {}, TOLERANCE) for one, other in zip(x, y)):
                self._wrong(drawn, "prompt_logprobs differ")

    def _sample(self, grid: Grid, drawn: Drawn, a: CompletionOutput, b: CompletionOutput) -> bool:
        cut, x, y = b.finish_reason in ("abort", "timeout"), list(a.token_ids), list(b.token_ids)
        if x[: len(y)] != y or (len(x) != len(y) and not cut):
            why = explain(grid, drawn, a.index, x, y)
            self.near_ties += why == NEAR
            self.edges += why == EDGE
            if why == WRONG:
                self._wrong(drawn, f"sample {a.index}: {x} became {y} ({b.finish_reason})")
            return False
        if not cut and (a.text, a.finish_reason, a.stop_reason) != (b.text, b.finish_reason, b.stop_reason):
            self._wrong(drawn, f"sample {a.index} ends otherwise: {a} and {b}")
        if (a.logprobs is None) != (b.logprobs is None) or len(b.logprobs or ()) != len(
            y if b.logprobs is not None else ()
        ):
            self._wrong(drawn, f"sample {a.index}: log-probabilities are missing")
        for at, (one, other) in enumerate(zip(a.logprobs or (), b.logprobs or ())):
            if not _near(one, other, _tolerance(drawn.params)) and not self._edge(grid, drawn, a, at):
                self._wrong(drawn, f"sample {a.index}, place {at}: {one} and {other}")
        return True

    def _edge(self, grid: Grid, drawn: Drawn, a: CompletionOutput, at: int) -> bool:
        """Whether a log-probability after processors may differ, because another set of tokens may be kept."""
        if drawn.params.logprobs_mode == "raw" or drawn.params.greedy:
            return False
        many = len(Choice.of(grid, drawn, a.index, list(a.token_ids)[:at]).kept()) > 1
        self.edges += many
        return many

    def _wrong(self, drawn: Drawn, what: str) -> None:
        self.wrong.append(f"request {drawn.index} ({drawn.params}): {what}")


def _near(one: dict, other: dict, tolerance: float) -> bool:
    """Whether two places' log-probabilities agree: the chosen token's and, by rank, the others'."""
    x, y = (sorted(p.logprob for p in entry.values()) for entry in (one, other))
    if len(x) != len(y):  # the chosen token is among the most likely ones by a hair, or is not
        x, y = x[-min(len(x), len(y)) :], y[-min(len(x), len(y)) :]
    shared = [(one[token].logprob, other[token].logprob) for token in one if token in other]
    return all(s == t or abs(s - t) <= tolerance for s, t in [*zip(x, y), *shared])


def _tolerance(params: SamplingParams) -> float:
    """Of log-probabilities; processors that scale logits scale their rounding."""
    if params.logprobs_mode == "raw":
        return TOLERANCE
    scale = 1.0 if params.greedy else max(1.0, 1.0 / params.temperature)
    return TOLERANCE * scale * max(params.repetition_penalty, 1.0 / params.repetition_penalty)
