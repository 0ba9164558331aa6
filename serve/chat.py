"""Chat templates: messages become the text that a model was trained on.

A template is Jinja source from the checkpoint, which is untrusted: it runs in Jinja's immutable sandbox and
sees plain data only. Rendering follows transformers 5 (`apply_chat_template`), to the character.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .tokenizer import Tokenizer
from .tools import tool_schema

Messages = Sequence[Mapping[str, Any]]

REASONING = ("reasoning_content", "thinking", "reasoning")  # the names under which messages carry thoughts
MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # the space tells whether the template trims


def apply(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool | str = False,
    template: str | None = None,
    documents: Sequence[dict[str, Any]] | None = None,
    **kwargs: Any,
) -> str:
    """Render `messages` (dicts with "role", "content", "tool_calls", ...) as one prompt.

    tools: JSON schemas, or Python functions with type hints and a Google-style docstring. template: the name
    of one of the tokenizer's templates, or Jinja source; None: "tool_use" when there are tools and such a
    template, else "default". continue_final_message: the text ends right after the last message's content,
    which the model then continues; a string names another field of the message to continue. Further keywords
    are variables of the template.

    Raises ValueError: no template, empty conversation, both ways to end, a template that refuses (its
    `raise_exception`), is malformed, or leaves the sandbox.
    """
    source = choose_template(tokenizer, template, tools is not None)
    if continue_final_message and add_generation_prompt:
        raise ValueError(
            "continue_final_message continues the last message and add_generation_prompt begins a new one; "
            "pass add_generation_prompt=False to continue"
        )
    chat = _chat(messages)
    if continue_final_message:
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        final = _mark_final(chat, field, source)
    variables = {
        **tokenizer.special_tokens,
        **{name: plain(value) for name, value in kwargs.items()},
        "messages": chat,
        "tools": plain([tool if isinstance(tool, dict) else tool_schema(tool) for tool in tools])
        if tools is not None
        else None,
        "documents": _documents(documents),
        "add_generation_prompt": add_generation_prompt,
    }
    text = _render(source, variables)
    return _cut_at_mark(text, final) if continue_final_message else text


def encode_chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a rendered chat, with one BOS where the tokenizer wants one, and never two."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    return [bos, *ids] if bos is not None and tokenizer.adds_bos and ids[:1] != [bos] else ids


def choose_template(tokenizer: Tokenizer, template: str | None, with_tools: bool) -> str:
    """The Jinja source: by name, given outright, or the tokenizer's own."""
    own = tokenizer.chat_templates
    if template is not None:
        return own.get(template, template)
    if with_tools and "tool_use" in own:
        return own["tool_use"]
    if "default" in own:
        return own["default"]
    if own:
        raise ValueError(
            f"the tokenizer has chat templates {sorted(own)} but no default; name one with template="
        )
    raise ValueError(
        "the tokenizer has no chat template (base models have none): pass template= with Jinja source, "
        "put chat_template.jinja into the model folder, or use generate with plain text"
    )


def plain(value: Any) -> Any:
    """Rebuild `value` from plain JSON types; other objects become their type's name, as templates must not
    hold methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return plain(dump())
    return f"<{type(value).__name__}>"


def _chat(messages: Messages) -> list[dict[str, Any]]:
    """A copy that the template may see: plain data, no keys that are None, thoughts under usual names."""
    if not messages:
        raise ValueError("the conversation is empty; give at least one message")
    chat = []
    for message in messages:
        copy = plain(message)
        if not isinstance(copy, dict):
            raise ValueError(
                f'a message is a dict like {{"role": "user", "content": "Hello"}}, but got {message!r}'
            )
        copy = {key: value for key, value in copy.items() if value is not None}
        thoughts = next((copy[name] for name in REASONING if name in copy), None)
        if thoughts is not None:
            copy = {"thinking": thoughts, **copy, "reasoning_content": thoughts}
        chat.append(copy)
    return chat


def _documents(documents: Sequence[dict[str, Any]] | None) -> Any:
    for document in documents or ():
        if not isinstance(document, dict):
            raise ValueError(f'a document is a dict like {{"title": ..., "text": ...}}, but got {document!r}')
    return plain(documents if documents is None else list(documents))


def _mark_final(chat: list[dict[str, Any]], name: str, source: str) -> str:
    """Append MARK to the last message's field, in place; returns the text that it had."""
    message = chat[-1]
    content = message.get(name)
    if content is None:
        raise ValueError(
            f"continue_final_message needs {name!r} in the last message, which has {sorted(message)}"
        )
    names = [other for other in REASONING if message.get(other) == content] if name in REASONING else [name]
    if not any(other in source for other in names):
        raise ValueError(f"continue_final_message={name!r}, but the chat template never uses that field")
    if isinstance(content, str):
        message.update({other: content + MARK for other in names})
        return content
    blocks = content if isinstance(content, (list, tuple)) else ()
    for block in reversed(blocks):
        if isinstance(block, dict) and "text" in block:
            text = block["text"]
            block["text"] = text + MARK
            return text
    raise ValueError(f"continue_final_message found no text in the last message's {name!r}: {content!r}")


def _cut_at_mark(text: str, final: str) -> str:
    """The text before MARK; trailing space goes if the template trims the message."""
    if final.strip() not in text or MARK.strip() not in text:
        raise ValueError(
            f"continue_final_message: the last message {final.strip()!r} does not appear in the rendered "
            "chat, so there is no place to continue; the template drops or changes it"
        )
    at = text.rindex(MARK.strip())
    return text[:at] if text[at : at + len(MARK)] == MARK else text[:at].rstrip()


def _render(source: str, variables: dict[str, Any]) -> str:
    try:
        return _compiled(source).render(variables)
    except jinja2.exceptions.SecurityError as error:
        raise ValueError(f"the chat template tried to leave its sandbox: {error}") from error
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is malformed in line {error.lineno}: {error.message}") from error
    except Refused as error:
        raise ValueError(f"the chat template refused these messages: {error.message}") from error
    except (
        jinja2.exceptions.TemplateError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
    ) as error:
        raise ValueError(f"the chat template failed on these messages: {error}") from error


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=SafeDict(), namespace=SafeNamespace
    )
    return environment


class GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks the assistant's words, renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class SafeDict:
    """`dict(...)` in a template, without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class SafeNamespace(Namespace):
    """`namespace(...)` in a template; names with a leading underscore are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may name a variable `self`
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace variable is called {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Refused(jinja2.exceptions.TemplateError):
    """A template called `raise_exception`."""


def _raise_exception(message: str) -> None:
    raise Refused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
