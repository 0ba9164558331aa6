"""Record one small checkpoint a family, and what transformers says about it, for tests that run without torch.

    python -m tokenloom.tests.record_families [model_type ...]

Writes tests/data/families/<model_type>/: config.json, model.safetensors (bfloat16) and expected.npz (tokens and
float32 logits). Run it again when a family's draw changes; needs the parity extra.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import jax
from tokenloom.model.families import supported

from . import families

FOLDER = Path(__file__).parent / "data" / "families"
WEIGHTS = 16_000
KEPT = ("config.json", "model.safetensors", "expected.npz")


def weights_of(model_type: str, seed: int) -> int:
    """The number of weights of a drawn config."""
    config = families.find(model_type).config({"model_type": model_type, **families.drawn(model_type, seed)})
    return sum(spec.size for spec in jax.tree.leaves(families.abstract(config)[1]))


def record(model_type: str) -> None:
    """Record the first drawn config of at most WEIGHTS weights, else the smallest of the first hundred."""
    sizes = {seed: weights_of(model_type, seed) for seed in range(100)}
    seed = next((seed for seed, size in sizes.items() if size <= WEIGHTS), min(sizes, key=lambda s: sizes[s]))
    folder = FOLDER / model_type
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    raw = {"model_type": model_type, **families.drawn(model_type, seed)}
    reference = families.make_reference(raw, folder, seed, rows=2, halved=True)
    families.save_reference(reference, folder)
    for path in folder.iterdir():
        if path.name not in KEPT:
            path.unlink()
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{model_type}: draw {seed}, {sizes[seed]} weights, {total / 1e3:.0f} KB")


if __name__ == "__main__":
    for name in sys.argv[1:] or supported():
        record(name)
