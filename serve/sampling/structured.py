"""Structured output: which tokens may follow, so that a text obeys a JSON schema, a regular expression or a grammar.

llguidance (Microsoft; masks as in arXiv 2501.10868, section on engines) walks the tokenizer's trie along a lexer and
an Earley parser. Here are its compiler, the state of each sample, and the masks of a step; `grammar_mask` applies
them on the device. Nothing of it is imported before a request asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from ..tokenizer import Tokenizer

MAX_CHOICES = 4096
KEPT_GRAMMARS = 64
KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True)
class StructuredOutputs:
    """What a text must be: exactly one of these.

    json         a JSON schema: an object, or its text; kept as text. Members are written in the schema's order
    regex        a regular expression (Rust's syntax) that the whole text matches
    choice       one of these texts
    grammar      a context-free grammar, in Lark's or GBNF's notation
    json_object  True: any JSON object
    disable_any_whitespace  JSON without whitespace between its tokens
    whitespace_pattern      a regular expression for that whitespace
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.json, Mapping):
            object.__setattr__(self, "json", _dumps(self.json))
        if isinstance(self.choice, Iterable) and not isinstance(self.choice, str | Mapping):
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs must have exactly one of {', '.join(KINDS)}, but has "
                f"{' and '.join(given) or 'none'}"
            )
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                wanted = "a JSON schema (an object or its text)" if name == "json" else "text"
                raise ValueError(f"structured_outputs: {name} must be {wanted}, but is {_short(value)}")
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(
                    f"structured_outputs: {name} must be True or False, but is {_short(getattr(self, name))}"
                )
        texts = self.choice is None or (
            isinstance(self.choice, tuple) and all(isinstance(one, str) and one for one in self.choice)
        )
        if not texts or (self.choice is not None and not 1 <= len(self.choice) <= MAX_CHOICES):
            raise ValueError(
                f"structured_outputs: choice must be a list of 1 to {MAX_CHOICES} texts, none of them empty, but "
                f"is {_short(self.choice)}"
            )
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError(
                "structured_outputs: disable_any_whitespace leaves nothing for whitespace_pattern; give one of them"
            )

    @staticmethod
    def of(value: Any) -> StructuredOutputs | None:
        """None, the parameters themselves, or a dict of their fields, as a JSON request brings it."""
        if value is None or isinstance(value, StructuredOutputs):
            return value
        try:
            return StructuredOutputs(**value)
        except TypeError as error:
            raise ValueError(
                f"structured_outputs={_short(value)} must be StructuredOutputs, or a dict of its fields ({error})"
            ) from None


class Matcher:
    """Where one sample stands in its grammar. `ended`: an end-of-text token was accepted. `error`: what llguidance
    gave up on, or empty."""

    def __init__(self, state: Any, ends: frozenset[int]):
        self.state, self.ends, self.ended = state, ends, False

    def accept(self, token: int) -> None:
        """Take the next token."""
        self.ended = self.ended or (self.state.consume_token(token) and token in self.ends)

    @property
    def error(self) -> str:
        return self.state.get_error()

    def fork(self) -> Matcher:
        """Another sample that stands at the same place."""
        return Matcher(self.state.deep_copy(), self.ends)


class Grammars:
    """The compiler and the masks of one tokenizer. `vocab_size` V is the model's, which may pad the tokenizer's: such
    ids are never allowed. Made for free: the trie of tokens is built when the first request asks."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Iterable[int]):
        self.tokenizer, self.vocab_size, self.eos_ids = tokenizer, vocab_size, sorted(eos_ids)
        self._compiled = lru_cache(KEPT_GRAMMARS)(self._compile)

    def matcher(self, asked: StructuredOutputs) -> Matcher:
        """At the beginning of the grammar that is asked for. ValueError, with the compiler's message, where it does not
        compile."""
        return self._compiled(asked).fork()

    def check(self, asked: Any) -> None:
        """Compile now, in the caller's thread: the ValueError comes early, and `matcher` finds the grammar compiled."""
        structured = StructuredOutputs.of(asked)
        if structured is not None:
            self._compiled(structured)

    def masks(
        self, rows: Sequence[tuple[int, Matcher]], width: int, idle_seat: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seats i32[width] and masks u32[width, ceil(V/32)] of up to `width` (seat, matcher): bit v % 32 of word
        v // 32 is set where token v may follow. Rows computed in parallel; unused ones belong to the idle seat."""
        seats = np.full(width, idle_seat, np.int32)
        seats[: len(rows)] = [seat for seat, _ in rows]
        words = np.zeros((width, -(-self._trie.vocab_size // 32)), np.uint32)
        if rows:
            states = [(matcher.state, place) for place, (_, matcher) in enumerate(rows)]
            self._executor.unsafe_compute_mask_ptr(states, words.ctypes.data, words.shape[1] * 4, width)
        return seats, np.ascontiguousarray(words[:, : -(-self.vocab_size // 32)])

    def _compile(self, asked: StructuredOutputs) -> Matcher:
        library, trie = self._library, self._trie
        try:
            grammar = _grammar(library, asked)
        except ValueError as error:
            raise ValueError(f"structured_outputs cannot be compiled: {error}") from error
        state = library.LLMatcher(trie, grammar, log_level=0)
        if state.get_error():
            raise ValueError(f"structured_outputs cannot be compiled: {state.get_error()}")
        return Matcher(state, frozenset(trie.eos_tokens))

    @cached_property
    def _library(self) -> ModuleType:
        try:
            import llguidance
        except ImportError:
            raise ValueError(
                "structured_outputs needs the llguidance package: pip install 'tokenloom[structured]'"
            ) from None
        return llguidance

    @cached_property
    def _trie(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                "structured_outputs needs a tokenizer and the engine has none; give the engine a tokenizer"
            )
        size = max(self.vocab_size, self.tokenizer.vocab_size)
        text = self.tokenizer.backend.to_str()
        try:
            return self._library.LLTokenizer(text, n_vocab=size, eos_token=self.eos_ids or None)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"structured_outputs cannot work with this tokenizer: {error}") from error

    @cached_property
    def _executor(self) -> Any:
        return self._library.LLExecutor()


def _grammar(library: ModuleType, asked: StructuredOutputs) -> str:
    """llguidance's own notation. ValueError for what is not even JSON."""
    if asked.regex is not None:
        return library.LLMatcher.grammar_from_regex(asked.regex)
    if asked.choice is not None:
        return library.LLMatcher.grammar_from_lark("start: " + " | ".join(map(_dumps, asked.choice)))
    if asked.grammar is not None:
        return library.grammar_from("grammar", asked.grammar)
    schema = '{"type": "object"}' if asked.json is None else asked.json
    spaces = {} if asked.whitespace_pattern is None else {"whitespace_pattern": asked.whitespace_pattern}
    flexible = not asked.disable_any_whitespace
    return library.LLMatcher.grammar_from_json_schema(schema, {"whitespace_flexible": flexible, **spaces})


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs: {_short(value)} is not JSON: {error}") from None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
