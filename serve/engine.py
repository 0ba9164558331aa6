"""The engine: a step schedules, dispatches, and reads the step before it.

The driver is overlapped: while the device runs step i+1, the host reads and postprocesses step i. Sampled
tokens stay on the device by seat, so the next step never waits for the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from time import time
from typing import Any

import numpy as np

from ..attention.batch import Shape
from .bounds import Bounds, Deadlines
from .drafters.draft import DraftShape
from .gang import Gang, gangs_of
from .launched import Launched
from .outputs import FinishReason
from .packing import offsets, pack_step
from .pages import PageAllocator
from .policies.policy import Policy
from .programs import Programs
from .request import Request, Sample, make_sample, read_scores
from .sampling.sampler import Sampled, read
from .sampling.structured import Grammars
from .scheduler import Chunk, Scheduler, Sequence, Work
from .tokenizer import Tokenizer


class Engine:
    """Continuous batching over one set of compiled programs. Not thread-safe: one driver steps it."""

    def __init__(
        self, programs: Programs, pages: PageAllocator, *, max_model_len: int, vocab_size: int,
        budget: int, tokenizer: Tokenizer | None = None, eos_ids: Iterable[int] = (),
        bounds: Bounds = Bounds(), policy: Policy | None = None, overlap: bool = True,
    ):  # fmt: skip
        plan, self.overlap = programs.plan, overlap
        self.programs, self.pages, self.tokenizer = programs, pages, tokenizer
        self.scheduler = Scheduler(
            pages,
            max_num_seqs=plan.max_num_seqs,
            budget=budget,
            prompt_rows=plan.prompt_rows,
            policy=policy,
            drafts=self._drafts,
        )
        self.max_model_len, self.vocab_size = max_model_len, vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.grammars = Grammars(tokenizer, vocab_size, self.eos_ids)
        self.bounds, self.deadlines = bounds, Deadlines()
        self.cancelled: deque[Request] = deque()
        self.in_flight: Launched | None = None
        self.due: Launched | None = None
        self.weight_version = 0
        self.broken: str | None = None
        self.reported: list[Sample] = []
        self.real_tokens = self.padded_tokens = self.steps = 0

    # -- requests ------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; a ValueError says why it can never run, and nothing is changed."""
        prompt, params = request.prompt_ids, request.params
        limit = min(self.max_model_len, self.pages.capacity if self.programs.width else self.max_model_len)
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token (a BOS token, for instance)")
        if len(prompt) >= limit:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, but at most {limit - 1} fit beside one new token "
                f"(max_model_len={self.max_model_len}, pages for {self.pages.capacity} tokens); shorten the "
                f"prompt or raise max_model_len and num_pages"
            )
        known = [prompt, *(one.token_ids for one in request.carried or () if one.token_ids)]
        low, high = min(map(min, known)), max(map(max, known))
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.vocab_size} (0..{self.vocab_size - 1}); was the prompt made with another tokenizer?"
            )
        params.validate_for(self.vocab_size, tokenizer=self.tokenizer is not None)
        request.prepare(self.tokenizer, self.grammars)
        eos = frozenset() if params.ignore_eos else self.eos_ids
        self.bounds.check_room(len(self.scheduler.waiting))
        end = self.bounds.length(len(prompt), params.max_tokens, limit)
        samples = [make_sample(request, index, end, self.tokenizer, eos) for index in range(params.n)]
        self._sampler_row(samples[0])  # what the sampler cannot hold is refused here, not in a step
        if request.gang is not None:
            request.gang.form(self, samples)
        request.samples = samples
        self.deadlines.add(request)
        for sample in samples:
            if sample.finish_reason is None and sample.ready() is sample.sequence.members[0]:
                self.scheduler.add(sample.sequence)

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """End a request now; what it generated so far stays in its output."""
        if request.gang is not None:
            request.gang.conclude(self)
        for sample in request.samples:
            if sample.finish_reason is None:
                sample.finish_reason = reason
                sample.close()
                self.scheduler.finish(sample.sequence, complete=False)
                request.metrics.finished_time = time()
                self.reported.append(sample)

    @property
    def room(self) -> bool:
        """Whether the waiting queue takes another request."""
        return self.bounds.room(len(self.scheduler.waiting))

    def settle(self) -> None:
        """End the requests that were cancelled (any thread may append to `cancelled`) or are past deadline."""
        while self.cancelled:
            self.abort(self.cancelled.popleft())
        for request in self.deadlines.due():
            self.abort(request, "timeout")

    # -- the step ------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self.scheduler.busy or self.in_flight is not None or self.due is not None

    @property
    def replicas(self) -> tuple[Engine, ...]:
        """The engines that this one is made of (`serve.replicas`)."""
        return (self,)

    @property
    def ready(self) -> bool:
        """Whether `collect` and `dispatch` would not wait for the device."""
        gangs = self.in_flight if self.in_flight is not None and self.in_flight.gangs else None
        awaited = self.due or gangs
        return awaited is None or awaited.ready

    def step(self) -> list[Sample]:
        """Schedule and dispatch one step, then read the previous one (without `overlap` that same one); returns
        the samples that advanced or ended since the last call."""
        self.dispatch()
        return self.collect()

    def dispatch(self) -> None:
        """The first half of a step: schedule and dispatch; what is `due` then waits to be read."""
        if self.broken is not None:
            raise RuntimeError(self.broken)
        with self.programs.compilations.watch():
            if self.in_flight is not None and self.in_flight.gangs:
                self._read_in_flight()
            self.settle()
            work = self.scheduler.schedule()
            launched = None if work is None else self.launch(work)
            self.due, self.in_flight = (self.in_flight, launched) if self.overlap else (launched, None)

    def collect(self) -> list[Sample]:
        """The second half: read what is due, which waits for the device."""
        due, self.due = self.due, None
        with self.programs.compilations.watch():
            advanced = [] if due is None else self.postprocess(due)
            reported, self.reported = self.reported, []
            return reported + advanced

    def launch(self, work: Work) -> Launched:
        """Dispatch a step's two programs, and the prompt scores if someone asked."""
        for sequence in work.admitted:
            self.programs.admit(sequence.seat, self._sampler_row(sequence.owner))
            metrics = sequence.owner.request.metrics
            metrics.first_scheduled_time = metrics.first_scheduled_time or time()
        shape, packed, rows = self._pack(work)
        gangs = gangs_of(work.decodes)
        for gang in gangs:
            gang.prepare(self.programs)
        for slot, seat in work.loads:
            self.programs.copy(self.programs.plan.max_num_seqs + slot, seat)
        constrained = [sequence.owner for _, sequence, _ in rows if sequence.owner.matcher is not None]
        between = None
        if constrained or gangs:
            between = partial(self._between, constrained, gangs, bool(rows))
        sampled, prompt_x = self.programs.step(shape, packed, between, work.draft)
        for seat, slot in work.saves:
            self.programs.copy(seat, self.programs.plan.max_num_seqs + slot)
        scored = [
            (at, chunk)
            for at, chunk in offsets(work.chunks)
            if chunk.sequence.owner.index == 0 and chunk.sequence.owner.request.wants_prompt_scores
        ]
        scores = self._score(prompt_x, scored) if scored else None
        logprobs = any(sequence.owner.logprobs is not None for _, sequence, _ in rows)
        carry = any(sequence.owner.request.params.carries for _, sequence, _ in rows)
        launched = Launched(sampled, rows, logprobs, carry, scores, scored, work.draft, tuple(gangs))
        launched.send()
        self.steps += 1
        self.real_tokens += len(work.decodes) + sum(chunk.count for chunk in work.chunks)
        self.padded_tokens += shape.T
        return launched

    def _drafts(self, decodes: list[Sequence]) -> DraftShape | None:
        """What these sequences, all that run a step, may have drafted; a grammar wants each token read first."""
        speculation = self.programs.speculation
        if speculation is None or any(sequence.owner.matcher is not None for sequence in decodes):
            return None
        return speculation.choose(len(decodes))

    def _sampler_row(self, sample: Sample) -> dict[str, np.ndarray]:
        request, params = sample.request, sample.request.params
        return self.programs.sampler.row(
            params, prompt_ids=request.prompt_ids, output_ids=sample.token_ids,
            eos_ids=sorted(sample.eos_ids), seed=request.seed, sample_index=sample.index,
            bad_word_ids=request.bad_word_ids, carry=sample.carry,
        )  # fmt: skip

    def _pack(self, work: Work) -> tuple[Shape, np.ndarray, list[tuple[int, Sequence, int]]]:
        """The step's shape and descriptor, and (row, sequence, epoch) for each row that samples."""
        return pack_step(work, self.programs.plan, self.programs.width)

    def _between(
        self, constrained: list[Sample], gangs: dict[Gang, list[int]], plain: bool, x: Any
    ) -> Sampled | None:
        """Behind a step's backbone, which gave x, and before its head: grammars write their masks, gangs choose. What
        a gang sampled is returned where the head has nothing to do: no `plain` row samples."""
        if constrained:
            self._constrain(constrained)
        sampled = [gang.select(self.programs, x, rows) for gang, rows in gangs.items()]
        return None if plain or not sampled else sampled[-1]

    def _constrain(self, samples: list[Sample]) -> None:
        """While the device runs a backbone, and before its head: write the masks of the samples with a grammar. They
        follow from the tokens of the step before, which is read here. A grammar that fails ends its request."""
        self._read_in_flight()
        live = [(one.sequence.seat, one.matcher) for one in samples if one.matcher and not one.finish_reason]
        plan = self.programs.plan
        self.programs.constrain(*self.grammars.masks(live, plan.width(len(live)), plan.max_num_seqs))
        for one in samples:
            if one.matcher and one.matcher.error and not one.finish_reason:
                one.request.error = f"structured_outputs failed: {one.matcher.error}"
                self.abort(one.request, "error")

    def _read_in_flight(self) -> None:
        """Read the step in flight now; the next call of `step` reports it."""
        previous, self.in_flight = self.in_flight, None
        if previous is not None:
            self.reported += self.postprocess(previous)

    def _score(self, prompt_x: Any, scored: list[tuple[int, Chunk]]) -> Any:
        """Dispatch the log-probabilities of each prompt token's successor."""
        targets, used = np.zeros(prompt_x.shape[0], np.int32), 0
        for at, chunk in scored:
            following = chunk.sequence.tokens[chunk.start + 1 : chunk.start + chunk.count + 1]
            targets[at : at + len(following)] = following
            used = at + len(following)
        return self.programs.score(prompt_x, targets, used)

    # -- weights -------------------------------------------------------------------------------------------

    def swap_weights(self, swap: Callable[[], None], version: int) -> None:
        """Between two steps: read the step in flight, run `swap`, and forget all that the old weights computed.
        Running sequences wait in their order and are recomputed from their tokens."""
        self.reported = self.collect()
        self._read_in_flight()
        for sequence in reversed(self.scheduler.running[:]):
            if sequence.seat >= 0:
                self.scheduler.preempt(sequence)
        self.pages.new_weights()
        self.weight_version = version
        self.broken = "a swap of the weights failed half-way, so the weights are mixed: swap again"
        swap()
        self.broken = None

    # -- reading -------------------------------------------------------------------------------------------

    def postprocess(self, launched: Launched) -> list[Sample]:
        """Read a step's tokens, advance its samples, end those that are done."""
        if launched.scored:
            read_scores(self.tokenizer, read(np.asarray(launched.scores)), launched.scored)
        advanced, counts, now = [], [], time()
        for sequence, emitted in launched.read(self.tokenizer):
            sample: Sample = sequence.owner
            self.scheduler.read(sequence, len(emitted), 0 if launched.draft is None else launched.draft.depth)
            for token, entry, sample.carry in emitted:
                sample.accept(token, entry, self.weight_version)
                if sample.finish_reason is not None:
                    break
            counts.append(len(emitted))
            metrics = sample.request.metrics
            metrics.first_token_time, metrics.last_token_time = metrics.first_token_time or now, now
            if sample.finish_reason is not None:
                self.scheduler.finish(sequence)
                if sample.request.finished:
                    metrics.finished_time = now
            advanced.append(sample)
        for gang in launched.gangs:
            advanced += gang.read(self)
        if launched.draft is not None and self.programs.speculation is not None:
            self.programs.speculation.observe(launched.draft, counts)
        self._stop_early([sample for sample in advanced if sample.finish_reason and sample.request.until])
        return advanced

    def _stop_early(self, ended: list[Sample]) -> None:
        """Where what ended in a step is enough for its request (`Request.until`), its other samples end now."""
        for request in dict.fromkeys(sample.request for sample in ended):
            if request.enough([sample for sample in request.samples if sample in ended]):
                self.abort(request, "error" if request.error else "abort")
