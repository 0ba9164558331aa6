"""Outputs as OpenAI's response objects, whole (`response`) or in pieces (`Chunks`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .openai import Call
from .outputs import CompletionOutput, Logprob, RequestOutput
from .tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no -Infinity

Entries = Sequence[tuple[int, dict[int, Logprob] | None]]


def response(call: Call, name: str, created: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """The whole answer: a `text_completion` or `chat.completion` object with its usage.

    name: the id's unique part. outputs: one a prompt of the call; choices count on through them.
    """
    choices = []
    for place, output in enumerate(outputs):
        for completion in output.outputs:
            index = place * call.params.n + completion.index
            choices.append(_choice(call, index, output, completion))
    return {
        "id": _id(call, name),
        "object": "chat.completion" if call.chat else "text_completion",
        "created": created,
        "model": call.model,
        "choices": choices,
        "usage": usage(call, outputs),
    }


def usage(call: Call, outputs: Sequence[RequestOutput]) -> dict[str, int]:
    """Tokens in and out; a prompt counts once, however many samples it has."""
    read = sum(len(output.prompt_token_ids) for output in outputs)
    written = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    written = 0 if call.score_only else written
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class Chunks:
    """One streamed answer: deltas become `chat.completion.chunk` (or `text_completion`) objects."""

    def __init__(self, call: Call, name: str, created: int):
        self._call = call
        self._head = {
            "id": _id(call, name),
            "object": "chat.completion.chunk" if call.chat else "text_completion",
            "created": created,
            "model": call.model,
        }
        self._offsets = [0] * call.samples

    def first(self) -> list[dict[str, Any]]:
        """What precedes the first token: a chat's role, or the prompts of an echo."""
        call = self._call
        if call.chat:
            start = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            return [self._object({"index": index, **start}) for index in range(call.samples)]
        if not call.echo:
            return []
        start = {"logprobs": None, "finish_reason": None, "stop_reason": None}
        prompts = [prompt["prompt"] for prompt in call.prompts for _ in range(call.params.n)]
        return [self._object({"index": index, "text": text, **start}) for index, text in enumerate(prompts)]

    def delta(self, place: int, new: CompletionOutput) -> dict[str, Any] | None:
        """What is new of a sample of prompt `place`; None when there is nothing to show yet."""
        call, index = self._call, place * self._call.params.n + new.index
        text, scored = new.text, None
        if call.score_only:
            text = ""
        elif new.logprobs:
            scored = _logprobs(call, list(zip(new.token_ids, new.logprobs)), self._offsets[index])
            if not call.chat:
                self._offsets[index] += sum(map(len, scored["tokens"]))
        if not (text or scored or new.finish_reason):
            return None
        reasons = {"finish_reason": _finish(call, new), "stop_reason": new.stop_reason}
        shown = {"delta": {"content": text} if text else {}} if call.chat else {"text": text}
        return self._object({"index": index, **shown, "logprobs": scored, **reasons})

    def usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The last chunk of a stream with include_usage."""
        return {**self._head, "choices": [], "usage": usage(self._call, outputs)}

    def _object(self, choice: dict[str, Any]) -> dict[str, Any]:
        more = {"usage": None} if self._call.include_usage else {}
        return {**self._head, "choices": [choice], **more}


def _id(call: Call, name: str) -> str:
    return f"{'chatcmpl' if call.chat else 'cmpl'}-{name}"


def _finish(call: Call, completion: CompletionOutput) -> str | None:
    return "length" if call.score_only and completion.finish_reason else completion.finish_reason


def _choice(call: Call, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    entries: list[tuple[int, dict[int, Logprob] | None]] = []
    text = output.prompt or "" if call.echo else ""
    if call.echo and output.prompt_logprobs is not None:
        entries += zip(output.prompt_token_ids, output.prompt_logprobs)
    if not call.score_only:
        text += completion.text
        entries += zip(completion.token_ids, completion.logprobs or [])
    scored = _logprobs(call, entries, 0) if call.params.logprobs is not None else None
    reasons = {"finish_reason": _finish(call, completion), "stop_reason": completion.stop_reason}
    if call.chat:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": scored, **reasons}
    return {"index": index, "text": text, "logprobs": scored, **reasons}


def _logprobs(call: Call, entries: Entries, offset: int) -> dict[str, Any]:
    """Log-probabilities of tokens, in the shape of the call's API."""
    if call.chat:
        return {"content": [_scored(call, *one) for one in entries], "refusal": None}
    tokens = [_text(call.tokenizer, token) for token, _ in entries]
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [None if found is None else _finite(found[token]) for token, found in entries],
        "top_logprobs": [None if found is None else _legacy_top(call, found) for _, found in entries],
        "text_offset": offsets[: len(tokens)],
    }


def _legacy_top(call: Call, found: dict[int, Logprob]) -> dict[str, float]:
    """Text to log-probability, the chosen token included; of equal texts (parts of characters) the likeliest."""
    top: dict[str, float] = {}
    for token, entry in sorted(found.items(), key=lambda item: -item[1].logprob):
        top.setdefault(_text(call.tokenizer, token), _finite(entry))
    return top


def _scored(call: Call, token: int, found: dict[int, Logprob] | None) -> dict[str, Any]:
    assert found is not None and call.params.logprobs is not None
    ranked = sorted(found.items(), key=lambda item: item[1].rank or 0)[: call.params.logprobs]

    def shown(one: int, entry: Logprob) -> dict[str, Any]:
        raw = None if call.tokenizer is None else list(call.tokenizer.token_bytes(one))
        return {"token": _text(call.tokenizer, one), "logprob": _finite(entry), "bytes": raw}

    return {**shown(token, found[token]), "top_logprobs": [shown(*one) for one in ranked]}


def _text(tokenizer: Tokenizer | None, token: int) -> str:
    return f"token_id:{token}" if tokenizer is None else tokenizer.token_text(token)


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST_LOGPROB)
