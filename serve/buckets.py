"""The bucket plan: which programs exist."""

from __future__ import annotations

from dataclasses import dataclass

from ..attention.batch import Shape


@dataclass(frozen=True)
class BucketPlan:
    """Which programs exist: decode widths, prompt chunk sizes (tokens), prompt rows, sequences."""

    max_num_seqs: int
    widths: tuple[int, ...]
    chunks: tuple[int, ...]
    prompt_rows: int

    @staticmethod
    def make(max_num_seqs: int, max_num_batched_tokens: int, parts: int = 1) -> BucketPlan:
        """Widths double from 1 to max_num_seqs, chunks from 32 (64 for each of several `parts` that share a chunk) to
        max_num_batched_tokens."""
        widths = [1 << i for i in range(max_num_seqs.bit_length()) if 1 << i < max_num_seqs] + [max_num_seqs]
        least = 32 if parts == 1 else 64 * parts
        chunks = [size for i in range(30) if (size := least << i) < max_num_batched_tokens]
        rows = min(max_num_seqs, max(4, max_num_batched_tokens // 64))
        return BucketPlan(max_num_seqs, tuple(widths), (*chunks, max_num_batched_tokens), rows)

    def shape(self, decodes: int, prompt_tokens: int) -> Shape:
        """The smallest program that holds so many decodes and prompt tokens."""
        if prompt_tokens == 0:
            return Shape(self.width(decodes), 1, 0, 0)
        chunk = next(size for size in self.chunks if size >= prompt_tokens)
        return Shape(self.max_num_seqs if decodes else 0, 1, self.prompt_rows, chunk)

    def backbones(self) -> list[Shape]:
        decode = [Shape(width, 1, 0, 0) for width in self.widths]
        # A single sequence never decodes beside its own prompt.
        beside = (0, self.max_num_seqs) if self.max_num_seqs > 1 else (0,)
        return decode + [Shape(B, 1, self.prompt_rows, chunk) for B in beside for chunk in self.chunks]

    def width(self, rows: int) -> int:
        """The smallest decode width that holds so many rows."""
        return next(width for width in self.widths if width >= rows)

    def heads(self) -> list[int]:
        return sorted({shape.rows for shape in self.backbones()})

    def __str__(self) -> str:
        beside = f", alone and beside {self.max_num_seqs} decodes" if self.max_num_seqs > 1 else ""
        return (
            f"decode widths {list(self.widths)}; prompt chunks {list(self.chunks)} of up to "
            f"{self.prompt_rows} prompts{beside}; heads for {self.heads()} rows; "
            f"{len(self.backbones())} backbones + {len(self.heads())} heads"
        )
