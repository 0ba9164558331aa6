"""Drawn drafts against each other: tokens that one pass of the target emits, on random tables.

    python benchmarks/drawn_trees.py [--rows 20000] [--vocab 64] [--noise 1.0]

Target and draft are tables over the last token: normal logits times 2, and the same with noise. Counts follow from the
seed alone and hold on any machine; what a slot costs there is another matter.
"""

from __future__ import annotations

import argparse

import numpy as np
from tokenloom.serve.drafters.rsd import Beam, Branches
from tokenloom.serve.drafters.spectr import Lines
from tokenloom.tests.tables import draw

CASES = {
    "one line of 4": (Lines(1), 4),
    "SpecTr, 4 lines of 4": (Lines(4), 4),
    "RSD-C (4, 1, 1, 1)": (Branches((4, 1, 1, 1)), 4),
    "RSD-S, 4 wide, 4 deep": (Beam(4), 4),
    "RSD-C (2, 2, 1, 1)": (Branches((2, 2, 1, 1)), 4),
    "one line of 8": (Lines(1), 8),
    "SpecTr, 2 lines of 4": (Lines(2), 4),
    "RSD-C (2, 1, 1, 1)": (Branches((2, 1, 1, 1)), 4),
    "RSD-S, 2 wide, 4 deep": (Beam(2), 4),
}


def tables(vocab: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """(target, draft) f64[V,V]."""
    random = np.random.default_rng(0)
    logits = 2.0 * random.standard_normal((vocab, vocab))
    found = []
    for one in (logits, logits + noise * random.standard_normal(logits.shape)):
        weights = np.exp(one - one.max(1, keepdims=True))
        found.append(weights / weights.sum(1, keepdims=True))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--vocab", type=int, default=64)
    parser.add_argument("--noise", type=float, default=1.0)
    given = parser.parse_args()
    target, draft = tables(given.vocab, given.noise)
    print(f"total variation of the draft: {np.abs(target - draft).sum(1).mean() / 2:.3f}")
    for name, (growth, depth) in CASES.items():
        drawn = draw(growth, depth, target, draft, given.rows)
        count = np.asarray(drawn.judged(growth.verifier).sampled.count)
        print(f"{name:24} {drawn.tree.token.shape[1] - 1:3} drafted, {count.mean():.3f} tokens a pass")


if __name__ == "__main__":
    main()
