"""Admission by quantiles of the output length: CASTILLO (Perez-Ramirez et al. 2025, arXiv 2505.16881) shows that the
length of an answer is a distribution, for one prompt of one model too, so a scheduler must not trust one number.

The paper has the data and no scheduler. The rules here are a reading of its advice: reserve what running requests
will still grow by at a quantile of their summed lengths, given what they have written already, and let preemption
handle the rest; optionally start those first that are expected to be short (vllm-ltr, arXiv 2408.15792), with aging.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Protocol

from .policy import Ranked

if TYPE_CHECKING:
    from ..pages import PageAllocator
    from ..scheduler import Sequence


class Lengths(Protocol):
    """What is known about output lengths (tokens)."""

    def remaining(self, sequence: Sequence, written: int, most: int) -> tuple[float, float]:
        """Mean and variance of min(tokens still to come, `most`), after `written` tokens."""
        ...

    def learn(self, sequence: Sequence, written: int, complete: bool) -> None:
        """A sequence ended after `written` tokens; not `complete`: it would have written more."""
        ...


class Survival:
    """The share of outputs that are longer than t tokens, from ended ones: Kaplan and Meier's estimate (1958), which
    uses outputs that were cut short for as long as they lasted.

    `prior` outputs that never end are added, so that without data everyone is expected to use all it may.
    """

    def __init__(self, prior: float = 1.0):
        self.prior, self.count, self._stale = prior, 0, True
        self._ends: dict[int, list[int]] = {}  # length -> [complete, cut short]
        self._at: list[int] = [0]
        self._alive: list[float] = [1.0]
        self._sum: list[float] = [0.0]
        self._weighted: list[float] = [0.0]

    def learn(self, length: int, complete: bool) -> None:
        self._ends.setdefault(length, [0, 0])[0 if complete else 1] += 1
        self.count += 1
        # With much data a few more change nothing.
        self._stale = self._stale or self.count < 32 or self.count % 32 == 0

    def _refresh(self) -> None:
        """Steps of the survival curve, and its sums from 0: of P(Y > t), and of t P(Y > t)."""
        self._stale = False
        risk, alive = self.count + self.prior, 1.0
        self._at, self._alive, self._sum, self._weighted = [0], [1.0], [0.0], [0.0]
        for length in sorted(self._ends):
            complete, cut = self._ends[length]
            self._append(length, alive)
            alive *= 1 - complete / risk if risk > 0 else 0.0
            self._alive[-1] = alive
            risk -= complete + cut

    def _append(self, length: int, alive: float) -> None:
        start = self._at[-1]
        if length == start:
            return
        between = (length - start) * (length + start - 1) / 2  # start + ... + (length - 1)
        self._sum.append(self._sum[-1] + alive * (length - start))
        self._weighted.append(self._weighted[-1] + alive * between)
        self._at.append(length)
        self._alive.append(alive)

    def _until(self, t: int) -> tuple[float, float, float]:
        """P(Y > t), and the sums of P(Y > u) and of u P(Y > u) over u < t."""
        place = bisect_right(self._at, t) - 1
        start, alive = self._at[place], self._alive[place]
        between = (t - start) * (t + start - 1) / 2
        return alive, self._sum[place] + alive * (t - start), self._weighted[place] + alive * between

    def beyond(self, written: int, more: int) -> float:
        """P(Y - written > more | Y > written); 1 where nothing so long was seen."""
        if self._stale:
            self._refresh()
        alive = self._until(written)[0]
        return self._until(written + more)[0] / alive if alive > 0 else 1.0

    def quantile(self, q: float, written: int = 0) -> float:
        """The least x with P(Y - written <= x | Y > written) >= q; inf when no data reach so far."""
        self.beyond(written, 0)
        ends = (at - written for at in self._at if at > written)
        return next((x for x in ends if 1 - self.beyond(written, x) >= q - 1e-12), inf)

    def moments(self, written: int, most: int) -> tuple[float, float]:
        """Mean and variance of min(Y - written, most), given Y > written: with S its survival, the sums of S(x)
        and of (2 x + 1) S(x) over x < most."""
        if self._stale:
            self._refresh()
        alive, total, weighted = self._until(written)
        if alive <= 0:
            return float(most), 0.0
        _, total_end, weighted_end = self._until(written + most)
        mean = (total_end - total) / alive
        square = 2 * (weighted_end - weighted) / alive - 2 * written * mean + mean
        return mean, max(square - mean * mean, 0.0)


class Empirical:
    """Lengths as they were observed, by group; a group with fewer than `enough` outputs is judged by all of them.

    group: what the outputs of sequences that resemble each other have in common; None: the tenant.
    """

    def __init__(
        self, group: Callable[[Sequence], Any] | None = None, *, prior: float = 1.0, enough: int = 20
    ):
        self.group = group or (lambda sequence: sequence.tenant)
        self.prior, self.enough = prior, enough
        self.all, self.of = Survival(prior), {}

    def remaining(self, sequence: Sequence, written: int, most: int) -> tuple[float, float]:
        own = self.of.get(self.group(sequence))
        return (own if own is not None and own.count >= self.enough else self.all).moments(written, most)

    def learn(self, sequence: Sequence, written: int, complete: bool) -> None:
        self.all.learn(written, complete)
        self.of.setdefault(self.group(sequence), Survival(self.prior)).learn(written, complete)


@dataclass(slots=True)
class Place:
    """What the policy notes on a sequence: its rank, and the tokens that it came with."""

    key: tuple[float, int]
    given: int

    def __lt__(self, other: Place) -> bool:
        return self.key < other.key


class Castillo(Ranked):
    """A sequence starts beside others when all fit with what they will still write, at a quantile.

    The sum of the running sequences' growth is taken as normal: mean + z(quantile) * standard deviation of
    independent lengths, each given what is written already and bounded by its limit. Between reserving
    max_tokens (few run at once) and reserving nothing (many are preempted and computed again).

    Args:
        quantile: the chance that what was reserved suffices.
        distribution: a `Lengths`; None: `Empirical()`, learned from the sequences that end.
        horizon: tokens to look ahead, since others end meanwhile and give their pages back; None: to the end of
            every sequence, which hardly ever preempts and runs fewer at once (`benchmarks/castillo.py`).
        shortest_first: start those first whose expected length is shortest; otherwise order of arrival.
        aging: a later arrival weighs as much as so many tokens of expected length, so a sequence is overtaken by
            at most (its expected length / aging) later ones.
    """

    def __init__(
        self, quantile: float = 0.9, distribution: Lengths | None = None, *, horizon: int | None = 64,
        shortest_first: bool = False, aging: float = 1.0,
    ):  # fmt: skip
        if not 0 < quantile < 1:
            raise ValueError(f"quantile={quantile!r} must lie between 0 and 1, 0.9 for instance")
        if not aging > 0:
            raise ValueError(
                f"aging={aging!r} must be above 0 tokens an arrival, or long requests would starve"
            )
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon={horizon} must be at least 1 token, or None for the whole output")
        self.z, self.lengths = NormalDist().inv_cdf(quantile), distribution or Empirical()
        self.horizon, self.shortest_first, self.aging = horizon, shortest_first, aging
        super().__init__()

    def rank(self, sequence: Sequence, arrivals: int) -> Place:
        given, expected = len(sequence.tokens), 0.0
        if self.shortest_first:
            expected = self.lengths.remaining(sequence, 0, max(sequence.limit - given, 1))[0]
        return Place((expected + self.aging * arrivals, arrivals), given)

    def admits(self, sequence: Sequence, pages: PageAllocator, running: list[Sequence]) -> bool:
        fresh = pages.cost(sequence.chain, sequence.tokens, sequence.lookup)
        return fresh + self.reserve([*running, sequence], pages.page_size) <= pages.free

    def reserve(self, sequences: list[Sequence], page_size: int) -> float:
        """Pages that these sequences will take beyond those of their known tokens, at the quantile."""
        mean = variance = most = 0.0
        for one in sequences:
            bound = max(one.limit - one.known, 0)
            if self.horizon is not None:
                bound = min(bound, self.horizon)
            held = -(-one.known // page_size) * page_size
            grows, spread = self.lengths.remaining(one, one.known - one.rank.given, bound)
            # A table ends in a page that is half empty on average.
            pages = (one.known + grows - held + (page_size - 1) / 2) / page_size
            mean += max(pages, 0.0)
            variance += spread / page_size**2 + 1 / 12
            most += max(-(-(one.known + bound) // page_size) - held // page_size, 0)
        return min(mean + self.z * sqrt(variance), most)

    def ended(self, sequence: Sequence, complete: bool) -> None:
        """An output that reached its limit was cut short by it."""
        written = len(sequence.tokens) - sequence.rank.given
        if written > 0:
            self.lengths.learn(sequence, written, complete and len(sequence.tokens) < sequence.limit)
