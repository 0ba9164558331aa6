"""Decode context parallelism in an engine: whether devices that have one KV head between them share its pages."""

from __future__ import annotations

from ..attention.caches.policy import CachePolicy
from ..sharding.placement import Heads, split_heads


def check_context_parallel(asked: int | None, *, tensor: int, sequence: int, page_size: int | None) -> None:
    """ValueError where decode_context_parallel_size (`asked`) cannot hold for any model. The others: as in `Build`."""
    if asked is None or asked == 1:
        return
    if sequence > 1:
        raise ValueError(
            f"decode_context_parallel_size={asked} with sequence_parallel_size={sequence}: pages are split over one "
            f"kind of devices only, and those are taken; leave decode_context_parallel_size=None, or choose "
            f"sequence_parallel_size=1"
        )
    if tensor % asked:
        raise ValueError(
            f"decode_context_parallel_size={asked} shares pages among devices of one model, but "
            f"tensor_parallel_size={tensor} is no multiple of it; leave decode_context_parallel_size=None"
        )
    if page_size is not None and page_size % asked:
        raise ValueError(
            f"page_size={page_size} is not cut evenly over decode_context_parallel_size={asked} devices; make it a "
            f"multiple, or leave page_size=None"
        )


def keeps_copies(
    asked: int | None, heads: Heads, *, tensor: int, sequence: int, page_size: int | None, cache: CachePolicy
) -> bool:  # fmt: skip
    """Whether devices that would repeat a KV head of a model with such `heads` do so, rather than share its pages:
    where that was `asked` for, or by default where pages cannot be cut. ValueError where another number was asked
    for."""
    split = split_heads(tensor, heads)
    if split is None or sequence > 1:
        return True
    repeats = split[1]
    if asked is None:
        return not cache.abilities.splits or (page_size or cache.page_size or 0) % repeats > 0
    if asked not in (1, repeats):
        kv = ", ".join(str(count) for count in sorted({count for _, count in heads})) or "no"
        works = f"choose {repeats}, 1 for a copy on each, or None" if repeats > 1 else "choose 1 or None"
        raise ValueError(
            f"decode_context_parallel_size={asked}: {repeats} of tensor_parallel_size={tensor} devices have a KV head "
            f"between them (the model has {kv}), and share its pages or keep a copy each; {works}"
        )
    return asked == 1
