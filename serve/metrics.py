"""What a server counts, in Prometheus' text format (prometheus_client, an extra: imported on use)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .driver import Driver, Update
from .outputs import CompletionOutput

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from .engine import Engine

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
INTER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and histograms of one server, and gauges read from its engine when they are asked for."""

    def __init__(self, driver: Driver):
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._driver, self._registry = driver, CollectorRegistry()
        more: dict[str, Any] = {"registry": self._registry, "namespace": "tokenloom"}
        self.requests = Counter("requests", "Requests by how they ended", ["outcome"], **more)
        self._prompt = Counter("prompt_tokens", "Prompt tokens of accepted requests", **more)
        self._generated = Counter("generation_tokens", "Tokens generated", **more)
        self._first = Histogram(
            "time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=FIRST_TOKEN_SECONDS,
            **more,
        )
        self._between = Histogram(
            "inter_token_seconds", "Between tokens of a sample", buckets=INTER_TOKEN_SECONDS, **more
        )
        self._registry.register(self)  # type: ignore[arg-type]  # a collector is what has `collect`

    def watch(
        self, arrival: float, prompt: int, on_update: Callable[[Update], None]
    ) -> Callable[[Update], None]:
        """An on_update that counts one prompt's updates on their way. arrival: s, `time.perf_counter`; prompt: its
        tokens."""
        last: dict[int, float] = {}

        def counted(update: Update) -> None:
            if not (update.deltas or update.last):
                self._prompt.inc(prompt)
            now = time.perf_counter()
            for delta in update.deltas:
                self._count(delta, now, arrival, last)
            on_update(update)

        return counted

    def _count(self, delta: CompletionOutput, now: float, arrival: float, last: dict[int, float]) -> None:
        count = len(delta.token_ids)
        if not count:
            return
        self._generated.inc(count)
        before = last.get(delta.index)
        if before is not None:
            self._between.observe((now - before) / count)
        elif not last:
            self._first.observe(now - arrival)
        last[delta.index] = now

    def collect(self) -> Iterator[Metric]:
        """The engine's own numbers (the collector interface of prometheus_client)."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        engines, name = self._driver.llm.engine.replicas, "tokenloom_{}".format

        def total(number: Callable[[Engine], int]) -> int:
            return sum(number(one) for one in engines)

        gauges: tuple[tuple[str, str, int], ...] = (
            ("running", "Sequences that run", total(lambda one: len(one.scheduler.running))),
            ("waiting", "Sequences that wait", self._driver.waiting),
            ("pages_free", "Free pages of the KV pool", total(lambda one: one.pages.free)),
            ("pages_total", "Pages of the KV pool", total(lambda one: one.pages.num_pages - 1)),
        )
        counters: tuple[tuple[str, str, int], ...] = (
            ("steps", "Steps of the engine", total(lambda one: one.steps)),
            ("preemptions", "Sequences that gave up their pages", total(lambda one: one.scheduler.preemptions)),
            (
                "prefix_cache_queries", "Prompt tokens looked up in the cache",
                total(lambda one: one.pages.lookup_tokens),
            ),
            ("prefix_cache_hits", "Prompt tokens found in the cache", total(lambda one: one.pages.hit_tokens)),
        )  # fmt: skip
        for short, text, value in gauges:
            yield GaugeMetricFamily(name(short), text, value=value)
        for short, text, value in counters:
            yield CounterMetricFamily(name(short), text, value=value)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self._registry)
