"""Searches over continuous batching: several texts of a prompt, one answer. One technique a file."""

from .beam_search import BeamSearch
from .best_of_n import BestOfN
from .diverse_beam_search import DiverseBeamSearch
from .first_finish import FirstFinish
from .majority_vote import MajorityVote

__all__ = ["BeamSearch", "BestOfN", "DiverseBeamSearch", "FirstFinish", "MajorityVote"]
