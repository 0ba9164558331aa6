"""What a cache policy does not go together with, refused when the engine is built: both sides, and the remedy."""

from __future__ import annotations

from typing import Literal

from ..attention.caches.policy import Abilities, CachePolicy
from ..model.config import AttentionConfig, ModelConfig


def check_settings(
    cache: CachePolicy, *, quantised: str | None, devices: int, parts: int, page_size: int | None
) -> None:
    """ValueError where settings do not go with this cache. `quantised`: a kv_cache_dtype with scales; `devices`:
    tensor_parallel_size; `parts`: sequence_parallel_size; `page_size` as it was asked for."""
    able, name = cache.abilities, repr(cache)
    if quantised is not None and not able.quantises:
        raise ValueError(
            f"cache={name} does not store codes, but kv_cache_dtype={quantised!r} asks for them; leave "
            f"kv_cache_dtype=None (or choose a floating type), or cache=None"
        )
    if devices > 1 and not able.shards:
        raise ValueError(
            f"cache={name} keeps what it remembers on one device, but tensor_parallel_size={devices}; choose "
            f"tensor_parallel_size=1, or cache=None"
        )
    if parts > 1 and not able.splits:
        raise ValueError(
            f"cache={name} keeps a text on one device, but sequence_parallel_size={parts}; choose "
            f"sequence_parallel_size=1, or cache=None"
        )
    if page_size is not None and page_size % parts:
        raise ValueError(
            f"page_size={page_size} is not cut evenly over sequence_parallel_size={parts} devices; make it a multiple, "
            f"or leave page_size=None"
        )
    if cache.page_size is not None and page_size not in (None, cache.page_size):
        raise ValueError(
            f"cache={name} has pages of {cache.page_size} tokens, but page_size={page_size}; leave page_size=None"
        )


def check_model(cache: CachePolicy, config: ModelConfig, *, length: int, budget: int, parts: int = 1) -> None:
    """ValueError where a model cannot have this cache. `length`: max_model_len; `budget`: max_num_batched_tokens;
    `parts`: sequence_parallel_size."""
    able, name = cache.abilities, repr(cache)
    if parts > 1 and config.recurrent:
        raise ValueError(
            f"sequence_parallel_size={parts} splits texts over devices, but {config.model_type} has recurrent layers, "
            "which read them in order; choose 1"
        )
    if not able.exact and not any(isinstance(block.mixer, AttentionConfig) for block in config.blocks):
        raise ValueError(
            f"cache={name} is for attention, which {config.model_type} has none of; leave cache=None"
        )
    if not able.chunkable and budget < length:
        raise ValueError(
            f"cache={name} needs prompts whole, but max_num_batched_tokens={budget} cuts those of up to "
            f"max_model_len={length}; raise the former or lower the latter"
        )
    if config.learned_positions is not None and length > config.max_position:
        raise ValueError(
            f"max_model_len={length} exceeds the {config.max_position} learned positions of {config.model_type}, "
            f"which cache={name} cannot count anew; lower it"
        )


def no_prefix_cache(
    cache: CachePolicy, asked: bool | None, *, length: int, page_size: int, recurrent: bool, snapshots: int,
) -> str | None:  # fmt: skip
    """Why the prefix cache is off; None: it is on. ValueError when it was `asked` for and cannot hold."""
    if asked is False:
        return "prefix_cache=False"
    reason = None
    if not cache.abilities.may_share_prefix:
        reason = f"what {cache!r} remembers serves one text only"
    elif page_size >= length:
        reason = f"a page of {page_size} tokens holds a whole text of max_model_len={length}"
    elif recurrent and snapshots == 0:
        reason = "there is no memory for copies of the recurrent state"
    if reason is not None and asked:
        raise ValueError(
            f"prefix_cache=True cannot hold: {reason}; leave prefix_cache=None to have it where it can be, or "
            f"change that (page_size={page_size}, max_model_len={length})"
        )
    return reason


def hold(able: Abilities) -> Literal["text", "limit", "whole", "prompt"]:
    """How long a sequence holds pages (`PageAllocator.hold`)."""
    if not able.chunkable:
        return "whole"
    if able.pages == "prompt":
        return "prompt"
    return "text" if able.rebuildable else "limit"
