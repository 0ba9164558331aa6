"""The model card of an exported folder, and its picture: every figure is computed, none typed."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

if TYPE_CHECKING:
    from .evaluate import Score
    from .train import Recipe

CURVE = "loss.png"


@dataclass(frozen=True)
class Measured:
    """A score over `files` files, and what they are."""

    what: str
    files: int
    score: Score


def parameter_count(folder: Path) -> int:
    """Parameters stored in a folder's model.safetensors, from its header alone."""
    total = 0
    with safe_open(folder / "model.safetensors", "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            size = 1
            for dim in tensors.get_slice(name).get_shape():
                size *= dim
            total += size
    return total


def draw(history: Sequence[dict], path: Path) -> bool:
    """Draw the training loss, smoothed, and the held-out bits a byte over tokens; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    tokens, smooth, measured, seen, mean = [], [], [], 0, None
    for record in history:
        seen += record["tokens"]
        mean = record["loss"] if mean is None else 0.95 * mean + 0.05 * record["loss"]
        tokens.append(seen / 1e6)
        smooth.append(mean)
        if "held_out_bits_per_byte" in record:
            measured.append((seen / 1e6, record["held_out_bits_per_byte"]))
    figure = Figure(figsize=(6, 3.2), dpi=90, layout="constrained")
    left = figure.subplots()
    left.plot(tokens, smooth, color="tab:blue")
    left.set(xlabel="million tokens", ylabel="training loss, nats a token")
    if measured:
        right = left.twinx()
        right.plot(*zip(*measured), "o-", color="tab:orange", markersize=3)
        right.set_ylabel("held out, bits a byte (short windows)")
    figure.savefig(path, metadata={"Software": None})
    return True


def training(recipe: Recipe, history: Sequence[dict]) -> str:
    """The paragraph about the training; `recipe` is that of the last command."""
    tokens, hours = (
        sum(record[name] for record in history) / per for name, per in (("tokens", 1), ("seconds", 3600))
    )
    ending = ""
    if recipe.long_steps:
        ending = f", the last {recipe.long_steps} of them on windows of {recipe.long_length:,} tokens"
    return (
        f"{len(history):,} updates{ending}: {tokens:,.0f} tokens in {hours:.2f} hours of steps on a CPU shared with "
        "other work. Muon for the matrices of the blocks, AdamW for the rest, weight decay "
        f"{recipe.weight_decay:g}, gradient norm clipped at {recipe.clip:g}; the rate warms up over {recipe.warmup} "
        f"updates and falls linearly to zero over the last {recipe.decay}. Float32 throughout. What a command does "
        "not name is in `adapt/train.py`."
    )


TEMPLATE = """---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [code, python]
---
# {title}

A Llama-architecture language model of {parameters:,} parameters, trained from nothing by this project's own code on
the Python standard library: {layers} layers of width {hidden}, {heads} query and {kv_heads} key-value heads of
{head_dim}, MLP {intermediate}, tied embedding, a byte-level BPE of {vocab:,} entries, context {context:,}. Stored in
{dtype}. It is here so that examples, tests and benchmarks have a real model that needs no download: it continues
Python, and knows nothing else.

## How good it is

| text | files | bytes | tokens | bits a byte |
|---|---|---|---|---|
{rows}

Measured on this folder, loaded in float32, with `python -m tokenloom.adapt.evaluate`: each file alone, windows of
{context:,} tokens advancing by half. Held out are the files of the standard library whose path hashes into the
lowest 4 % (`adapt/data.py`); they share authors and habits with the training files, another package does not.

## How it was made

{commands}

{training}
{picture}
Data: every `.py` file of CPython {python}'s standard library except tests, `encodings/`, installed packages and
build records, each text once; and conversations made from one in four of its short documented functions, which teach
the chat template's tokens. Other interpreters have other files: the same command gives a sister, not a twin.

## Licence

The text it learned from is the Python standard library, under the Python Software Foundation License 2.0; weights
are given under the same terms.
"""


def write(
    folder: Path,
    recipe: Recipe,
    history: Sequence[dict],
    commands: Sequence[str],
    measured: Sequence[Measured],
    dtype: str,
) -> None:
    """Write README.md, and the curve where matplotlib is installed, into an exported folder.

    `recipe`, `history` and `commands` are the run's; `measured` are scores of the folder.
    """
    name = "demo" if recipe.hidden >= 256 else "draft"
    picture = f"\n![Loss over training tokens]({CURVE})\n" if draw(history, folder / CURVE) else ""
    rows = [
        f"| {part.what} | {part.files} | {part.score.bytes:,} | {part.score.tokens:,} | "
        f"{part.score.bits_per_byte:.3f} |"
        for part in measured
    ]
    text = TEMPLATE.format(
        title=f"Tokenloom {name}",
        name=name,
        parameters=parameter_count(folder),
        layers=recipe.layers,
        hidden=recipe.hidden,
        heads=recipe.heads,
        kv_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        intermediate=recipe.intermediate,
        vocab=recipe.vocab,
        context=recipe.max_position,
        dtype=dtype,
        rows="\n".join(rows),
        commands="\n".join(f"    {command}" for command in commands),
        training=training(recipe, history),
        picture=picture,
        python=".".join(platform.python_version_tuple()[:2]),
    )
    (folder / "README.md").write_text(text)
