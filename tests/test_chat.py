"""Chat templates and tool schemas: equal to transformers' (recorded, and live), refusals, and one BOS."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tokenloom.serve.chat import apply, encode_chat
from tokenloom.serve.tokenizer import Tokenizer
from tokenloom.serve.tools import tool_schema

ROOT = Path(__file__).parent / "data" / "tokenizers"
STYLES = sorted(
    p.parent.name for p in ROOT.glob("*/recorded.json") if Tokenizer.load(p.parent).chat_templates
)
HELLO = [{"role": "user", "content": "Hello"}]


def load(style: str) -> Tokenizer:
    return Tokenizer.load(ROOT / style)


def with_template(source: str, style: str = "llama2") -> Tokenizer:
    return dataclasses.replace(load(style), chat_templates={"default": source})


@pytest.mark.parametrize("style", STYLES)
def test_renders_as_transformers_did(style: str):
    """Texts are equal; what transformers refuses is refused, in the template's own words."""
    tokenizer, cases = load(style), json.loads((ROOT / style / "recorded.json").read_text("utf-8"))["chats"]
    assert sum("text" in case for case in cases) >= 5
    for case in cases:
        arguments = {"add_generation_prompt": False, **case["arguments"]}
        if "text" in case:
            assert apply(tokenizer, template=case["template"], **arguments) == case["text"], arguments
            continue
        with pytest.raises(ValueError, match=re.escape(case["refused"]) or None):
            apply(tokenizer, template=case["template"], **arguments)


def test_all_styles_have_cases():
    assert STYLES == ["gemma", "llama2", "llama3", "mistral", "phi3", "qwen"]


def test_raise_exception_reaches_the_caller():
    turns = [*HELLO, *HELLO]
    with pytest.raises(ValueError, match="roles must alternate user/assistant"):
        apply(load("gemma"), turns)
    with pytest.raises(ValueError, match="System role not supported"):
        apply(load("gemma"), [{"role": "system", "content": "x"}, *HELLO])


def test_no_template_names_the_remedy():
    with pytest.raises(ValueError, match=r"no chat template.*template="):
        apply(load("gpt2"), HELLO)
    named = dataclasses.replace(load("gpt2"), chat_templates={"rag": "x", "plain": "y"})
    with pytest.raises(ValueError, match=r"\['plain', 'rag'\]"):
        apply(named, HELLO)
    assert apply(named, HELLO, template="plain") == "y"
    assert apply(load("gpt2"), HELLO, template="{{ messages[0].content }}!") == "Hello!"


def test_tools_choose_the_tool_template():
    tokenizer = load("llama2")
    assert "<|im_start|>" not in apply(tokenizer, HELLO)
    assert "weather_in" in apply(tokenizer, HELLO, tools=[weather_in])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{% set ns = namespace(_x=1) %}",
        "{{ dict.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_code }}",
    ],
)
def test_the_sandbox_holds(source: str):
    with pytest.raises(ValueError, match="tried to leave its sandbox"):
        text = apply(with_template(source), HELLO)
        pytest.fail(f"the template got {text!r}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "malformed in line 1"),
        ("{{ messages[0].content + 1 }}", "failed on these messages"),
        ("{{ nothing.at.all }}", "failed on these messages"),
        ("{{ range(10000000) | list }}", "failed on these messages"),
        ("{{ raise_exception('No, ' + messages[0].role) }}", "refused these messages: No, user"),
    ],
)
def test_template_errors_are_value_errors(source: str, message: str):
    with pytest.raises(ValueError, match=message):
        apply(with_template(source), HELLO)


def test_environment_is_that_of_transformers():
    source = (
        "{{ {'a': '<é>', 'b': [1]} | tojson }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true, indent=1) }}\n"
        "    {% for i in range(9) %}\n{% if i == 2 %}{% break %}{% endif %}\n{{ i }}\n    {% endfor %}\n"
        "{% generation %}said{% endgeneration %}{{ dict(a=1).a }}{% set n = namespace(k=1) %}"
        "{% set n.k = 2 %}{{ n.k }}"
    )
    expected = '{"a": "<é>", "b": [1]} {\n "a": 2,\n "b": 1\n}\n0\n1\nsaid12'
    assert apply(with_template(source), HELLO) == expected
    assert apply(with_template("{{ strftime_now('%Y') }}"), HELLO).isdigit()


def test_templates_see_plain_data_and_callers_keep_their_messages():
    @dataclasses.dataclass
    class Message:
        role: str
        content: Any

    class Role(StrEnum):
        user = "user"

    messages = [Message(Role.user, np.int64(3)), Message("assistant", object()), Message("user", None)]
    source = "{% for m in messages %}{{ m.role }}={{ m.content is defined and m.content }};{% endfor %}"
    rendered = apply(with_template(source), messages)  # type: ignore[arg-type]
    assert rendered == "user=3;assistant=<object>;user=False;"
    turns = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "So"}], "tool_calls": None}]
    before = json.dumps(turns)
    apply(load("qwen"), turns, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(turns) == before


def test_continuing_ends_where_the_message_ends():
    said = [*HELLO, {"role": "assistant", "content": "Once upon "}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert apply(load("llama2"), said, **options).endswith("<|assistant|>\nOnce upon ")
    assert apply(load("llama3"), said, **options).endswith("<|end_header_id|>\n\nOnce upon")  # it trims
    thinking = [*HELLO, {"role": "assistant", "thinking": "Let me", "content": "x"}]
    options["continue_final_message"] = "thinking"
    assert apply(load("qwen"), thinking, **options).endswith("<think>\nLet me")
    with pytest.raises(ValueError, match="add_generation_prompt=False"):
        apply(load("llama2"), said, continue_final_message=True)
    with pytest.raises(ValueError, match="'content' in the last message"):
        apply(load("qwen"), [{"role": "assistant"}], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(ValueError, match="never uses that field"):
        apply(
            load("llama2"),
            [{"role": "user", "x": "y"}],
            add_generation_prompt=False,
            continue_final_message="x",
        )
    with pytest.raises(ValueError, match="does not appear"):
        hidden = with_template("{{ messages[0].content }}")
        apply(hidden, said, add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize("style", STYLES)
def test_never_two_bos(style: str):
    """Whether or not the template writes it, BOS is there once where the tokenizer wants it."""
    tokenizer = load(style)
    text = apply(tokenizer, HELLO)
    bos = tokenizer.bos_token_id
    for shown in (text, text.removeprefix(tokenizer.special_tokens.get("bos_token", ""))):
        ids = encode_chat(tokenizer, shown)
        assert ids.count(bos) == (1 if tokenizer.adds_bos else 0)
        assert ids[:1] == [bos] or not tokenizer.adds_bos


def test_bos_follows_the_tokenizers_own_encoding():
    tokenizer = load("phi3")  # its template writes no BOS, its tokenizer wants one
    text = apply(tokenizer, HELLO)
    assert encode_chat(tokenizer, text) == tokenizer.encode(text)
    llama3 = load("llama3")  # its template writes it
    assert encode_chat(llama3, apply(llama3, HELLO)) == llama3.encode(
        apply(llama3, HELLO), add_special_tokens=False
    )
    assert encode_chat(llama3, "") == [llama3.bos_token_id]


class Unit(Enum):
    C = "celsius"
    F = "fahrenheit"


def weather_in(city: str, unit: Unit = Unit.C, days: int | None = None) -> dict[str, float]:
    """
    Tells the weather.

    Measured: at noon.

    Args:
        city: Where; a city,
            and its country: both
        unit: How to write it
        days: How far ahead (choices: [1, 2, 7])

    Returns:
        Degrees: by hour.
    """
    return {}


def many(
    kind: Literal["a", "b"], tags: list[str], either: int | str, pair: tuple[int, str],
    table: dict[str, list[int]], mixed: int | list[int], anything: Any, flag: bool = False,
    maybe: float | None = None, bare: list | None = None,
) -> object:  # fmt: skip
    """Takes many types.

    Args:
        kind: k
        tags: t
        either: e
        pair: p
        table: t

        mixed: m
        anything: a
        flag: f (choices: [" true ", false])
        maybe: m
        bare: b

    Raises:
        ValueError: never
    """


def plainest():
    """Does: it."""


def test_a_function_becomes_a_schema():
    assert tool_schema(weather_in) == {
        "type": "function",
        "function": {
            "name": "weather_in",
            "description": "Tells the weather.\n\nMeasured: at noon.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where; a city, and its country: both"},
                    "unit": {
                        "type": "string",
                        "enum": ["celsius", "fahrenheit"],
                        "description": "How to write it",
                    },
                    "days": {
                        "type": "integer",
                        "nullable": True,
                        "enum": [1, 2, 7],
                        "description": "How far ahead",
                    },
                },
                "required": ["city"],
            },
            "return": {
                "type": "object",
                "additionalProperties": {"type": "number"},
                "description": "Degrees: by hour.",
            },
        },
    }


def test_bad_tools_name_what_is_missing():
    def undocumented(a: int): ...

    def untyped(a):
        """Args: none."""

    def undescribed(a: int):
        """Does it.

        Args:
            b: No.
        """

    def odd(a: complex):
        """Does it.

        Args:
            a: No.
        """

    for tool, message in (
        (undocumented, "no docstring"),
        (untyped, "'a' has no type hint"),
        (odd, "complex"),
    ):
        with pytest.raises(ValueError, match=message):
            tool_schema(tool)
    with pytest.raises(ValueError, match="does not describe 'a'"):
        tool_schema(undescribed)
    with pytest.raises(ValueError, match="JSON schema"):
        apply(load("qwen"), HELLO, tools=["weather"])  # type: ignore[list-item]


class Station:
    def read(self, place: str = "here") -> float:
        """Reads the thermometer.

        Args:
            place: Where
        """
        return 0.0


@pytest.mark.parity
@pytest.mark.parametrize("tool", [weather_in, many, plainest, Station().read], ids=lambda tool: tool.__name__)
def test_schemas_equal_transformers_live(tool: Callable[..., Any]):
    utilities = pytest.importorskip("transformers.utils")
    assert tool_schema(tool) == utilities.get_json_schema(tool)


@pytest.mark.parity
@pytest.mark.parametrize("style", STYLES)
def test_rendering_equals_transformers_live(style: str):
    """With functions as tools, thoughts under other names, and variables that replace special tokens."""
    transformers = pytest.importorskip("transformers")
    ours, oracle = load(style), transformers.AutoTokenizer.from_pretrained(ROOT / style)
    for name in ours.chat_templates:
        cases: list[dict[str, Any]] = [
            {"messages": HELLO, "bos_token": "[B]", "eos_token": "[E]", "date_string": "today"},
            {
                "messages": [*HELLO, {"role": "assistant", "reasoning": "Hm.", "content": "Yes"}],
                "date_string": "",
            },
        ]
        if name == "tool_use" or style in ("qwen", "llama3", "mistral"):
            cases.append({"messages": HELLO, "tools": [weather_in, many], "date_string": "1"})
        for case in cases:
            case |= {"documents": [{"title": "t", "text": "x"}]}
            theirs = oracle.apply_chat_template(
                tokenize=False, chat_template=ours.chat_templates[name], add_generation_prompt=True,
                conversation=case["messages"], **{k: v for k, v in case.items() if k != "messages"},
            )  # fmt: skip
            assert apply(ours, template=name, **case) == theirs
