"""Tokenizer: equal to transformers' AutoTokenizer for the same files (recorded, and live where installed)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenloom.serve.tokenizer import Tokenizer

ROOT = Path(__file__).parent / "data" / "tokenizers"
STYLES = sorted(path.parent.name for path in ROOT.glob("*/recorded.json"))
LOADED = {style: Tokenizer.load(ROOT / style) for style in STYLES}


def recorded(style: str) -> dict[str, Any]:
    return json.loads((ROOT / style / "recorded.json").read_text(encoding="utf-8"))


def test_every_style_is_there():
    assert set(STYLES) == {
        *("gemma", "gpt2", "llama2", "llama3", "mistral", "neox", "opt", "phi3", "qwen", "unigram")
    }


@pytest.mark.parametrize("style", STYLES)
def test_encodes_as_transformers_did(style: str):
    for text, with_special, without in recorded(style)["encode"]:
        assert LOADED[style].encode(text) == with_special, text
        assert LOADED[style].encode(text, add_special_tokens=False) == without, text


@pytest.mark.parametrize("style", STYLES)
def test_decodes_as_transformers_did(style: str):
    for ids, skipped, kept in recorded(style)["decode"]:
        assert LOADED[style].decode(ids) == skipped, ids
        assert LOADED[style].decode(ids, skip_special_tokens=False) == kept, ids


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_are_those_of_transformers(style: str):
    tokenizer, known = LOADED[style], recorded(style)
    assert dict(tokenizer.special_tokens) == known["special_tokens"]
    assert tokenizer.vocab_size == known["size"]
    ids = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    assert {**ids, "pad_token": tokenizer.pad_token_id} == known["ids"]


def test_generation_config_adds_end_tokens():
    def ids(style: str, *tokens: str) -> tuple[int | None, ...]:
        return tuple(LOADED[style].token_id(token) for token in tokens)

    assert LOADED["llama3"].eos_token_ids == ids("llama3", "<|eot_id|>", "<|end_of_text|>")
    assert LOADED["qwen"].eos_token_ids == ids("qwen", "<|im_end|>", "<|endoftext|>")
    assert LOADED["phi3"].eos_token_ids == ids("phi3", "<|endoftext|>", "<|end|>")
    assert LOADED["llama2"].eos_token_ids == ids("llama2", "</s>")


def test_which_styles_begin_with_bos():
    assert {style for style in STYLES if LOADED[style].adds_bos} == {
        "llama2", "llama3", "mistral", "phi3", "gemma", "opt"
    }  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_token_bytes_spell_the_text(style: str, data: st.DataObject):
    """The bytes of a text's tokens, joined, are the decoded text (up to the space that some styles add)."""
    tokenizer = LOADED[style]
    text = data.draw(st.text(alphabet="ab é\n河🙂.'", min_size=1, max_size=12))
    ids = tokenizer.encode(text, add_special_tokens=False)
    spelled = b"".join(map(tokenizer.token_bytes, ids)).decode()
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    assert spelled == decoded or (spelled == f" {decoded}" and style not in ("gpt2", "llama3", "gemma"))


def test_token_text_and_bytes():
    tokenizer = LOADED["llama2"]
    first = tokenizer.token_id("<0xE2>")
    assert first is not None
    assert tokenizer.token_bytes(first) == b"\xe2" and tokenizer.token_text(first) == "\ufffd"
    assert tokenizer.token_text(tokenizer.encode("x the", add_special_tokens=False)[-1]) == " the"
    assert tokenizer.token_text(tokenizer.vocab_size + 9) == "", (
        "weights may know more ids than the tokenizer"
    )
    assert LOADED["gpt2"].token_bytes(LOADED["gpt2"].encode("\n")[0]) == b"\n"
    with pytest.raises(ValueError, match=r"999999 .* 420 tokens"):
        tokenizer.token_bytes(999999)
    with pytest.raises(ValueError, match="-1"):
        tokenizer.token_bytes(-1)


def test_special_ids_are_what_decoding_skips():
    for tokenizer in LOADED.values():
        skipped = {i for i in range(tokenizer.vocab_size) if _skipped(tokenizer, i)}
        assert tokenizer.special_ids == skipped
        assert set(tokenizer.eos_token_ids) <= skipped


def _skipped(tokenizer: Tokenizer, token_id: int) -> bool:
    letter = tokenizer.encode("a", add_special_tokens=False)[-1]
    texts = [tokenizer.decode([letter, token_id, letter], skip_special_tokens=skip) for skip in (True, False)]
    return texts[0] != texts[1]


def test_refuses_what_it_cannot_read(tmp_path: Path):
    with pytest.raises(ValueError, match="not a folder"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor vocab\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(ValueError, match=r"tokenizer\.model .*save_pretrained"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(ValueError, match=r"CLIPTokenizer.*GPT2Tokenizer.*save_pretrained"):
        Tokenizer.load(tmp_path)


def test_unknown_decoders_still_decode_whole_sequences():
    state = json.loads(LOADED["gpt2"].backend.to_str())
    state["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    tokenizer = Tokenizer(type(LOADED["gpt2"].backend).from_str(json.dumps(state)))
    assert tokenizer.decode(tokenizer.encode("ab")) != ""
    with pytest.raises(ValueError, match=r"WordPiece.*token by token"):
        tokenizer.token_bytes(5)


def test_chat_templates_come_from_every_place():
    assert set(LOADED["llama3"].chat_templates) == {"default"}  # a string in tokenizer_config.json
    assert set(LOADED["llama2"].chat_templates) == {"default", "tool_use"}  # a list of named templates
    assert set(LOADED["qwen"].chat_templates) == {"default", "rag"}  # files
    assert LOADED["gpt2"].chat_templates == {}


@pytest.mark.parity
@pytest.mark.parametrize("style", STYLES)
def test_equals_transformers_live(style: str):
    transformers = pytest.importorskip("transformers")
    ours, oracle = LOADED[style], transformers.AutoTokenizer.from_pretrained(ROOT / style)
    specials = sorted(oracle.get_added_vocab())
    pieces = st.sampled_from(
        [" ", "  ", "\n", "the", " river", "1234", "'ll", "é", "🙂", "河", "▁", *specials]
    )

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(pieces | st.text(max_size=4), max_size=8),
        st.lists(st.integers(0, len(oracle) - 1), max_size=9),
    )
    def same(parts: list[str], ids: list[int]) -> None:
        text = "".join(parts).encode("utf-8", "ignore").decode()
        for add in (True, False):
            assert ours.encode(text, add) == oracle.encode(text, add_special_tokens=add)
            assert ours.decode(ids, add) == oracle.decode(ids, skip_special_tokens=add)

    same()


TOKEN = {"lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
SETTINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # style, changes to tokenizer_config.json (None: remove), further files
    ("llama3", {"tokenizer_class": None}, {}),
    ("llama3", {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, {}),
    ("llama3", {"added_tokens_decoder": {}, "eos_token": "<|new|>"}, {}),
    ("llama3", {"added_tokens_decoder": None}, {"special_tokens_map": {"eos_token": "<|end_of_text|>"}}),
    ("llama3", {"added_tokens_decoder": {"1": {"content": "river", "special": True, **TOKEN}}}, {}),
    ("llama3", {"additional_special_tokens": [" the", "<|x|>"]}, {}),
    ("llama3", {"extra_special_tokens": {"image_token": "<|image|>"}}, {}),
    ("llama2", {"legacy": True}, {}),
    ("llama2", {"add_prefix_space": False}, {}),
    ("llama2", {"pad_token": "<pad>"}, {"added_tokens": {"<pad>": 420, "<|im_start|>": 421}}),
    ("llama2", {"tokenizer_class": None, "eos_token": None}, {}),
    ("gpt2", {"add_prefix_space": True, "add_bos_token": True, "add_eos_token": True}, {}),
    ("gpt2", {"tokenizer_class": None}, {"added_tokens": {"river": 331, " the": 332}}),
    ("opt", {"add_bos_token": False}, {"special_tokens_map": {"pad_token": {"content": "<|p|>", **TOKEN}}}),
    ("qwen", {"tokenizer_class": None}, {}),
    ("neox", {"add_bos_token": True}, {}),
    ("gemma", {"added_tokens_decoder": None, "bos_token": None}, {}),
]


@pytest.mark.parity
@pytest.mark.parametrize(("style", "changes", "files"), SETTINGS)
def test_settings_equal_transformers_live(
    style: str, changes: dict[str, Any], files: dict[str, Any], tmp_path: Path
):
    transformers = pytest.importorskip("transformers")
    folder = Path(shutil.copytree(ROOT / style, tmp_path / style))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8")) | changes
    files = {**files, "tokenizer_config": {k: v for k, v in config.items() if v is not None}}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")
    ours, oracle = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert dict(ours.special_tokens) == oracle.special_tokens_map
    assert ours.vocab_size == len(oracle)
    for text, *_ in [*recorded(style)["encode"], ["a the  river<|x|>river <|image|><pad>  x<|p|>"]]:
        for add in (True, False):
            ids = oracle.encode(text, add_special_tokens=add)
            assert ours.encode(text, add) == ids, text
            assert ours.decode(ids, add) == oracle.decode(ids, skip_special_tokens=add), text
