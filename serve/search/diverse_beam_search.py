"""Diverse Beam Search (Vijayakumar et al. 2016, arXiv 1610.02424): groups of beams that avoid each other's tokens."""

from __future__ import annotations

from dataclasses import dataclass

from .beam_search import BeamSearch, whole_number
from .beams import Beams, Rules


@dataclass(frozen=True)
class DiverseBeamSearch(BeamSearch):
    """`beam_width` beams in `groups` of equal size, one after the other within each step: a token costs `diversity`
    for each beam of an earlier group that took it at this step (the Hamming diversity that the paper recommends).

    Groups end by themselves, each as a beam search does. The first is plain beam search with beam_width / groups
    beams, and so is every one with diversity 0. Hypotheses of all groups come back by their log-probability,
    normalised; `Hypothesis.objective` and `score` hold the penalties too, by which a group chose.

    groups     as many as beams: most diverse
    diversity  0.2 to 0.8 serves most tasks (the paper, section 5); less where groups are large, since every beam counts
    """

    beam_width: int = 10
    groups: int = 5
    diversity: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("groups", self.groups)
        if self.beam_width % self.groups:
            raise ValueError(
                f"beam_width={self.beam_width} does not divide into groups={self.groups} of equal size; make it a "
                "multiple of them"
            )
        if isinstance(self.diversity, bool) or not 0 <= self.diversity < float("inf"):
            raise ValueError(f"diversity={self.diversity!r} must be a finite number, 0 or more; 0.5 is usual")

    def beams(self) -> Beams:
        rules = Rules(self.length_penalty, self.early_stopping)
        return Beams(repr(self), self.beam_width, self.groups, self.diversity, rules)
