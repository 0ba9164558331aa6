"""Training text: the Python standard library of the running interpreter, split, deduplicated and packed.

Nothing is downloaded. A file belongs to the held-out part when the hash of its relative path says so, so the
split depends neither on the order of the files nor on which others are present.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .tokenizer import END_OF_TEXT, render

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"}
)
SKIPPED_PREFIX = "_sysconfigdata"  # generated when the interpreter was built: paths and flags of a machine


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the collected root, with forward slashes, and its text."""

    path: str
    text: str


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def collect(root: Path) -> list[Document]:
    """Every UTF-8 .py file under `root` in order of its path, each text once.

    Tests, codec tables, installed packages and build records (`SKIPPED_FOLDERS`, `SKIPPED_PREFIX`) are left out.
    """
    seen: set[bytes] = set()
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or path.name.startswith(SKIPPED_PREFIX):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            documents.append(Document(relative.as_posix(), text))
    if not documents:
        raise ValueError(f"no Python source under {root}; name a folder that holds .py files")
    return documents


def split(documents: Iterable[Document], percent: float = 4.0) -> tuple[list[Document], list[Document]]:
    """(training, held out): held out is where the SHA-256 of "tokenloom/" + path falls in the lowest `percent`."""
    if not 0 <= percent < 100:
        raise ValueError(
            f"a held-out share of {percent} % leaves nothing to train on; give 0 <= percent < 100"
        )
    training, held = [], []
    for document in documents:
        number = int.from_bytes(hashlib.sha256(f"tokenloom/{document.path}".encode()).digest()[:8], "big")
        (held if number < percent / 100 * 2**64 else training).append(document)
    return training, held


def instructions(documents: Iterable[Document], longest: int = 700, every: int = 4) -> Iterator[str]:
    """Conversations made of documented functions: a request naming the function, its source as the answer.

    Takes one function in `every` (by the hash of its source) of at most `longest` characters. They teach the
    chat template's tokens; there is no other conversation in the data.
    """
    for document in documents:
        try:
            nodes = ast.walk(ast.parse(document.text))
        except (SyntaxError, ValueError):
            continue
        lines = document.text.splitlines(keepends=True)
        for node in nodes:
            if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)):
                continue
            source = lines[node.lineno - 1 : node.end_lineno]
            answer = "".join(line[node.col_offset :] if line.strip() else "\n" for line in source)
            if len(answer) > longest or hashlib.sha256(answer.encode()).digest()[0] % every:
                continue
            summary = " ".join(docstring.split("\n\n")[0].split())
            request = f"Write a Python function named {node.name}. {summary}"
            yield render([{"role": "user", "content": request}, {"role": "assistant", "content": answer}])


def stream(tokenizer: Tokenizer, texts: Iterable[str], seed: int | None = None) -> np.ndarray:
    """u16[N]: the texts' tokens back to back, each after one end-of-text token.

    With a seed the texts are shuffled by it. The vocabulary must fit 16 bits.
    """
    if tokenizer.get_vocab_size() > 2**16:
        raise ValueError(
            f"a vocabulary of {tokenizer.get_vocab_size()} does not fit 16-bit tokens; use at most 65536 entries"
        )
    texts = list(texts)
    if seed is not None:
        texts = [texts[index] for index in np.random.default_rng(seed).permutation(len(texts))]
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        parts.append(np.array([end, *encoding.ids], np.uint16))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Windows:
    """Batches of windows cut from a token stream; batch `index` is a function of (seed, index) alone.

    Every pass over the stream cuts it at a fresh offset and visits the windows in a fresh order, so resuming
    needs nothing but the index, and a window is never seen twice in the same alignment.
    """

    tokens: np.ndarray
    length: int
    batch: int
    seed: int

    def __post_init__(self):
        if self.per_pass < 1:
            raise ValueError(
                f"{len(self.tokens)} tokens are too few for batches of {self.batch} windows of {self.length}; "
                "give more text, or a smaller batch"
            )

    @property
    def per_pass(self) -> int:
        """Batches in one pass; the last incomplete one is dropped."""
        return (len(self.tokens) - 1 - self.length) // self.length // self.batch

    def __call__(self, index: int) -> np.ndarray:
        """i32[batch, length + 1]: inputs are [:, :-1], targets [:, 1:]."""
        epoch, at = divmod(index, self.per_pass)
        rng = np.random.default_rng((self.seed, epoch, self.length))
        offset = int(rng.integers(self.length))
        order = rng.permutation(self.per_pass * self.batch)
        starts = offset + order[at * self.batch : (at + 1) * self.batch] * self.length
        return np.stack([self.tokens[start : start + self.length + 1] for start in starts]).astype(np.int32)
