"""A step as numbers: from the scheduler's work to the i32 descriptor that its programs take."""

from __future__ import annotations

import numpy as np

from ..attention.batch import NULL_PAGE, Shape, pack
from .buckets import BucketPlan
from .scheduler import Chunk, Sequence, Work


def pack_step(
    work: Work, plan: BucketPlan, width: int
) -> tuple[Shape, np.ndarray, list[tuple[int, Sequence, int]]]:
    """The step's shape and descriptor (page tables of `width` pages), and (row, sequence, epoch) for each row that
    samples by itself: for a gang's rows another program chooses."""
    shape = plan.shape(len(work.decodes), sum(chunk.count for chunk in work.chunks))
    lengths = np.zeros(shape.rows, np.int32)
    seats = np.full(shape.rows, plan.max_num_seqs, np.int32)
    samples = np.zeros(shape.rows, np.int32)
    table = np.full((shape.rows, width), NULL_PAGE, np.int32)
    starts = np.zeros(shape.R + 1, np.int32)
    prompt = np.zeros(shape.C, np.int32)
    rows = []
    for row, sequence in enumerate(work.decodes):
        lengths[row], seats[row], samples[row] = sequence.computed, sequence.seat, sequence.gang is None
        table[row, : len(sequence.pages)] = sequence.pages[:width]
        if sequence.gang is None:
            rows.append((row, sequence, sequence.epoch))
    end = 0
    for index, (at, chunk) in enumerate(offsets(work.chunks)):
        sequence, row, end = chunk.sequence, shape.B + index, at + chunk.count
        prompt[at:end] = sequence.tokens[chunk.start : chunk.start + chunk.count]
        starts[index + 1] = end
        lengths[row], seats[row], samples[row] = chunk.start + chunk.count, sequence.seat, chunk.final
        table[row, : len(sequence.pages)] = sequence.pages[:width]
        if chunk.final:
            rows.append((row, sequence, sequence.epoch))
    starts[len(work.chunks) + 1 :] = end
    packed = pack(
        shape, width, lengths=lengths, seats=seats, samples=samples, page_table=table,
        query_starts=starts, prompt_tokens=prompt,
    )  # fmt: skip
    return shape, packed, rows


def offsets(chunks: list[Chunk]) -> list[tuple[int, Chunk]]:
    """Where each chunk begins in the prompt part."""
    found, at = [], 0
    for chunk in chunks:
        found.append((at, chunk))
        at += chunk.count
    return found
