"""Bits a byte of a checkpoint folder over source files.

    python -m tokenloom.adapt.evaluate model/demo                  # the standard library's held-out files
    python -m tokenloom.adapt.evaluate model/demo --source DIR     # every file collected under DIR

Each file is read alone, from an end-of-text token on, through windows of `context` tokens that advance by half a
context: the first window scores all its tokens, each later one only those no earlier window scored, which so see
at least half a context. The sum of their cross entropies, in bits, is divided by the file's UTF-8 bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer
from tqdm import tqdm

from ..model.checkpoint import abstract, load, load_config
from . import data
from .tokenizer import END_OF_TEXT
from .train import losses


@dataclass(frozen=True)
class Score:
    """What evaluating some texts gave: total bits, UTF-8 bytes and tokens."""

    bits: float
    bytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / max(self.bytes, 1)

    def __add__(self, other: Score) -> Score:
        return Score(self.bits + other.bits, self.bytes + other.bytes, self.tokens + other.tokens)


def windows(tokens: np.ndarray, context: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Cut tokens [N] into (window i32[context + 1], first, last): score its targets first..last (exclusive).

    Every token but the first is the target of exactly one window. Windows are padded at the end with token 0,
    which causal attention keeps from being seen.
    """
    if context < 2:
        raise ValueError(f"a context of {context} tokens cannot slide by half; give at least 2")
    targets, scored, start = len(tokens) - 1, 0, 0
    while scored < targets:
        window = np.zeros(context + 1, np.int32)
        part = tokens[start : start + context + 1]
        window[: len(part)] = part
        yield window, scored - start, len(part) - 1
        scored = start + len(part) - 1
        start += context // 2


class Evaluator:
    """A model ready to score texts; compiled once, for one window of `context` tokens."""

    def __init__(self, graph: nnx.GraphDef, params: Any, tokenizer: Tokenizer, context: int = 2048):
        self.params, self.tokenizer, self.context = params, tokenizer, context
        self.losses = jax.jit(lambda params, window: losses(graph, params, window[None])[0])

    @classmethod
    def from_folder(cls, folder: Path, context: int | None = None) -> Evaluator:
        """The model of a checkpoint folder in float32; context None is its max_position."""
        _, config = load_config(folder)
        if context is not None and context > config.max_position:
            raise ValueError(f"a context of {context} exceeds max_position {config.max_position} of {folder}")
        graph, _ = abstract(config)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(graph, load(folder, config), tokenizer, context or config.max_position)

    def score(self, text: str) -> Score:
        """The score of one text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        tokens = np.array([self.tokenizer.token_to_id(END_OF_TEXT), *ids], np.int32)
        nats = 0.0
        for window, first, last in windows(tokens, self.context):
            nats += float(np.asarray(self.losses(self.params, window), np.float64)[first:last].sum())
        return Score(nats / float(np.log(2)), len(text.encode()), len(ids))

    def score_all(self, texts: Iterable[str]) -> Score:
        """The summed score of several texts: long files weigh more than short ones."""
        return sum((self.score(text) for text in texts), Score(0.0, 0, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits a byte of a checkpoint folder over Python source.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, help="score every file collected under this folder")
    parser.add_argument("--context", type=int, help="tokens a window (default: the model's max_position)")
    args = parser.parse_args()
    if args.source is None:
        documents = data.split(data.collect(data.standard_library()))[1]
    else:
        documents = data.collect(args.source)
    evaluator = Evaluator.from_folder(args.folder, args.context)
    score = evaluator.score_all(document.text for document in tqdm(documents))
    print(
        f"{score.bits_per_byte:.4f} bits a byte over {len(documents)} files, {score.bytes} bytes, "
        f"{score.tokens} tokens, context {evaluator.context}"
    )


if __name__ == "__main__":
    main()
