"""A byte-level BPE for source code, trained with the `tokenizers` library, and the files that ship with it.

Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909, over bytes as in GPT-2): every string has an encoding and
decodes to itself. Text is first cut by `PIECES`, so that a token never spans a word boundary, an underscore
begins the word after it, digits stand alone, the spaces of an indentation (all but the last) are one piece, and a
line break ends a piece: a prompt that ends with a line break is cut as it was in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, PAD, END = "<|endoftext|>", "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL = (END_OF_TEXT, PAD, END, *(f"<|{role}|>" for role in ROLES))

PIECES = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word with the one mark or space before it
        r"\p{N}",  # a digit
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # marks, with the line breaks after them
        r"\s*[\r\n]+",  # line breaks
        r"\s+(?!\S)",  # spaces, except the last before something
        r"\s+",
    )
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant; got ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def render(messages: Sequence[dict[str, str]]) -> str:
    """What `CHAT_TEMPLATE` makes of a finished conversation."""
    return "".join(f"<|{message['role']}|>{message['content']}{END}" for message in messages)


def train(texts: Iterable[str], vocab: int = 4096) -> Tokenizer:
    """A tokenizer with `vocab` entries: `SPECIAL` first, all 256 bytes, then merges by frequency."""
    if vocab < len(SPECIAL) + 256:
        raise ValueError(
            f"{vocab} entries cannot hold {len(SPECIAL)} special tokens and 256 bytes; "
            f"give at least {len(SPECIAL) + 256}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_position: int) -> None:
    """Write tokenizer.json, tokenizer_config.json (with the chat template) and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_position,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    ids = {name: tokenizer.token_to_id(name) for name in (END_OF_TEXT, PAD, END)}
    generation = {
        "bos_token_id": ids[END_OF_TEXT],
        "eos_token_id": [ids[END_OF_TEXT], ids[END]],
        "pad_token_id": ids[PAD],
    }
    for name, content in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
