"""Detokenizer: joined pieces equal the whole decoding, and stop strings do not depend on token borders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenloom.serve.detokenizer import Detokenizer
from tokenloom.serve.tokenizer import Tokenizer

ROOT = Path(__file__).parent / "data" / "tokenizers"
STYLES = sorted(path.parent.name for path in ROOT.glob("*/recorded.json"))
LOADED = {style: Tokenizer.load(ROOT / style) for style in STYLES}
PROMPTS = ["The mill", "a", "", " x 🙂🙂🙂🙂🙂🙂", "two\n"]
LAW = settings(max_examples=50, deadline=None)


def tokens(style: str) -> st.SearchStrategy[list[int]]:
    """Random ids, dense in the tokens that matter: bytes of multi-byte characters, spaces, special tokens."""
    tokenizer = LOADED[style]
    tricky = [*tokenizer.encode("€ 🙂 é  a\n", add_special_tokens=False), *tokenizer.special_ids]
    tricky += [
        i for name in ("<0x20>", "<0xE2>", "<0x82>", "<0xFF>") if (i := tokenizer.token_id(name)) is not None
    ]
    one = st.integers(0, tokenizer.vocab_size + 1) | st.sampled_from(tricky)
    return st.lists(one, max_size=16)


def letters(text: str) -> list[int]:
    """One gpt2-style token for each character of an ASCII text."""
    ids = [LOADED["gpt2"].token_id({" ": "Ġ", "\n": "Ċ"}.get(character, character)) for character in text]
    assert None not in ids
    return [i for i in ids if i is not None]


@pytest.mark.parametrize("style", STYLES)
@LAW
@given(data=st.data(), skip=st.booleans())
def test_joined_pieces_equal_decode(style: str, data: st.DataObject, skip: bool):
    tokenizer, ids = LOADED[style], data.draw(tokens(style))
    detokenizer = Detokenizer(tokenizer, skip)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    for end in range(len(ids) + 1):  # what was given out stays true, whatever follows
        assert tokenizer.decode(ids, skip).startswith("".join(pieces[:end]))
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == tokenizer.decode(ids, skip) == detokenizer.text
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("style", STYLES)
@LAW
@given(data=st.data())
def test_text_after_a_prompt_continues_it(style: str, data: st.DataObject):
    tokenizer, ids = LOADED[style], data.draw(tokens(style))
    prompt = tokenizer.encode(data.draw(st.sampled_from(PROMPTS)), add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, prompt_token_ids=prompt)
    text = "".join([*map(detokenizer.push, ids), detokenizer.finish()])
    whole = tokenizer.decode(prompt + ids)
    broken = "\ufffd" in whole and not tokenizer.decoding.byte_level
    assert tokenizer.decode(prompt) + text == whole or broken


@pytest.mark.parametrize("style", STYLES)
@LAW
@given(data=st.data(), include=st.booleans(), minimum=st.integers(0, 4))
def test_stops_are_found_where_a_whole_search_finds_them(
    style: str, data: st.DataObject, include: bool, minimum: int
):
    """The reference decodes everything after each token and looks for the stop that is complete first."""
    tokenizer, ids = LOADED[style], data.draw(tokens(style))
    whole = tokenizer.decode(ids) or "x"
    parts = st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 4)).map(
        lambda at: whole[at[0] : sum(at)]
    )
    stops = data.draw(st.lists(parts.filter(lambda stop: "\ufffd" not in stop), max_size=3))
    detokenizer = Detokenizer(tokenizer, True, stops, include, minimum)
    pieces, seen = [], 0
    for count, token_id in enumerate(ids, 1):
        pieces.append(detokenizer.push(token_id))
        text = complete(tokenizer, ids[:count])
        found = first_stop(text, stops, seen) if count > minimum else None
        seen = len(text)
        assert detokenizer.stop_reason == (found[1] if found else None)
        if found:
            expected = text[: found[0]] if include else text[: found[0] - len(found[1])]
            assert "".join(pieces) == expected == detokenizer.text and detokenizer.finish() == ""
            return
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == tokenizer.decode(ids)


def complete(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The decoded text without a trailing incomplete character (which more bytes could change)."""
    text = tokenizer.decode(ids)
    return text.rstrip("\ufffd") if text.endswith("\ufffd") else text


def first_stop(text: str, stops: list[str], seen: int) -> tuple[int, str] | None:
    """(end, stop) of the stop that ends first behind `seen` characters; of several, the longest."""
    ends = [
        (end, -len(stop), stop)
        for stop in stops
        for end in range(seen + 1, len(text) + 1)
        if text[:end].endswith(stop)
    ]
    return (min(ends)[0], min(ends)[2]) if ends else None


@given(
    st.text(alphabet="ab", max_size=12), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)
)
@example("abab", ["bab", "ab"])
@settings(max_examples=100, deadline=None)
def test_text_does_not_depend_on_token_borders(text: str, stops: list[str]):
    """The same text in one token, and letter by letter."""
    backend = LOADED["gpt2"].backend
    whole = type(backend).from_str(backend.to_str())
    whole.add_tokens([text] if text else [])
    tokenizer = Tokenizer(whole)
    ids = [tokenizer.token_id(text)] if text else []
    results = []
    for cut in ([i for i in ids if i is not None], letters(text)):
        detokenizer = Detokenizer(tokenizer, stop=stops)
        for token_id in cut:
            detokenizer.push(token_id)
            if detokenizer.stop_reason:
                break
        detokenizer.finish()
        results.append((detokenizer.text, detokenizer.stop_reason))
    assert results[0] == results[1]


def test_partial_characters_wait_and_are_replaced_at_the_end():
    ids = LOADED["gpt2"].encode("🙂")
    assert len(ids) == 4
    detokenizer = Detokenizer(LOADED["gpt2"])
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "🙂"]
    assert [detokenizer.push(token_id) for token_id in ids[:2]] == ["", ""]
    assert detokenizer.finish() == "\ufffd"


def test_possible_stop_waits_until_it_is_none():
    detokenizer = Detokenizer(LOADED["gpt2"], stop="\n\nEnd")
    assert [detokenizer.push(i) for i in letters("a\n\nEx")] == ["a", "", "", "", "\n\nEx"]
    assert [detokenizer.push(i) for i in letters("\n\n\nEnd")] == ["", "", "\n", "", "", ""]
    assert (detokenizer.stop_reason, detokenizer.text) == ("\n\nEnd", "a\n\nEx\n")
    with pytest.raises(ValueError, match="ended at stop string"):
        detokenizer.push(0)


def test_stop_in_an_open_run_of_byte_tokens_is_found_at_once():
    tokenizer = LOADED["llama2"]
    newline = tokenizer.token_id("<0x0A>")
    assert newline is not None
    detokenizer = Detokenizer(tokenizer, stop=["\n\n"])
    assert [detokenizer.push(newline), detokenizer.stop_reason] == ["", None]
    assert [detokenizer.push(newline), detokenizer.stop_reason] == ["", "\n\n"]


def test_a_spoilt_run_of_byte_tokens_takes_its_characters_back():
    tokenizer = LOADED["llama2"]
    r, a, bad = (tokenizer.token_id(token) for token in ("r", "<0x41>", "<0xFF>"))
    assert r is not None and a is not None and bad is not None
    for stop, found in (("rA\ufffd", None), ("r\ufffd\ufffd", "r\ufffd\ufffd")):
        detokenizer = Detokenizer(tokenizer, stop=stop)
        for token_id in (r, a, bad):
            detokenizer.push(token_id)
        assert detokenizer.stop_reason == found
        detokenizer.finish()
        assert detokenizer.text == ("" if found else "r\ufffd\ufffd")


def test_included_stop_and_earlier_minimum():
    ids = letters("a.b.c")
    detokenizer = Detokenizer(LOADED["gpt2"], stop=["."], include_stop_str_in_output=True, min_tokens=2)
    assert [detokenizer.push(i) for i in ids[:4]] == ["a", ".", "b", "."]
    assert (detokenizer.stop_reason, detokenizer.text) == (".", "a.b.")


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="empty string"):
        Detokenizer(LOADED["gpt2"], stop=["x", ""])
