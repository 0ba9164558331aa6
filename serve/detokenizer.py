"""Token ids become text one at a time, and stop strings are found on the way.

The law: what `push` and `finish` return, joined, equals `tokenizer.decode(all ids)`, and a token costs
the same however long the text is. Text is given out as soon as no later token can change it: an incomplete
UTF-8 sequence waits for its end (byte-level vocabularies), a run of byte tokens waits for its end, because
`tokenizers` turns the whole run into replacement characters if any of it is not UTF-8 (byte-fallback
vocabularies), and whatever may be the beginning of a stop string waits until it is or is not.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from .decoding import Decoding
from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class Detokenizer:
    """One sequence's text.

    stop: strings that end the text. The one that is complete first wins (of several that end at the same
    character, the longest), so the result does not depend on where token borders fall. A stop that is
    complete within the first `min_tokens` tokens is ignored. The stop itself is part of the text only if
    `include_stop_str_in_output`.
    prompt_token_ids: the tokens before the first pushed one; only the last few are looked at. With them the
    text continues the prompt (decode(prompt + ids) = decode(prompt) + text, so Llama-style vocabularies keep
    the space between; bytes that spoil the prompt's last run of byte tokens do not change the prompt's text).
    Without them the text is `tokenizer.decode(ids)`.

    After each push: `text` is everything given out so far, `stop_reason` the stop string found, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        stop: str | Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise ValueError(f"stop={stops!r} holds an empty string, which every text contains; remove it")
        self._token = tokenizer.backend.id_to_token
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stream = Stream(tokenizer.decoding)
        self._search = StopSearch(stops)
        self._hold = bool(stops) and not include_stop_str_in_output
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._count = 0
        self._held = ""
        self._parts: list[str] = []
        self.stop_reason: str | None = None
        for token_id in self._context(prompt_token_ids, tokenizer.decoding):
            self._feed(token_id)
        self._stream.begin_output()

    @property
    def text(self) -> str:
        """Everything that was given out so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, token_id: int) -> str:
        """Take the next token; returns the new text that is certain by now, often a word, sometimes "".

        Raises ValueError after a stop string was found: nothing may follow it.
        """
        if self.stop_reason is not None:
            raise ValueError(f"the text ended at stop string {self.stop_reason!r}; push no further tokens")
        self._count += 1
        step = self._feed(token_id)
        self._held += step.certain
        found = self._search.advance(step)
        if found is not None and self._count > self._min_tokens:
            self.stop_reason, behind = found
            unsent = self._held + self._stream.tentative
            end = len(unsent) - behind - (0 if self._include else len(self.stop_reason))
            self._held = ""
            return self._give(unsent[:end])
        keep = self._search.beginning(self._held) if self._hold else 0
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._give(ready)

    def finish(self) -> str:
        """No token follows: returns the text that was held back, as `decode` gives it ("" after a stop)."""
        if self.stop_reason is not None:
            return ""
        rest, self._held = self._held + self._stream.finish(), ""
        return self._give(rest)

    def _context(self, prompt: Sequence[int], rules: Decoding) -> list[int]:
        """The end of the prompt that later text depends on: two tokens of text before any open run of bytes.

        (Byte-level vocabularies: five tokens, as a character has at most four bytes.)
        """
        context, anchors = [], 0
        for token_id in reversed(prompt):
            token = self._visible(token_id)
            if token is not None:
                context.append(token_id)
                anchors += rules.byte_level or isinstance(rules.piece(token), str)
            if anchors == (5 if rules.byte_level else 2):
                break
        return context[::-1]

    def _visible(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None where decoding leaves it out."""
        return None if token_id in self._skipped else self._token(token_id)

    def _feed(self, token_id: int) -> Step:
        token = self._visible(token_id)
        return Step() if token is None else self._stream.feed(token)

    def _give(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text


class Step(NamedTuple):
    """What a token did to the text.

    certain: text that no later token changes. visible: text that can be seen for the first time, certain or
    tentative. rewound: earlier tentative text is void; `visible` (all certain) takes its place.
    """

    certain: str = ""
    visible: str = ""
    rewound: bool = False


class Stream:
    """The decoder as a machine that takes one token at a time; `Decoding` has its rules."""

    def __init__(self, rules: Decoding) -> None:
        self._rules = rules
        self._first = True
        self._strip = rules.strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace" if rules.byte_level else "strict")
        self._run: list[str] = []
        self._run_bytes = 0
        self._run_broken = False

    @property
    def tentative(self) -> str:
        """The characters of the run of byte tokens that is still open."""
        return "".join(self._run)

    def feed(self, token: str) -> Step:
        piece = self._rules.piece(token, self._first)
        self._first = False
        if isinstance(piece, str):
            before, rewound = self._end_run()
            text = self._stripped(piece)
            return Step(before + text, before + text if rewound else text, rewound)
        if self._rules.byte_level:
            text = self._stripped(self._utf8.decode(piece))
            return Step(text, text)
        return self._feed_byte(piece)

    def begin_output(self) -> None:
        """What was fed so far is the prompt: its text is not given out, an incomplete character goes on."""
        self._run.clear()
        self._run_bytes = len(self._utf8.getstate()[0])

    def finish(self) -> str:
        """The rest: U+FFFD for what is incomplete."""
        if self._rules.byte_level:
            return self._stripped(self._utf8.decode(b"", final=True))
        return self._end_run()[0]

    def _feed_byte(self, byte: bytes) -> Step:
        self._run_bytes += 1
        if self._run_broken:
            return Step(REPLACEMENT, REPLACEMENT)
        try:
            text = self._stripped(self._utf8.decode(byte))
        except UnicodeDecodeError:
            self._run_broken = True
            return self._replaced()
        self._run.append(text)
        return Step("", text)

    def _end_run(self) -> tuple[str, bool]:
        """Close the open run of byte tokens: (its text that was not certain yet, whether it was rewound)."""
        incomplete = bool(self._utf8.getstate()[0])
        if self._run_broken:
            text, rewound = "", False
        elif incomplete:
            text, _, rewound = self._replaced()
        else:
            text, rewound = self.tentative, False
        self._utf8.reset()
        self._run.clear()
        self._run_bytes, self._run_broken = 0, False
        return text, rewound

    def _replaced(self) -> Step:
        """The open run is not UTF-8: all its bytes are U+FFFD."""
        self._strip = 0
        self._run.clear()
        self._utf8.reset()
        text = REPLACEMENT * self._run_bytes
        return Step(text, text, True)

    def _stripped(self, text: str) -> str:
        """Leave out leading `strip_content` characters of the whole text, at most `strip` of them."""
        while self._strip and text:
            if text[0] != self._rules.strip_content:
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


class StopSearch:
    """Finds stop strings in a text that comes in steps, looking at each new character once."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._reach = max((len(stop) for stop in stops), default=0)
        self._certain = ""  # the last characters of the certain text, and of the visible text
        self._visible = ""

    def advance(self, step: Step) -> tuple[str, int] | None:
        """The stop string that this step completed first and the number of characters behind it, or None."""
        if not self._stops:
            return None
        seen = self._certain if step.rewound else self._visible
        window = seen + step.visible
        found: tuple[int, str] | None = None
        for stop in self._stops:
            at = window.find(stop, max(0, len(seen) - len(stop) + 1))
            if at >= 0 and (found is None or at + len(stop) < found[0]):
                found = (at + len(stop), stop)
        self._visible = window[max(0, len(window) - self._reach + 1) :]
        certain = self._certain + step.certain
        self._certain = certain[max(0, len(certain) - self._reach + 1) :]
        return None if found is None else (found[1], len(window) - found[0])

    def beginning(self, text: str) -> int:
        """The length of the longest end of `text` that a stop string begins with."""
        for length in range(min(self._reach - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
