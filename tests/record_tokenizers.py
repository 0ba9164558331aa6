"""Builds the small tokenizers of tests/data/tokenizers and records what transformers does with them.

Run it by hand (needs transformers) after changing a style, a template or a case:

    python tests/record_tokenizers.py

Every folder is a complete Hugging Face tokenizer folder in the style of a public family, with a tiny
vocabulary trained on the text below. `recorded.json` beside its files holds transformers' encodings,
decodings and chats. The templates (tests/data/tokenizers/templates) are written for these tests. Training
breaks ties at random, so some vocabularies differ from run to run.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ROOT = Path(__file__).parent / "data" / "tokenizers"
TEMPLATES = ROOT / "templates"

CORPUS = [
    "The river runs past the old mill, and the miller's daughter counts the boats that pass on the river.",
    "In 1987 there were 42 boats; in 2024 there are 1,365 of them. That's the whole story, isn't it?",
    "def count(boats):\n    total = 0\n    for boat in boats:\n        total += boat.size\n"
    "    return total\n",
    "Ça va très bien, merci; où est la bibliothèque? Der Fluß fließt über die Brücke.",
    "河水流过旧磨坊。今天天气很好。東京の川はきれいです。",
    "The user asks, the assistant answers, and the system listens. Hello world! Hello there, hello again.",
    "  Indented text\n\n\twith tabs\tand  double spaces,   triple spaces and the end.\n\n\n",
] * 3

TEXTS = [
    *(
        "",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        " \n ",
        "a",
        "Hello world!",
        " Hello",
        "  Hello",
        "Hello ",
        "Hello  there",
    ),
    *("The river's boats, isn't it? We'LL see.", "1234567 and 3.14", "x=1;y[2]==foo(bar)", "a\r\nb\n\n\nc"),
    *(
        "naïve café",
        "cafe\u0301",
        "河水流过",
        "東京の川 and 日本",
        "🙂",
        "👩‍👩‍👧‍👦 family 🏳️‍🌈",
        "€ ₿ \u200b\u00a0x",
        "\ufffd",
        "ﬁ ﷺ",
    ),
    *("a▁b ▁c", "Ġthe", "<0x0A>", "\x00\x01", "  indented\n    more", "word " * 8, "été" * 3),
]

DIGITS_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS_1 = DIGITS_3.replace("{1,3}", "")

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather in a city, <hot> & cold.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city, e.g. Zürich"}},
            "required": ["city"],
        },
    },
}
SYSTEM = {"role": "system", "content": " Be brief. "}
USER = {"role": "user", "content": "Hi, who are you?"}
ASSISTANT = {"role": "assistant", "content": "A river boat,\nnothing more. "}
AGAIN = {"role": "user", "content": "  And the weather in Zürich? 🙂\n"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "name": "weather", "content": "rain"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "One, "}, {"type": "text", "text": "two."}]}
THINKING = {"role": "assistant", "reasoning_content": "Rain means wet.", "content": "Wet."}

CHATS: list[dict[str, Any]] = [
    {"messages": [USER]},
    {"messages": [USER], "add_generation_prompt": True},
    {"messages": [SYSTEM, USER], "add_generation_prompt": True},
    {"messages": [USER, ASSISTANT, AGAIN], "add_generation_prompt": True},
    {"messages": [SYSTEM, USER, ASSISTANT, AGAIN, ASSISTANT]},
    {"messages": [USER, ASSISTANT], "continue_final_message": True},
    {"messages": [SYSTEM, USER, ASSISTANT, AGAIN, THINKING], "continue_final_message": True},
    {"messages": [SYSTEM, USER], "tools": [WEATHER], "add_generation_prompt": True},
    {"messages": [AGAIN, CALLING, ANSWER], "tools": [WEATHER], "add_generation_prompt": True},
    {"messages": [AGAIN, CALLING, ANSWER, ANSWER, THINKING], "tools": [WEATHER, WEATHER]},
    {"messages": [PARTS], "add_generation_prompt": True},
    {"messages": [USER, USER]},
    {"messages": [ASSISTANT]},
    {"messages": [USER], "add_generation_prompt": True, "enable_thinking": False},
    {
        "messages": [USER],
        "documents": [{"title": "Rivers", "text": "They run."}],
        "add_generation_prompt": True,
    },
    {"messages": []},
    {"messages": [USER, ASSISTANT], "continue_final_message": True, "add_generation_prompt": True},
]


def byte_level(regex: str | None, normalizer: Any = None, size: int = 330) -> Tokenizer:
    """A byte-level BPE (GPT-2, Llama 3, Qwen, NeoX), trained; `regex` None: GPT-2's own."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    split = [pre_tokenizers.Split(Regex(regex), behavior="isolated")] if regex else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, whole]) if regex else whole
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback(specials: list[str], size: int = 420) -> Tokenizer:
    """A character BPE with byte tokens behind the special ones, SentencePiece's way; no pipeline yet."""
    base = specials + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=base, limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    state["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(state))


def llama_pipeline(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(fallback)
    return begin_with(tokenizer, "<s>")


def begin_with(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def flags(token: str, **more: bool) -> dict[str, Any]:
    return {
        **{"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
        **more,
    }


def listed(tokenizer: Tokenizer) -> dict[str, Any]:
    """`added_tokens_decoder` as tokenizer_config.json has it."""
    return {
        str(index): flags(
            token.content, lstrip=token.lstrip, normalized=token.normalized, rstrip=token.rstrip,
            single_word=token.single_word, special=token.special,
        )
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }  # fmt: skip


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def write(
    name: str, tokenizer: Tokenizer | None, config: dict[str, Any], family: str | None = None, **files: Any
) -> Path:
    """Write a folder; `files` are further JSON files by stem."""
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if tokenizer is not None:
        compact = json.loads(tokenizer.to_str())
        (folder / "tokenizer.json").write_text(json.dumps(compact, ensure_ascii=False), encoding="utf-8")
    files["tokenizer_config"] = config
    if family is not None:
        files["config"] = {"model_type": family}
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(
            json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8"
        )
    return folder


def build_byte_level() -> None:
    tokenizer = byte_level(DIGITS_3)
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "python_tag"]
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), begin_with(tokenizer, "<|begin_of_text|>").post_processor]
    )
    ids = [tokenizer.token_to_id(f"<|{name}|>") for name in ("end_of_text", "eot_id")]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
        "added_tokens_decoder": listed(tokenizer),
        "chat_template": template("llama3"),
    }
    write("llama3", tokenizer, config, "llama", generation_config={"eos_token_id": ids})

    tokenizer = byte_level(DIGITS_1, normalizers.NFC())
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(
        [AddedToken(tag, normalized=False) for tag in ("<think>", "</think>", "<tool_call>")]
    )
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "added_tokens_decoder": listed(tokenizer),
    }
    eos = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    folder = write("qwen", tokenizer, config, "qwen2", generation_config={"eos_token_id": eos})
    (folder / "chat_template.jinja").write_text(template("chatml"), encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(template("documents"), encoding="utf-8")

    tokenizer = byte_level(None, normalizers.NFC())
    tokenizer.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    tokenizer.add_tokens([AddedToken(" " * width, normalized=True) for width in (4, 3, 2)])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    config = {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False}
    names = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}
    write("neox", tokenizer, {**config, **names}, "gpt_neox", special_tokens_map=names)


def build_two_files() -> None:
    config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}
    trained = byte_level(None)
    trained.add_tokens(["<|endoftext|>"])
    folder = write("gpt2", None, config, "gpt2", generation_config={"eos_token_id": 330})
    trained.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocabulary["<|endoftext|>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")

    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    shifted = {mark: index for index, mark in enumerate(marks)}
    shifted |= {token: index + len(marks) for token, index in vocabulary.items() if token != "<|endoftext|>"}
    names = {
        "bos_token": flags("</s>", normalized=True),
        "eos_token": flags("</s>", normalized=True),
        "unk_token": flags("</s>", normalized=True),
        "pad_token": flags("<pad>", normalized=True),
    }
    config |= {"add_bos_token": True, "errors": "replace", "add_prefix_space": False}
    config |= {name: {"__type": "AddedToken", **token} for name, token in names.items()}
    folder = write(
        "opt", None, config, "opt",
        special_tokens_map=names, added_tokens={"<|mask|>": len(shifted)},
    )  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps(shifted, ensure_ascii=False), encoding="utf-8")
    shutil.copy(ROOT / "gpt2" / "merges.txt", folder / "merges.txt")


def build_byte_fallback() -> None:
    base = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = llama_pipeline(byte_fallback(["<unk>", "<s>", "</s>"]))
    templates = [
        {"name": "default", "template": template("zephyr")},
        {"name": "tool_use", "template": template("chatml")},
    ]
    llama = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    llama |= {name: {"__type": "AddedToken", **flags(token)} for name, token in base.items()}
    llama |= {"pad_token": None, "chat_template": templates, "clean_up_tokenization_spaces": False}
    write("llama2", tokenizer, llama, "llama", special_tokens_map={k: flags(v) for k, v in base.items()})

    mistral = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        **base,
        "added_tokens_decoder": listed(tokenizer),
    }
    write("mistral", tokenizer, {**mistral, "chat_template": template("mistral")}, "mistral")

    tokenizer = llama_pipeline(byte_fallback(["<unk>", "<s>", "</s>"]))
    names = ("endoftext", "assistant", "system", "end", "user")
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in names])
    phi3 = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **base, "eos_token": "<|endoftext|>"}
    phi3 |= {"pad_token": "<|endoftext|>", "added_tokens_decoder": listed(tokenizer)}
    eos = [tokenizer.token_to_id(f"<|{name}|>") for name in ("endoftext", "end")]
    write(
        "phi3", tokenizer, {**phi3, "chat_template": template("phi3")}, "phi3",
        generation_config={"eos_token_id": eos},
    )  # fmt: skip

    tokenizer = byte_fallback(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "▁▁", "<b>")])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    gemma = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    gemma |= {"tokenizer_class": "GemmaTokenizer", "added_tokens_decoder": listed(tokenizer)}
    write("gemma", begin_with(tokenizer, "<bos>"), {**gemma, "chat_template": template("gemma")}, "gemma2")


def build_unigram() -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    base = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write("unigram", tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **base})


def record(folder: Path) -> None:
    """Write recorded.json: what transformers' AutoTokenizer does with this folder."""
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(folder)
    specials = sorted(oracle.get_added_vocab())
    texts = [*TEXTS, *(f"Hi{token} the  {token}{token}\nend" for token in specials[:8]), "".join(specials)]
    draw = random.Random(folder.name)
    drawn = [[draw.randrange(len(oracle)) for _ in range(draw.randrange(1, 12))] for _ in range(40)]
    encode = [[text, oracle.encode(text), oracle.encode(text, add_special_tokens=False)] for text in texts]
    decode = [
        [ids, oracle.decode(ids, skip_special_tokens=True), oracle.decode(ids, skip_special_tokens=False)]
        for ids in [*(ids for _, ids, _ in encode), *drawn]
    ]
    found = {
        "class": type(oracle).__name__,
        "size": len(oracle),
        "special_tokens": oracle.special_tokens_map,
        "ids": {name: getattr(oracle, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")},
        "chats": chats(oracle),
        "encode": encode,
        "decode": decode,
    }
    lines = ",\n".join(f"{json.dumps(key)}: {dump(value)}" for key, value in found.items())
    (folder / "recorded.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def dump(value: Any) -> str:
    """JSON with one line an item: differences stay readable."""
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n]"


def chats(oracle: Any) -> list[dict[str, Any]]:
    """Every case under every template: its text, or the words in which the template refuses ("": fails)."""
    if oracle.chat_template is None:
        return []
    names = [None] if isinstance(oracle.chat_template, str) else [None, *sorted(oracle.chat_template)]
    found = []
    for name in names:
        for case in CHATS:
            arguments = {"date_string": "3 Mar 2025", **case}
            others = {key: value for key, value in arguments.items() if key != "messages"}
            try:
                text = oracle.apply_chat_template(
                    case["messages"], chat_template=name, tokenize=False, **others
                )
                result = {"text": text}
            except (ValueError, TypeError, jinja2.TemplateError) as error:
                by_template = type(error) is jinja2.TemplateError  # `raise_exception` raises just this class
                result = {"refused": str(error) if by_template else ""}
            found.append({"template": name, "arguments": arguments, **result})
    return found


def main() -> None:
    build_byte_level()
    build_two_files()
    build_byte_fallback()
    build_unigram()
    for folder in sorted(path for path in ROOT.iterdir() if (path / "tokenizer_config.json").is_file()):
        record(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder.name}: {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
