"""Quantised weights: time beside float32 and llama.cpp's q8_0 in one run, and bits a byte of the embedded model.

    python benchmarks/quantised.py [--batch 1 8] [--prompt 512] [--rounds 5]     (pip install llama-cpp-python gguf)
    python benchmarks/quantised.py --quality [--files 12] [--context 512] [--only int4]

Times are of the 125M shapes with random weights, interleaved. Quality is cross entropy on files of the standard
library that the embedded model was not trained on, each read as `tokenloom.adapt.evaluate` reads them; calibration
looks at files that it was trained on.
"""

from __future__ import annotations

import argparse

from common import interleaved, read_bandwidth, require_quiet, table
from flax import nnx
from tokenizers import Tokenizer as Raw
from tokenloom import CATS, Fp8, Int4, Int8, OutlierSuppressionPlus
from tokenloom.adapt import data
from tokenloom.adapt.evaluate import Evaluator
from tokenloom.model import checkpoint
from tokenloom.model.checkpoint import abstract, load, load_config
from tokenloom.model.decoder import Decoder
from tokenloom.model.layers import Numerics
from tokenloom.model.transforms.calibration import block_inputs, embedded, windows
from tokenloom.model.transforms.cats import empty_blocks, gate_magnitudes
from tokenloom.model.transforms.transform import assemble, leaves_of
from tokenloom.serve.tokenizer import Tokenizer

METHODS = {
    "int8": Int8(),
    "int8, inputs as they are": Int8(activations=None),
    "int8 after OS+": OutlierSuppressionPlus(Int8()),
    "fp8": Fp8(),
    "int4, groups of 64": Int4(),
    "int4, groups of 64, after OS+": OutlierSuppressionPlus(Int4()),
    "CATS 0.3": CATS(0.3),
    "CATS 0.5": CATS(0.5),
    "CATS 0.7": CATS(0.7),
}


def quality(files: int, context: int, only: str) -> None:
    """Bits a byte of each method, and how much more than the original's."""
    folder = checkpoint.resolve("demo")
    raw = Raw.from_file(str(folder / "tokenizer.json"))
    training, held = data.split(data.collect(data.standard_library()))
    texts = [document.text for document in held[:files]]
    tokenizer = Tokenizer.load(folder)
    calibration = [tokenizer.encode(document.text) for document in training[:: len(training) // 24]]
    _, config = load_config(folder)
    model = assemble(config, Numerics(), load(folder, config))
    rows, base = [("model", "bits a byte", "more, %", "weights, MB")], None
    for name, transform in {"float32": None, **METHODS}.items():
        if only not in name and transform is not None:
            continue
        found = model if transform is None else transform(model, calibration)
        params = nnx.to_pure_dict(nnx.state(found))
        score = Evaluator(abstract(found.config)[0], params, raw, context).score_all(texts)
        base = base or score.bits_per_byte
        size = sum(leaf.nbytes for leaf in checkpoint.flatten(params).values()) / 1e6
        rows.append(
            (
                name,
                f"{score.bits_per_byte:.4f}",
                f"{(score.bits_per_byte / base - 1) * 100:.2f}",
                f"{size:.1f}",
            )
        )
        print(rows[-1], flush=True)
        if isinstance(transform, CATS):
            print(empty_shares(model, found, calibration))
    print(f"{len(texts)} files, {score.bytes} bytes, context {context}\n{table(rows)}")


def empty_shares(model: Decoder, cut: Decoder, calibration: list[list[int]]) -> str:
    """For the middle layer: the share of gates cut and of blocks of neighbours that a token does not need at all."""
    tokens, layer = windows(calibration, 256, "CATS")[-8:], model.num_layers // 2
    x = embedded(model, tokens)
    for index in range(layer + 1):
        held = leaves_of(model.blocks[index])
        half, x = block_inputs(model.config.blocks[index], model.numerics, held, x, tokens)
    magnitudes = gate_magnitudes(model.config.blocks[layer], model.numerics, held, half)
    theta = leaves_of(cut)[f"blocks.{layer}.channel.threshold"]
    shares = {size: f"{empty_blocks(magnitudes, theta, size):.3f}" for size in (1, 8, 16, 128)}
    return f"    layer {layer}: share of blocks of neurons without a survivor, by size: {shares}"


def speed(batches: list[int], prompt: int, rounds: int) -> None:
    """ms a decode step and a prompt, and ratios over our float32."""
    from decode import tokenloom
    from llamacpp import llama_decode, llama_prompt, tokenloom_prompt

    require_quiet()
    print(f"read bandwidth {read_bandwidth():.1f} GB/s")
    int8 = {"transforms": [Int8()]}
    for size in (*batches, None) if prompt else batches:
        ours, theirs, what, title, unit = (
            (tokenloom_prompt, llama_prompt, prompt, f"a prompt of {prompt}, ms", 1e3)
            if size is None
            else (tokenloom, llama_decode, size, f"batch {size}, ms a step", 1.0)
        )
        contenders = {
            "tokenloom float32": ours("float32", what),
            "tokenloom Int8()": ours("float32", what, **int8),
            "llama.cpp f32": theirs("f32", what),
            "llama.cpp q8_0": theirs("q8_0", what),
        }
        times = interleaved(contenders, rounds)
        rows = [(title, "time", "times as fast as tokenloom float32")]
        rows += [
            (name, f"{value * unit:.2f}", f"{times['tokenloom float32'] / value:.2f}")
            for name, value in times.items()
        ]
        print(table(rows), flush=True)
    require_quiet()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--files", type=int, default=12, help="held-out files")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.quality:
        quality(arguments.files, arguments.context, arguments.only)
    else:
        speed(arguments.batch, arguments.prompt, arguments.rounds)


if __name__ == "__main__":
    main()
