"""Turn a run into an ordinary Hugging Face folder, with its card.

    python -m tokenloom.adapt.export runs/demo --out model/demo
    python -m tokenloom.adapt.export runs/demo --out model/demo --other jinja2 numpy

The folder has what `transformers` reads: config.json, model.safetensors (bfloat16 unless told otherwise),
tokenizer.json, tokenizer_config.json with a chat template, generation_config.json; and README.md, the model card
with the loss curve, whose figures are computed from the run and from the exported folder itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save
from tokenizers import Tokenizer

from ..model.checkpoint import flatten, unflatten
from ..model.config import AttentionConfig, MLPConfig, ModelConfig
from ..model.families import llama
from ..model.families.common import Source
from . import card, data
from . import tokenizer as tokenizers
from .evaluate import Evaluator
from .train import Recipe, TrainState, build, optimiser


def restore(run: Path, recipe: Recipe, step: int | None = None) -> tuple[Any, int]:
    """(parameters as a pure dict, step) of a run's checkpoint, the latest unless `step` says otherwise."""
    if not (run / "checkpoints").is_dir():
        raise ValueError(f"{run} holds no checkpoints; train it first: python -m tokenloom.adapt.train")

    def fresh() -> TrainState:
        _, params = build(recipe.model, recipe.seed)
        return TrainState(params, optimiser(recipe).init(params), jnp.zeros((), jnp.int32))

    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager((run / "checkpoints").absolute(), options=options) as checkpoints:
        step = checkpoints.latest_step() if step is None else step
        if step not in checkpoints.all_steps():
            raise ValueError(
                f"{run} has no checkpoint of step {step}; it has {list(checkpoints.all_steps())}"
            )
        state: Any = checkpoints.restore(step, args=ocp.args.StandardRestore(jax.eval_shape(fresh)))
    return state.params, step


def hugging_face_config(config: ModelConfig, dtype: str, ids: Mapping[str, int | None]) -> dict:
    """The config.json of a Llama-architecture decoder; `ids` are those of the special tokens."""
    block = config.blocks[0]
    mixer, channel = block.mixer, block.channel
    if set(config.blocks) != {block} or not isinstance(mixer, AttentionConfig) or mixer.rope is None:
        raise ValueError("only equal blocks of rotary attention are a Llama; this config has others")
    if not isinstance(channel, MLPConfig):
        raise ValueError(f"only a gated MLP is a Llama's; this config has {channel!r}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "intermediate_size": channel.intermediate,
        "hidden_act": channel.activation,
        "rms_norm_eps": block.norm.eps,
        "rope_theta": mixer.rope.theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_position,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "bos_token_id": ids[tokenizers.END_OF_TEXT],
        "eos_token_id": [ids[tokenizers.END_OF_TEXT], ids[tokenizers.END]],
        "pad_token_id": ids[tokenizers.PAD],
        "torch_dtype": dtype,
    }


def write_folder(
    params: Any, config: ModelConfig, tokenizer: Tokenizer, folder: Path, dtype: str = "bfloat16"
) -> None:
    """Write a checkpoint folder of a Llama-architecture decoder: weights in `dtype`, configs, tokenizer."""
    types = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
    if dtype not in types:
        raise ValueError(f"weights are written as bfloat16 or float32; {dtype!r} is neither")
    folder.mkdir(parents=True, exist_ok=True)
    names = llama.weights(config)
    tensors = {}
    for path, leaf in flatten(params).items():
        where = names[path]
        assert isinstance(where, Source), f"{path} is not one stored tensor of a Llama"
        tensors[where.name] = np.ascontiguousarray(np.asarray(leaf).astype(types[dtype]))
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    ids = {token: tokenizer.token_to_id(token) for token in tokenizers.SPECIAL}
    settings = hugging_face_config(config, dtype, ids)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizers.save(tokenizer, folder, config.max_position)


def pure_dict(params: Any) -> dict:
    """Orbax gives back string keys; layers are numbered by ints."""
    return unflatten(flatten(params))


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{name} is not an installed package; install it or name another in --other")
    return Path(next(iter(spec.submodule_search_locations)))


def measure(folder: Path, others: list[str]) -> list[card.Measured]:
    """Bits a byte on the standard library's held-out files, then on each of the installed packages `others`."""
    evaluator = Evaluator.from_folder(folder)
    held = data.split(data.collect(data.standard_library()))[1]
    parts = [("held-out files of the standard library", held)]
    parts += [(f"installed package `{name}`", data.collect(package_folder(name))) for name in others]
    return [
        card.Measured(name, len(documents), evaluator.score_all(document.text for document in documents))
        for name, documents in parts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a training run as a Hugging Face folder.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", type=int, help="this checkpoint instead of the latest")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--other", nargs="*", default=[], help="installed packages to measure for the card")
    parser.add_argument(
        "--no-card", action="store_true", help="weights and configs only; nothing is measured"
    )
    args = parser.parse_args()
    recipe = Recipe(**json.loads((args.run / "recipe.json").read_text()))
    params, step = restore(args.run, recipe, args.step)
    tokenizer = Tokenizer.from_file(str(args.run / "tokenizer.json"))
    write_folder(pure_dict(params), recipe.model, tokenizer, args.out, args.dtype)
    if not args.no_card:
        history = [json.loads(line) for line in (args.run / "history.jsonl").read_text().splitlines()]
        history = [record for record in history if record["step"] <= step]
        commands = (args.run / "commands.txt").read_text().splitlines()
        others = " ".join(["", "--other", *args.other]) if args.other else ""
        commands.append(
            f"python -m tokenloom.adapt.export runs/{args.run.name} --out model/{args.out.name}{others}"
        )
        card.write(args.out, recipe, history, commands, measure(args.out, args.other), args.dtype)


if __name__ == "__main__":
    main()
