"""Requests drawn at random, of every kind that an engine serves: what the contract and the soak feed to it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from tokenloom import SamplingParams
from tokenloom.serve.request import Request

STOPS = ("e", " the", "(", "\n", "in", "0", "er", "self")
BAD_WORDS = ("return", "a", "self.x", " = 0")


@dataclass(frozen=True)
class Drawn:
    """A request before it is made: the same one can be given to many engines."""

    index: int
    prompt: list[int]
    params: SamplingParams
    salt: str | None
    priority: int
    tenant: str

    def request(self, **changes: Any) -> Request:
        """`changes` go to its parameters. Every drawn request has a seed, so nothing depends on its number."""
        params = replace(self.params, **changes)
        assert params.seed is not None
        return Request(
            str(self.index), None, list(self.prompt), params, params.seed, cache_salt=self.salt,
            priority=self.priority, tenant=self.tenant,
        )  # fmt: skip


def draw_params(draw: random.Random, vocab: int, longest: int = 30, text: bool = False) -> SamplingParams:
    """Parameters of every kind, seeded. text: those that need a tokenizer too."""
    pick = draw.choice
    most = draw.randint(1, longest)
    return SamplingParams(
        n=pick([1, 1, 1, 2, 3]), temperature=pick([0.0, 0.0, 0.7, 1.3]), top_k=pick([0, 5, 40]),
        top_p=pick([1.0, 0.8, 0.3]), min_p=pick([0.0, 0.0, 0.05]), seed=draw.getrandbits(64),
        repetition_penalty=pick([1.0, 1.0, 1.2, 0.9]), presence_penalty=pick([0.0, 0.0, 0.5]),
        frequency_penalty=pick([0.0, 0.0, 0.3]), logit_bias=pick([None, None, {3: 4.0, 7: -50.0}]),
        allowed_token_ids=pick([None, None, list(range(0, vocab, 3))]), ignore_eos=pick([True, True, False]),
        stop_token_ids=pick([None, None, [draw.randrange(vocab) for _ in range(12)]]),
        max_tokens=most, min_tokens=pick([0, 0, 1, min(5, most)]),
        logprobs=pick([None, None, 0, 3]), logprobs_mode=pick(["raw", "raw", "processed"]),
        prompt_logprobs=pick([None] * 7 + [0, 2]),
        repetition_detection=pick([None, None, dict(max_pattern_size=4, min_count=3)]),
        stop=pick([None, draw.sample(STOPS, 2)]) if text else None,
        bad_words=pick([None, None, draw.sample(BAD_WORDS, 2)]) if text else None,
        include_stop_str_in_output=text and pick([True, False]),
    )  # fmt: skip


def draw_requests(
    count: int, seed: int, vocab: int, *, prompt: int = 120, output: int = 30, text: bool = False,
    tenants: str = "abc",
) -> list[Drawn]:  # fmt: skip
    """Prompts of 1 to `prompt` tokens: half of them begin with a part of one of a few shared texts, and some
    repeat an earlier prompt whole, mostly one that may be running still."""
    draw = random.Random(f"requests {seed}")

    def words(longest: int) -> list[int]:
        return [draw.randrange(vocab) for _ in range(draw.randint(1, max(1, longest)))]

    heads, found = [words(prompt) for _ in range(6)], []
    for index in range(count):
        kind = draw.random()
        if found and kind < 0.2:
            ids = list(draw.choice(found[-3:] if kind < 0.12 else found).prompt)
        elif kind < 0.6:
            head = draw.choice(heads)
            ids = head[: draw.randint(1, len(head))]
            ids += words(prompt - len(ids)) if len(ids) < prompt else []
        else:
            ids = words(prompt)
        found.append(
            Drawn(
                index,
                ids,
                draw_params(draw, vocab, output, text),
                draw.choice([None, None, None, "salt"]),
                draw.randrange(3),
                draw.choice(tenants),
            )
        )
    return found


def draw_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """A JSON schema whose texts are short: objects with optional members, lists, texts, numbers, choices."""
    kinds = ["string", "integer", "boolean", "null", "enum", "number", "pattern"]
    kind = "object" if depth == 2 else draw.choice(kinds + ["object", "array", "anyOf"] * (depth > 0))
    if kind == "object":
        names = draw.sample(["id", "name", "größe", "tags", "x y", "ok"], draw.randint(1, 3))
        members = {name: draw_schema(draw, depth - 1) for name in names}
        needed = [name for name in names if draw.random() < 0.7]
        return {"type": "object", "properties": members, "required": needed, "additionalProperties": False}
    if kind == "array":
        return {
            "type": "array",
            "items": draw_schema(draw, depth - 1),
            "minItems": draw.randint(0, 1),
            "maxItems": 2,
        }
    if kind == "anyOf":
        return {"anyOf": [draw_schema(draw, depth - 1), draw_schema(draw, 0)]}
    if kind == "enum":
        return {"enum": draw.sample(["red", "grün", 3, None, True, "a b", 2.5], draw.randint(1, 4))}
    if kind == "pattern":
        return {"type": "string", "pattern": "^[a-z]{1,4}-[0-9]{2}$"}
    if kind == "string":
        return {"type": "string", "minLength": draw.randint(0, 2), "maxLength": draw.randint(2, 8)}
    if kind == "integer":
        return {"type": "integer", "minimum": draw.randint(-20, 0), "maximum": draw.randint(0, 3000)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 100}
    return {"type": kind}
