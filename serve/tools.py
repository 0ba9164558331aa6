"""A Python function becomes the JSON schema that chat templates show to the model as a tool.

Types come from the annotations, descriptions from the Google-style docstring; the result equals
`transformers.utils.get_json_schema`.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

JSON_TYPES = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
SCALARS = (int, float, str, bool, type(None))
SECTIONS = r"Args:|Returns:|Raises:|\Z"


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "description", "parameters", "return"?}} of a typed function.

    Every argument needs a type hint and a line in the docstring's Args section; a line that ends in
    `(choices: ["a", "b"])` becomes an enum. Raises ValueError for what is missing or has no JSON type.
    """
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise ValueError(f"a tool is a JSON schema (dict) or a Python function, but got {function!r}")
    name, text = function.__name__, (inspect.getdoc(function) or "").strip()
    if not text:
        raise ValueError(f"tool {name} has no docstring; the model learns from it what the tool does")
    described, returned = _argument_lines(text), _section(text, "Returns")
    properties, required, result = _signature(function)
    for argument, schema in properties.items():
        if argument not in described:
            raise ValueError(f"tool {name}: the docstring's Args section does not describe {argument!r}")
        schema.update(_description(described[argument]))
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    summary = re.split(rf"\s*(?:{SECTIONS})", text, maxsplit=1)[0].strip()
    schema = {"name": name, "description": summary, "parameters": parameters}
    if result is not None:
        schema["return"] = result | ({} if returned is None else {"description": returned.strip()})
    return {"type": "function", "function": schema}


def _signature(function: Callable[..., Any]) -> tuple[dict[str, Any], list[str], dict[str, Any] | None]:
    """Schemas of the arguments, the names of those without default, and the result's schema if it has one."""
    hints, properties, required = get_type_hints(function), {}, []
    for place, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if parameter.annotation is inspect.Parameter.empty:
            if place == 0 and name in ("self", "cls"):
                continue
            raise ValueError(f"tool {function.__name__}: argument {name!r} has no type hint")
        properties[name] = _json_type(hints[name])
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
    try:
        result = _json_type(hints["return"]) if "return" in hints else None
    except ValueError:  # the model never writes the result, so its type may be anything
        result = None
    return properties, required, result


def _json_type(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum([member.value for member in hint], hint)
    if origin is None and isinstance(hint, type) and hint in JSON_TYPES:
        return {"type": JSON_TYPES[hint]}
    if origin in (Union, types.UnionType):
        return _union(args)
    if origin is Literal:
        return _enum(list(args), hint)
    if origin is list:
        return {"type": "array", "items": _json_type(args[0])}
    if origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_json_type(arg) for arg in args]}
    if origin is dict and len(args) == 2:
        return {"type": "object", "additionalProperties": _json_type(args[1])}
    raise ValueError(
        f"the type hint {hint!r} has no JSON schema; use int, float, str, bool, list, dict, Literal, an Enum "
        "or unions of these (for a tuple of any length, list[...]), or pass the tool's schema as a dict"
    )


def _union(args: Sequence[Any]) -> dict[str, Any]:
    members = [_json_type(arg) for arg in args if arg is not type(None)]
    if len(members) == 1:
        schema = members[0]
    elif all(list(member) == ["type"] and isinstance(member["type"], str) for member in members):
        names = sorted({member["type"] for member in members})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": members}
    return schema | ({"nullable": True} if type(None) in args else {})


def _enum(values: list[Any], hint: Any) -> dict[str, Any]:
    if not values or any(type(value) not in SCALARS for value in values):
        raise ValueError(f"{hint!r} must list int, float, str, bool or None values, but has {values}")
    kinds = list(dict.fromkeys(JSON_TYPES[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _section(text: str, title: str) -> str | None:
    """The body of a docstring section, or None."""
    match = re.search(rf"\n\s*{title}:\n(.*?)[\n\s]*(?:Returns:|Raises:|\Z)", text, re.DOTALL)
    return match[1].strip("\n") if match else None


def _argument_lines(text: str) -> dict[str, str]:
    """Argument name to description; deeper indented lines continue a description."""
    found: dict[str, str] = {}
    indent, current = None, None
    for line in (_section(text, "Args") or "").split("\n"):
        match = re.match(r"([ \t]*)(\w+):\s*(.*)", line)
        if match and (indent is None or not match[1].startswith((indent + " ", indent + "\t"))):
            indent, current = match[1], match[2]
            found[current] = match[3].strip()
        elif current is not None and line.strip():
            found[current] = f"{found[current]} {line.strip()}".strip()
    return found


def _description(text: str) -> dict[str, Any]:
    match = re.search(r"\(choices:\s*(.*?)\)\s*$", text, re.IGNORECASE)
    if not match:
        return {"description": text}
    choices = [choice.strip() if isinstance(choice, str) else choice for choice in json.loads(match[1])]
    return {"enum": choices, "description": text[: match.start()].strip()}
