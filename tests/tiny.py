"""A model of one small layer with the demo's tokenizer: what tests of the layers above `LLM` run on."""

import shutil
from functools import cache
from pathlib import Path

from tokenloom import LLM
from tokenloom.model import checkpoint
from tokenloom.model.config import llama_config
from tokenloom.serve.tokenizer import Tokenizer

LENGTH = 128
SIZES = dict(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=LENGTH)
CONFIG = dict(layers=1, hidden=32, heads=2, kv_heads=1, intermediate=48, vocab=4096, max_position=LENGTH)


@cache
def llm() -> LLM:
    """Shared by a process; nobody closes it."""
    tokenizer = Tokenizer.load(checkpoint.resolve("demo"))
    return LLM.from_config(
        llama_config(**CONFIG), 0, tokenizer=tokenizer, progress=False, strict=True, **SIZES
    )


def save(folder: Path) -> Path:
    """The same model as a folder, for processes of their own."""
    llm().save(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(checkpoint.resolve("demo") / name, folder)
    return folder
