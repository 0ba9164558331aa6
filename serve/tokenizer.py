"""Text to token ids and back, from the files of a Hugging Face checkpoint folder.

The `tokenizers` library does the work; this file reads the settings around it (`tokenizer_config.json`,
`special_tokens_map.json`, `added_tokens.json`, `generation_config.json`, chat templates) as transformers 5
does, so that ids and texts equal its AutoTokenizer's for the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from .decoding import Decoding, read_decoder

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Families whose AutoTokenizer is the plain backend, whatever class their tokenizer_config.json names.
PLAIN_FAMILIES = (
    *(
        "mistral",
        "mistral3",
        "ministral",
        "ministral3",
        "mixtral",
        "phi3",
        "phimoe",
        "internlm2",
        "internlm3",
    ),
    *("jamba", "nemotron", "granite", "granitemoe", "olmo2", "olmo3", "glm", "glm4", "stablelm", "minicpm3"),
)
CLASS_OF_FAMILY: Mapping[str, str] = {
    "gpt2": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer",
    "phi": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "mamba": "GPTNeoXTokenizer",
    "mamba2": "GPTNeoXTokenizer",
    "olmo": "GPTNeoXTokenizer",
    "olmoe": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "qwen3_next": "Qwen2Tokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
}
# Special tokens that these classes have unless the folder says otherwise.
END_OF_TEXT = "<|endoftext|>"
CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT},
    "GPTNeoXTokenizer": {
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": "<|padding|>",
    },
    "Qwen2Tokenizer": {"eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
}


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers` pipeline with its special tokens and chat templates; see `Tokenizer.load`.

    special_tokens: the named ones ("bos_token": "<s>", ...), as chat templates see them. eos_token_ids: every
    id that ends a text: the tokenizer's own first, then those of generation_config.json. chat_templates: name
    to Jinja source; a single template is called "default".
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a checkpoint folder. Raises ValueError with the remedy where it holds no usable tokenizer."""
        folder = Path(folder)
        config, model_config = _read(folder / "tokenizer_config.json"), _read(folder / "config.json")
        backend, kind = _load_backend(folder, config, model_config)
        settings = _settings(folder, config)
        named = _named_tokens(settings, kind)
        _add_tokens(backend, folder, settings, named)
        special = {name: token.content for name, token in named.items()}
        if not (folder / "tokenizer.json").is_file():
            bos = special.get("bos_token", "") if settings.get("add_bos_token") else ""
            eos = special.get("eos_token", "") if settings.get("add_eos_token") else ""
            backend.post_processor = _template(backend, bos, eos)
        backend.no_truncation()
        backend.no_padding()
        generation = _read(folder / "generation_config.json") or model_config
        eos_ids = _eos_ids(backend, special.get("eos_token"), generation)
        return cls(backend, special, eos_ids, _chat_templates(folder, config))

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether every token has the same id in both."""
        return self.backend.get_vocab(True) == other.backend.get_vocab(True)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end-of-sequence token; `eos_token_ids` has all of them."""
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._named_id("pad_token")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether `encode(text)` begins with the BOS token of its own accord."""
        return self.bos_token_id is not None and self.encode("")[:1] == [self.bos_token_id]

    @cached_property
    def decoding(self) -> Decoding:
        """The decoder's rules. Raises ValueError for a decoder that cannot be followed token by token."""
        decoder = self.backend.decoder
        return read_decoder(None if decoder is None else json.loads(decoder.__getstate__()))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in the text become their ids."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise ValueError(
                f"{text[:40]!r} cannot be tokenized: it is no text, or holds half a surrogate pair; send valid "
                "Unicode"
            ) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it ("<|im_end|>", "Ġthe"), or None."""
        return self.backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token adds in the middle of a text. Raises ValueError for an unknown id."""
        token = self.backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise ValueError(f"token id {token_id} is not in the vocabulary of {self.vocab_size} tokens")
        piece = self.decoding.piece(token)
        return piece.encode() if isinstance(piece, str) else piece

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, U+FFFD for what is not UTF-8: how log-probabilities show a token. Empty for an id
        that only the weights know: vocabularies are padded there to round sizes."""
        if self.backend.id_to_token(token_id) is None:
            return ""
        return self.token_bytes(token_id).decode(errors="replace")

    def __repr__(self) -> str:
        shown = {
            **self.special_tokens,
            "eos_token_ids": self.eos_token_ids,
            "chat": list(self.chat_templates),
        }
        return f"Tokenizer({self.vocab_size} tokens, {', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _tokenizer_class(declared: str | None, family: str | None, pipeline: str) -> str:
    """The transformers 5 class that loads these files: it decides pre-tokenisation and default tokens."""
    registered = CLASS_OF_FAMILY.get(family or "")
    kind = (declared or registered or "").removesuffix("Fast")
    if family in PLAIN_FAMILIES:
        return ""
    if family == "qwen2":
        return "Qwen2Tokenizer"
    return "" if kind == "LlamaTokenizer" and '"ByteLevel"' in pipeline else kind


def _load_backend(
    folder: Path, config: dict[str, Any], model_config: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, str]:
    """The `tokenizers` pipeline of a folder, and the name of the transformers class that would hold it."""
    declared = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    family = model_config.get("model_type")
    if (folder / "tokenizer.json").is_file():
        pipeline = (folder / "tokenizer.json").read_text(encoding="utf-8")
        kind = _tokenizer_class(declared, family, pipeline)
        backend = tokenizers.Tokenizer.from_str(pipeline)
        if kind == "LlamaTokenizer":
            _as_llama(backend, config)
        elif kind == "GPTNeoXTokenizer":
            backend.post_processor = _template(backend, "", "")
        return backend, kind
    if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise _no_tokenizer(folder)
    kind = _tokenizer_class(declared, family, "") or "GPT2Tokenizer"
    if kind not in ("GPT2Tokenizer", "CodeGenTokenizer"):
        raise ValueError(
            f"{folder} has vocab.json and merges.txt of a {kind}, but only GPT2Tokenizer can be built from "
            f"these two files; write its tokenizer.json: {_CONVERT}"
        )
    prefix_space = config.get("add_prefix_space", False)
    backend = tokenizers.Tokenizer(
        models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend, "GPT2Tokenizer"


_CONVERT = "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"


def _no_tokenizer(folder: Path) -> ValueError:
    if not folder.is_dir():
        return ValueError(f"{folder} is not a folder; give the folder that holds tokenizer.json")
    found = sorted(
        p.name for p in folder.iterdir() if p.name in ("tokenizer.model", "tekken.json", "tiktoken.model")
    )
    if found:
        return ValueError(
            f"{folder} has {' and '.join(found)} but no tokenizer.json, and SentencePiece and tiktoken "
            f"models are not read here; convert once, with transformers and sentencepiece: {_CONVERT}"
        )
    return ValueError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt; copy them there")


def _as_llama(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """LlamaTokenizer of transformers 5 keeps vocabulary and post-processor and has a pipeline of its own.

    It differs from the usual tokenizer.json in texts with leading spaces or special tokens inside.
    """
    prefix = config.get("add_prefix_space")
    scheme = "never" if prefix is False else "always" if config.get("legacy", False) else "first"
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = None  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(steps if scheme == "never" else [*steps, decoders.Strip(" ", 1, 0)])


def _settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, and special_tokens_map.json over it where there is no `added_tokens_decoder`."""
    legacy = {} if "added_tokens_decoder" in config else _read(folder / "special_tokens_map.json")
    settings = {**config, **legacy}
    if not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.get("additional_special_tokens") or []
    return settings


def _token(value: str | dict[str, Any], special: bool = True) -> AddedToken:
    """A token as the files write it: its text, or a dict with its flags."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = {name: flag for name, flag in value.items() if name not in ("__type", "id", "content")}
    return AddedToken(value["content"], **{"special": special, **flags})


def _named_tokens(settings: dict[str, Any], kind: str) -> dict[str, AddedToken]:
    """Every `..._token` setting, the class's own first, and named extra tokens."""
    extra = settings["extra_special_tokens"]
    named = {**CLASS_TOKENS.get(kind, {}), **settings, **(extra if isinstance(extra, dict) else {})}
    return {
        name: _token(value)
        for name, value in named.items()
        if value and isinstance(value, (str, dict)) and (name.endswith("_token") or (extra and name in extra))
    }


def _add_tokens(
    backend: tokenizers.Tokenizer, folder: Path, settings: dict[str, Any], named: dict[str, AddedToken]
) -> None:
    """Add what the settings list and the pipeline lacks, in the order of their ids, then the named tokens."""
    extra = settings["extra_special_tokens"]
    extras = [_token(value) for value in extra] if isinstance(extra, list) else []
    special = {token.content for token in [*named.values(), *extras]}
    if "added_tokens_decoder" in settings:
        listed = sorted(settings["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
        tokens = [_token(value, special=value["content"] in special) for _, value in listed]
    else:
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        legacy = sorted(_read(folder / "added_tokens.json").items(), key=lambda item: item[1])
        tokens = [_token(text, special=text in special) for text, _ in legacy if text not in known]
    backend.add_tokens(tokens)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in [*named.values(), *extras] if token.content not in known])


def _template(backend: tokenizers.Tokenizer, bos: str, eos: str) -> processors.TemplateProcessing:
    """`bos` before and `eos` after every text; "" for neither."""
    single = " ".join(part for part in (bos, "$A", eos) if part)
    ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    return processors.TemplateProcessing(single=single, pair="$A $B:1", special_tokens=ids)


def _eos_ids(backend: tokenizers.Tokenizer, eos: str | None, generation: dict[str, Any]) -> tuple[int, ...]:
    own = backend.token_to_id(eos) if eos else None
    listed = generation.get("eos_token_id")
    others = listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys(token_id for token_id in [own, *others] if token_id is not None))


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template files, and only without any the entry of tokenizer_config.json; name to Jinja source."""
    main, more = folder / "chat_template.jinja", folder / "additional_chat_templates"
    files = {"default": main} if main.is_file() else {}
    files |= {path.stem: path for path in sorted(more.glob("*.jinja"))}
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    entry = config.get("chat_template")
    if isinstance(entry, list):
        return {template["name"]: template["template"] for template in entry}
    return {"default": entry} if entry else {}
