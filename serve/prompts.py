"""What people hand in: a prompt or several, and one value for all or one each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .tokenizer import Tokenizer

Prompt = str | Sequence[int] | dict[str, Any]


def is_prompt(prompts: Any) -> bool:
    """True for one prompt: a string, a dict, or a flat list of token ids."""
    if isinstance(prompts, str | bytes | dict):
        return True
    return bool(prompts) and all(isinstance(item, int) for item in prompts)


def each(given: Any, default: Any, count: int, name: str, kind: type) -> list[Any]:
    """One value for each of `count` prompts, from one for all or a list."""
    if given is None or isinstance(given, kind):
        return [default if given is None else given] * count
    values = list(given)
    if len(values) != count or not all(isinstance(value, kind) for value in values):
        raise ValueError(
            f"{name}={str(values)[:80]} does not fit {count} prompts: give one {kind.__name__} for all or one each"
        )
    return values


def need_tokenizer(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    """ValueError where there is none."""
    if tokenizer is None:
        raise ValueError(f"{what} works on text, but this LLM has no tokenizer; pass token ids to generate")
    return tokenizer


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, list[int]]:
    """A prompt's text (None when it came as token ids) and token ids."""
    if isinstance(prompt, dict):
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
        if unknown or not set(prompt) - {"cache_salt"}:
            raise ValueError(
                f"a prompt dict holds 'prompt' (text) or 'prompt_token_ids', and a 'cache_salt' if need be; "
                f"got keys {sorted(map(str, prompt))}"
            )
        if not isinstance(prompt.get("cache_salt"), str | None):
            raise ValueError(f"cache_salt={prompt['cache_salt']!r} must be a string")
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), encode_prompt(prompt["prompt_token_ids"], tokenizer)[1]
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        return prompt, need_tokenizer(tokenizer, "a text prompt").encode(prompt)
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Iterable):
        raise ValueError(f"a prompt is a string or a list of token ids (int); got {str(prompt)[:80]}")
    ids: list[Any] = list(prompt)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"a prompt is a string or a list of token ids (int); got {str(ids)[:80]}")
    return None, ids


def salt_of(prompt: Prompt) -> str | None:
    """Its "cache_salt", where it is a dict that has one."""
    return prompt.get("cache_salt") if isinstance(prompt, dict) else None
