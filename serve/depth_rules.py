"""What a model whose tokens skip layers does not go together with."""

from __future__ import annotations

from ..attention.caches.paged import Pages
from ..attention.caches.policy import CachePolicy
from ..attention.caches.split import SplitPages
from ..model.config import ModelConfig


def check_depth(
    config: ModelConfig, cache: CachePolicy, drafter: object, prefix_cache: bool | None
) -> str | None:
    """Why skipping turns the prefix cache off; None: no layer is skipped. ValueError, naming both sides, where
    something else was asked for that cannot hold."""
    depth = config.depth
    if depth is None:
        return None
    reason = "generated tokens skip layers, so their pages do not serve other prompts"
    if prefix_cache:
        raise ValueError(f"prefix_cache=True cannot hold: {reason} ({depth}); leave prefix_cache=None")
    if drafter is not None:
        raise ValueError(
            f"drafter={drafter!r} checks several tokens in one step as a full model writes them, but this model skips "
            f"layers ({depth}); leave drafter=None, or the transform out"
        )
    shared = isinstance(cache, SplitPages) and cache.split.by_heads
    if not (isinstance(cache, Pages) or shared):
        raise ValueError(
            f"cache={cache!r} expects every token in every layer, but this model skips layers ({depth}); leave "
            f"cache=None, or the transform out"
        )
    return reason
