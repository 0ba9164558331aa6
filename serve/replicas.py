"""Replicas: several engines of one process that share requests, each with all weights on devices of its own.

Data parallelism (vLLM's `data_parallel_size`). A replica is a whole engine: weights, programs, pages, prefix cache,
scheduler, policy and seats. `Replicas` looks to an `LLM` like one engine: it routes what is added, steps all, and
knows where a request lives. What a request generates depends on its prompt, parameters and seed alone, so routing
changes no token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import jax

from ..model.config import ModelConfig
from .bounds import Bounds
from .build import Build, Opened, build_engine
from .chain import Chain
from .engine import Engine
from .outputs import FinishReason
from .pages import PageAllocator
from .request import Request, Sample
from .sampling.structured import Grammars
from .tokenizer import Tokenizer

POLL_SECONDS = 5e-5
"""How often the host looks whether some replica's step is done, while none is."""


class Replicas:
    """Engines of one model as one. Not thread-safe: one driver steps it.

    A new request goes to a replica with a free seat, if there is one, and among these to the one that is through with
    it first, counted in steps: each unfinished sequence takes one of max_num_seqs rows of a step, each prompt token
    without a result yet one of max_num_batched_tokens, and so do the tokens of the new prompt that the prefix cache
    lacks. So the least loaded one gets it, unless another saves more than it lags behind; ties go to the first. One
    whose waiting queue is full is asked last. (Preble, Srivatsa et al. 2024, arXiv 2407.00023, weighs load against
    cached prefixes, too.)
    """

    def __init__(self, engines: Sequence[Engine]):
        self.replicas = tuple(engines)
        self.cancelled: deque[Request] = deque()
        self._home: WeakKeyDictionary[Request, Engine] = WeakKeyDictionary()
        self._prompts: dict[Request, tuple[Engine, int]] = {}
        self._outstanding = dict.fromkeys(self.replicas, 0)

    # -- what is the same for all --------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        return self.replicas[0].max_model_len

    @property
    def bounds(self) -> Bounds:
        """Those of each replica."""
        return self.replicas[0].bounds

    @property
    def grammars(self) -> Grammars:
        return self.replicas[0].grammars

    @property
    def weight_version(self) -> int:
        return max(one.weight_version for one in self.replicas)

    # -- requests ------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; a ValueError says why it can never run, and nothing is changed."""
        engine, missing = self.route(request)
        engine.add(request)
        self._home[request] = engine
        if not request.finished:
            self._prompts[request] = engine, missing
            self._outstanding[engine] += missing

    def route(self, request: Request) -> tuple[Engine, int]:
        """Where a request would go, and how many tokens of its prompt have to be computed there."""
        tokens = [*request.prompt_ids, *(request.carried[0].token_ids if request.carried else ())]
        chain = Chain((None, request.cache_salt))
        missing = {one: len(tokens) - held(one.pages, chain, tokens) for one in self.replicas}

        def cost(one: Engine) -> tuple[bool, bool, int]:
            scheduler = one.scheduler
            sequences = len(scheduler.waiting) + len(scheduler.running)
            prompts = self._outstanding[one] + missing[one]
            seats = scheduler.max_num_seqs
            return not one.room, sequences >= seats, sequences * scheduler.budget + prompts * seats

        best = min(self.replicas, key=cost)
        return best, missing[best]

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """End a request now; what it generated so far stays in its output."""
        self._home.get(request, self.replicas[0]).abort(request, reason)

    @property
    def room(self) -> bool:
        """Whether some replica's waiting queue takes another request."""
        return any(one.room for one in self.replicas)

    # -- the step ------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        return sum(one.steps for one in self.replicas)

    @property
    def busy(self) -> bool:
        return any(one.busy for one in self.replicas)

    def step(self) -> list[Sample]:
        """Wait until the step of some replica is done; read all that are, then dispatch for each of these the next but
        one. Every busy replica's device has a step to do meanwhile, and none waits for a slower one. Returns the
        samples that advanced or ended."""
        while self.cancelled:
            self.abort(self.cancelled.popleft())
        working = [one for one in self.replicas if one.busy]
        while len(working) > 1 and not any(one.ready for one in working):
            time.sleep(POLL_SECONDS)
        ready = [one for one in self.replicas if one.ready or len(working) == 1]
        advanced = [sample for one in ready for sample in one.collect()]
        for one in ready:
            one.dispatch()
        for sample in advanced:
            engine, missing = self._prompts.pop(sample.request, (self.replicas[0], 0))
            self._outstanding[engine] -= missing
        return advanced


def held(pages: PageAllocator, chain: Chain, tokens: list[int]) -> int:
    """How many of these tokens a sequence that starts now would find computed."""
    pages.renew(chain)
    try:
        found = len(pages.lookup(chain, tokens))
    except OverflowError:  # no token id is so large: `Engine.add` says so
        return 0
    if pages.snapshots is not None and found:
        found = pages.snapshots.deepest(chain.keys[:found])
    return found * pages.page_size


def check_replicas(build: Build) -> None:
    """ValueError where the settings ask for replicas that cannot be."""
    count, size = build.data_parallel_size, build.devices
    if count == 1:
        return
    asked = f"data_parallel_size={count}"
    if jax.process_count() > 1:
        raise ValueError(
            f"{asked} makes replicas in one process, and this is one of {jax.process_count()}, which share one model; "
            f"give each process its own devices and requests, without tokenloom.initialize, or leave it at 1"
        )
    if build.compiled is not None:
        raise ValueError(
            f"{asked} with compiled={str(build.compiled)!r}: compiled programs name their devices, and each replica "
            f"has others; leave out one of the two"
        )
    devices = jax.devices()
    if count * size > len(devices):
        hint = " (on CPU: JAX_NUM_CPU_DEVICES=n in the environment)" if devices[0].platform == "cpu" else ""
        raise ValueError(
            f"{asked} times {size} devices a replica is {count * size}, but there are {len(devices)} "
            f"{devices[0].platform} devices; lower it to {max(1, len(devices) // size)}, or start with more "
            f"devices{hint}"
        )


def build_replicas(
    opened: Opened, tokenizer: Tokenizer | None, build: Build, make_programs: Any
) -> tuple[ModelConfig, Engine | Replicas]:
    """The engine of an opened model, or as many as `data_parallel_size` says, with their programs not yet compiled; and
    the config that they run. Weights are read once and copied from device to device."""
    builds = [_replica(build, index) for index in range(build.data_parallel_size)]
    config, engines = opened.config, []
    for one in reversed(builds):  # the first is built last, since building may use up what it copies from
        with nullcontext() if one.replica == 0 else jax.default_device(one.device):
            params = opened.params if one.replica == 0 else _copied(opened, one)
            config, engine = build_engine(
                opened.config, opened.numerics, params, tokenizer, one, make_programs
            )
        engines.append(engine)
    return config, engines[0] if len(engines) == 1 else Replicas(engines[::-1])


def _replica(build: Build, index: int) -> Build:
    """The settings of a replica: what has a memory of its own exists once for each."""
    if index == 0:
        return build
    telemetry = None if build.telemetry is None else build.telemetry.replica(index)
    return replace(
        build, replica=index, policy=deepcopy(build.policy), controller=deepcopy(build.controller),
        telemetry=telemetry,
    )  # fmt: skip


def _copied(opened: Opened, build: Build) -> Any:
    """The weights on a replica's own devices."""
    homes = build.shardings(opened.config, opened.numerics) or build.whole(None)
    return jax.device_put(opened.params, homes, may_alias=False)
