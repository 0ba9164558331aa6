"""OpenAI's request objects, translated to prompts and SamplingParams; `openai_answers` goes the other way.

The server and the batch runner share both. Requests may use vLLM's extra body fields: every field of
SamplingParams goes through under its own name. Nothing is dropped silently: a field that this stack does not
honour is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bounds import QueueFull
from .sampling.defaults import asked
from .sampling.params import SamplingParams
from .sampling.structured import StructuredOutputs
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .llm import LLM

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MAX_N = 128
MAX_PROMPTS = 2048

# SamplingParams fields that OpenAI's body says differently, or that this translation sets.
TRANSLATED = {"max_tokens", "logprobs", "prompt_logprobs", "logit_bias", "detokenize"}
PASSED = {one.name for one in dataclasses.fields(SamplingParams)} - TRANSLATED
SHARED = PASSED | {
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "logprobs",
    "logit_bias",
    "cache_salt",
    "response_format",
}
# Bookkeeping of OpenAI's own service: accepted, without effect.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
TEMPLATE = {"add_generation_prompt", "continue_final_message", "documents"}
FIELDS = {
    COMPLETIONS: SHARED | WITHOUT_EFFECT | {"prompt", "echo", "best_of", "suffix"},
    CHAT: SHARED | WITHOUT_EFFECT | TEMPLATE | {
        "messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice", "parallel_tool_calls",
        "modalities", "chat_template_kwargs",
    },
}  # fmt: skip


class Refusal(ValueError):
    """A request that is answered with `status` and OpenAI's error object."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Call:
    """A request, translated: what to run, and how the answer is to look.

    prompts: what to run with `params`, one after the other; a chat has one. echo: the completion begins with
    its prompt. score_only: max_tokens was 0, one token is generated and not shown. tokenizer: None when the
    model has none (texts are empty then).
    """

    chat: bool
    model: str
    prompts: list[dict[str, Any]]
    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    score_only: bool = False
    tokenizer: Tokenizer | None = field(default=None, repr=False)

    @property
    def samples(self) -> int:
        """Generations that this request starts."""
        return self.params.n * len(self.prompts)


def served_names(llm: LLM, names: Iterable[str] = ()) -> list[str]:
    """What requests may call this model: the given names, or the name that it was opened by and its last part."""
    return list(dict.fromkeys(names)) or list(dict.fromkeys([llm.name, Path(llm.name).name]))


def dumps(value: Any) -> bytes:
    """JSON in UTF-8, without spaces; lone surrogates keep their \\uXXXX escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def loads(data: bytes | str) -> Any:
    """Parse JSON; ValueError says where it breaks."""
    try:
        return json.loads(data)
    except RecursionError:
        raise Refusal("the JSON is nested too deeply; flatten it") from None
    except ValueError as error:
        raise Refusal(f"this is not JSON: {error}") from None


def error_status(error: Exception) -> int:
    """The HTTP status that says what happened: the caller's mistake, or the engine's failure."""
    if isinstance(error, Refusal):
        return error.status
    if isinstance(error, QueueFull):
        return 429
    return 400 if isinstance(error, ValueError) else 500


def error_object(error: Exception) -> dict[str, Any]:
    """OpenAI's error object."""
    status = error_status(error)
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    code, param = (error.code, error.param) if isinstance(error, Refusal) else (None, None)
    return {"message": str(error), "type": kind, "param": param, "code": code}


# -- requests --------------------------------------------------------------------------------------------------


def parse(url: str, body: Any, llm: LLM, names: Sequence[str]) -> Call:
    """Translate the body of a request; ValueError (often a Refusal) says what cannot be served."""
    if url not in FIELDS:
        raise Refusal(f"url {url!r} is not served; use one of {', '.join(FIELDS)}", status=404)
    if not isinstance(body, dict):
        raise Refusal(f"the body must be a JSON object, but is {_short(body)}")
    given = {name: value for name, value in body.items() if value is not None}
    unknown = sorted(set(given) - FIELDS[url])
    if unknown:
        raise Refusal(
            f"body field {unknown[0]!r} is not supported by {url}; remove it", param=unknown[0],
            code="unknown_field",
        )  # fmt: skip
    model = given.get("model", names[0])
    if model not in names:
        raise Refusal(
            f"model {_short(model)} is not served here; use {' or '.join(map(repr, names))}", status=404,
            code="model_not_found", param="model",
        )  # fmt: skip
    chat, stream = url == CHAT, _flag(given, "stream")
    echo, limit = _flag(given, "echo"), _max_tokens(given, chat)
    score_only = echo and limit == 0
    params = _sampling(given, chat, echo, 1 if score_only else limit, llm.get_default_sampling_params())
    llm.engine.grammars.check(params.structured_outputs)
    if echo and stream and params.logprobs is not None:
        raise Refusal("echo with logprobs cannot be streamed; leave out one of the three", param="echo")
    try:
        prompts = [_chat_prompt(given, llm)] if chat else _prompts(given, llm, echo)
    except RecursionError:
        raise Refusal("the messages or tools are nested too deeply; flatten them") from None
    if "cache_salt" in given:
        salt = _clean(given["cache_salt"], "cache_salt", text=True)
        prompts = [{**prompt, "cache_salt": salt} for prompt in prompts]
    return Call(
        chat, model, prompts, params, stream, _include_usage(given, stream), echo, score_only, llm.tokenizer
    )


def _sampling(
    given: dict[str, Any], chat: bool, echo: bool, limit: int | None, defaults: SamplingParams
) -> SamplingParams:
    settings = {name: given[name] for name in PASSED & set(given)}
    if "logit_bias" in given:
        settings["logit_bias"] = _logit_bias(given["logit_bias"])
    if chat:
        settings["logprobs"] = _chat_logprobs(given)
    else:
        settings["logprobs"] = given.get("logprobs")
        settings["prompt_logprobs"] = settings["logprobs"] if echo else None
    if "response_format" in given:
        settings["structured_outputs"] = _structured(given)
    params = asked(defaults, settings | {"max_tokens": limit})
    if params.n > MAX_N:
        raise Refusal(f"n={params.n} is more than the {MAX_N} samples that one request may have", param="n")
    if given.get("best_of", params.n) != params.n:
        raise Refusal("best_of differs from n, but every sample is returned; leave best_of out")
    if given.get("suffix", "") != "":
        raise Refusal("suffix (filling in the middle) is not supported; leave it out", param="suffix")
    return params


def _structured(given: dict[str, Any]) -> StructuredOutputs | None:
    """`response_format`: {"type": "text"}, "json_object", or "json_schema" with {"schema": ...}."""
    wanted = given["response_format"]
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    inner = wanted.get("json_schema") if kind == "json_schema" else None
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if kind not in ("text", "json_object", "json_schema") or (kind == "json_schema" and schema is None):
        raise Refusal(
            "response_format may be {'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', "
            f"'json_schema': {{'schema': ...}}}}, but is {_short(wanted)}",
            param="response_format",
        )
    if kind != "text" and "structured_outputs" in given:
        raise Refusal("response_format and structured_outputs exclude each other", param="response_format")
    if kind == "text":
        return StructuredOutputs.of(given.get("structured_outputs"))
    return StructuredOutputs(json=schema) if kind == "json_schema" else StructuredOutputs(json_object=True)


def _max_tokens(given: dict[str, Any], chat: bool) -> int | None:
    """OpenAI's defaults: 16 for a completion, what fits for a chat."""
    limit = given.get("max_completion_tokens", given.get("max_tokens"))
    if given.get("max_tokens", limit) != limit:
        raise Refusal("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    return limit if limit is not None or chat else 16


def _chat_logprobs(given: dict[str, Any]) -> int | None:
    if not _flag(given, "logprobs"):
        if given.get("top_logprobs"):
            raise Refusal("top_logprobs needs logprobs=true", param="top_logprobs")
        return None
    return given.get("top_logprobs", 0)


def _logit_bias(biases: Any) -> dict[int, Any]:
    """JSON's keys are strings; token ids are numbers."""
    if not isinstance(biases, dict):
        raise Refusal(
            f"logit_bias must map token ids to numbers, but is {_short(biases)}", param="logit_bias"
        )
    try:
        return {int(token): value for token, value in biases.items()}
    except ValueError:
        raise Refusal(
            f"logit_bias has a key that is no token id: {_short(biases)}", param="logit_bias"
        ) from None


def _include_usage(given: dict[str, Any], stream: bool) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise Refusal(
            f"stream_options may hold include_usage, but is {_short(options)}", param="stream_options"
        )
    if options and not stream:
        raise Refusal("stream_options needs stream=true", param="stream_options")
    return _flag(options, "include_usage")


def _prompts(given: dict[str, Any], llm: LLM, echo: bool) -> list[dict[str, Any]]:
    """The prompts of a completion: a text, token ids, or a list of either. Tokenized here."""
    prompt = given.get("prompt")
    several = isinstance(prompt, list) and (not prompt or isinstance(prompt[0], (str, list)))
    prompts: list[Any] = prompt if several else [prompt]  # type: ignore[assignment]
    if not prompts or len(prompts) > MAX_PROMPTS or not all(isinstance(one, (str, list)) for one in prompts):
        raise Refusal(
            f"prompt must be a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these, but is "
            f"{_short(prompt)}", param="prompt",
        )  # fmt: skip
    found = []
    for one in prompts:
        text, ids = llm.tokens(_clean(one, "prompt"))
        if echo and text is None:
            text = "" if llm.tokenizer is None else llm.tokenizer.decode(ids)
        found.append({"prompt": text, "prompt_token_ids": ids})
    return found


def _chat_prompt(given: dict[str, Any], llm: LLM) -> dict[str, Any]:
    """The rendered and tokenized conversation."""
    messages, tools = given.get("messages"), given.get("tools")
    if not isinstance(messages, list) or not messages:
        raise Refusal(
            f"messages must be a list of at least one message, but is {_short(messages)}", param="messages"
        )
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise Refusal(f"tools must be a list of JSON schemas, but is {_short(tools)}", param="tools")
    choice = given.get("tool_choice", "auto")
    if choice not in ("none", "auto"):
        raise Refusal(
            f'tool_choice may be "none" or "auto", but is {_short(choice)}: a call cannot be forced',
            param="tool_choice",
        )
    if given.get("modalities", ["text"]) != ["text"]:
        raise Refusal(
            f"modalities may only be ['text'], but is {_short(given['modalities'])}", param="modalities"
        )
    documents = _list(given.get("documents", []), "documents")
    settings: dict[str, Any] = {"documents": documents} if documents else {}
    for name in ("add_generation_prompt", "continue_final_message"):
        if name in given:
            settings[name] = _flag(given, name)
    more = given.get("chat_template_kwargs", {})
    reserved = {"messages", "tools", "tokenizer", "template", "chat_template", *TEMPLATE}
    if not isinstance(more, dict) or reserved & set(more):
        raise Refusal(
            f"chat_template_kwargs must map names to values, other than {sorted(reserved)}; got {_short(more)}",
            param="chat_template_kwargs",
        )
    settings.setdefault("add_generation_prompt", not settings.get("continue_final_message", False))
    rendered = None if choice == "none" or not tools else tools
    return llm.chat_prompt([_message(m) for m in messages], tools=rendered, **settings, **more)


def _message(message: Any) -> dict[str, Any]:
    """A message as templates want it: text parts joined by newlines, tool arguments as an object."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refusal(
            f"a message is an object with a role (text), but got {_short(message)}", param="messages"
        )
    message = {name: value for name, value in message.items() if value is not None}
    content = message.get("content", "" if message["role"] == "assistant" else None)
    if isinstance(content, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise Refusal(
                f"content parts must be text ({{'type': 'text', 'text': ...}}); got {_short(content)}",
                param="messages",
            )
        content = "\n".join(part["text"] for part in content)
    message["content"] = _clean(content, "content", text=True)
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call) for call in _list(message["tool_calls"], "tool_calls")]
    return message


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise Refusal(f"a tool call is an object with a function, but got {_short(call)}", param="messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        function = {**function, "arguments": loads(arguments or "{}")}
    return {**call, "function": function}


def _clean(value: Any, name: str, text: bool = False) -> Any:
    if text and not isinstance(value, str):
        raise Refusal(f"{name} must be text, but is {_short(value)}", param=name)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Refusal(f"{name} has half of a surrogate pair, which is no character", param=name) from None
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refusal(f"{name} must be a list, but is {_short(value)}", param=name)
    return value


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise Refusal(f"{name} must be true or false, but is {_short(value)}", param=name)
    return value


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
