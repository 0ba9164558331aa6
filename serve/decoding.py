"""How token ids become text: a decoder's rules, token by token, for texts that grow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import pre_tokenizers


@dataclass(frozen=True)
class Decoding:
    """A decoder's rules, token by token.

    byte_level: tokens spell bytes in GPT-2's alphabet, and the text is their concatenation, decoded as UTF-8.
    Otherwise a token is text after `replace`, or with `byte_fallback` and the form <0xE2> one byte. Of the
    whole text's beginning, up to `strip` leading `strip_content` go; the first token loses `drop_in_first`.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    drop_in_first: str = ""
    strip_content: str = " "
    strip: int = 0
    alphabet: Mapping[str, int] = field(default_factory=dict)

    def piece(self, token: str, first: bool = False) -> str | bytes:
        """A token's part of the text: str, or bytes where only its neighbours decide whether it is UTF-8."""
        if first and self.drop_in_first:
            token = token.replace(self.drop_in_first, "")
        for old, new in self.replace:
            token = token.replace(old, new)
        if self.byte_level:
            known = all(character in self.alphabet for character in token)
            return bytes(self.alphabet[character] for character in token) if known else token.encode()
        if self.byte_fallback and (match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes.fromhex(match[1])
        return token


def read_decoder(decoder: dict[str, Any] | None) -> Decoding:
    """Translate a decoder's serialisation; ValueError names the part that has no token-by-token meaning."""
    rules: dict[str, Any] = {}
    fused = False
    for part in (
        decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder or {"type": None}]
    ):
        match part:
            case {"type": "ByteLevel"} if not rules.get("byte_fallback") and not fused:
                rules |= {"byte_level": True, "alphabet": _byte_alphabet()}
                fused = True
            case {"type": "ByteFallback"} if not fused:
                rules["byte_fallback"] = True
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused:
                if rules.get("byte_fallback"):
                    raise _cannot_follow(part)
                rules["replace"] = (*rules.get("replace", ()), (old, new))
            case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme} if not rules:
                rules |= {"replace": ((mark, " "),), "drop_in_first": "" if scheme == "never" else mark}
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": content, "start": start, "stop": 0} if (
                fused and "strip" not in rules
            ):
                rules |= {"strip_content": content, "strip": start}
            case _:
                raise _cannot_follow(part)
    return Decoding(**rules)


def _cannot_follow(part: dict[str, Any]) -> ValueError:
    return ValueError(
        f"the decoder step {part} cannot be followed token by token; supported are ByteLevel, Metaspace, and "
        "sequences of Replace (a string), ByteFallback, Fuse and Strip (left): decode whole sequences instead"
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: visible Latin-1 bytes are themselves, the others come from U+0100 on."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = sorted(set(range(256)) - set(visible.values()))
    return visible | dict(zip(letters[len(visible) :], others, strict=True))
