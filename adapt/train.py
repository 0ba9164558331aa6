"""Train a small Llama-architecture model on the standard library of the running interpreter.

    python -m tokenloom.adapt.train demo --out runs/demo
    python -m tokenloom.adapt.train demo --out runs/demo --resume --steps 1200
    python -m tokenloom.adapt.train draft --out runs/draft --tokenizer runs/demo/tokenizer.json

Matrices inside the blocks are trained by Muon (Jordan et al. 2024; update size as in Liu et al. 2025,
arXiv 2502.16982), everything else by AdamW, under a warm-up-stable-decay rate. A run folder holds the tokenizer,
the latest recipe, the commands given, Orbax checkpoints and the losses as JSON lines. A resumed run equals an
uninterrupted one bit for bit: batches and rates are functions of the step, everything else is in the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon
from tokenizers import Tokenizer
from tqdm import tqdm

from ..attention.batch import rectangle
from ..model.config import ModelConfig, llama_config
from ..model.decoder import Decoder
from . import data
from . import tokenizer as tokenizers
from .rows import TrainingRows
from .schedule import WarmupStableDecay


@dataclass(frozen=True)
class Recipe:
    """A model's shape and how it is trained.

    `steps` updates; the last `long_steps` see `long_batch` windows of `long_length` tokens, the others `batch`
    windows of `length`. `warmup` and `decay` are steps of the schedule; `rate` is the peak of Muon's rate,
    `adam_rate` that of AdamW's.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    steps: int
    long_steps: int
    decay: int
    vocab: int = 4096
    max_position: int = 2048
    batch: int = 16
    length: int = 256
    long_batch: int = 2
    long_length: int = 2048
    warmup: int = 50
    rate: float = 6e-3
    adam_rate: float = 4e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.long_steps <= self.steps:
            raise ValueError(f"{self.long_steps} long steps do not fit {self.steps} steps; lower long_steps")
        if max(self.length, self.long_length) > self.max_position:
            raise ValueError(
                f"windows of {max(self.length, self.long_length)} tokens exceed max_position "
                f"{self.max_position}; shorten the windows or raise max_position"
            )

    @property
    def model(self) -> ModelConfig:
        """The architecture: Llama with the embedding tied to the head."""
        return llama_config(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            intermediate=self.intermediate,
            vocab=self.vocab,
            max_position=self.max_position,
            tie=True,
        )

    def changed(self, settings: Sequence[str]) -> Recipe:
        """This recipe with fields replaced by "name=number" settings, as the command line gives them."""
        known, changes = asdict(self), {}
        for setting in settings:
            name, _, value = setting.partition("=")
            if name not in known or not value:
                raise ValueError(
                    f"{setting!r} sets no field of a recipe; write NAME=NUMBER, NAME of {list(known)}"
                )
            changes[name] = type(known[name])(value)
        return replace(self, **changes)

    def ending_at(self, steps: int) -> Recipe:
        """The same run made shorter or longer: its decay and long part keep their lengths where they fit."""
        room = max(steps - self.warmup, 0)
        return replace(
            self,
            steps=steps,
            warmup=min(self.warmup, steps),
            decay=min(self.decay, room),
            long_steps=min(self.long_steps, room),
        )


DEMO = Recipe(6, 256, 8, 4, 768, steps=1400, long_steps=250, decay=400)
DRAFT = Recipe(2, 128, 4, 2, 320, steps=700, long_steps=60, decay=450, rate=3e-3, adam_rate=1.2e-2)


@partial(jax.tree_util.register_dataclass, data_fields=["params", "optimiser", "step"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes: parameters (a pure dict), optax state, and how many updates were made."""

    params: Any
    optimiser: Any
    step: jax.Array


def build(config: ModelConfig, seed: int) -> tuple[nnx.GraphDef, Any]:
    """(graph definition, parameters as a pure dict) of a decoder whose blocks begin as the identity.

    The last matrix of each branch is zero (as in Zhang et al. 2019, arXiv 1901.09321): the small embedding is
    otherwise drowned by what random blocks add to it, and the first hundreds of steps go to undoing that.
    """
    graph, state = nnx.split(Decoder(config, rngs=nnx.Rngs(seed)))
    params = nnx.to_pure_dict(state)
    for block in params["blocks"].values():
        for last in (block["mixer"]["o"], block["channel"]["down"]):
            last["weight"] = jnp.zeros_like(last["weight"])
    return graph, params


def losses(graph: nnx.GraphDef, params: Any, windows: jax.Array) -> jax.Array:
    """Cross entropy in nats of every target: windows i32[B, S+1] -> f32[B, S]."""
    model: Decoder = nnx.merge(graph, nnx.State(params))
    batch = rectangle(windows[:, :-1])
    layers = model.num_layers
    x = model.embed(batch.tokens, batch)
    x, _ = model.run(x, (TrainingRows(),) * layers, batch, range(layers))
    logits = model.head(model.normalise(x))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:].reshape(-1))
    return loss.reshape(windows.shape[0], -1)


def _orthogonalised(params: Any) -> Any:
    """Which parameters Muon trains: the matrices inside the blocks (None: AdamW)."""

    def spec(path, leaf):
        inside = path[0] == jax.tree_util.DictKey("blocks")
        return MuonDimensionNumbers() if inside and leaf.ndim == 2 else None

    return jax.tree.map_with_path(spec, params)


def optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """Clipped Muon and AdamW under the recipe's schedule; norms are not decayed."""
    schedule = partial(WarmupStableDecay, total=recipe.steps, warmup=recipe.warmup, decay=recipe.decay)
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        muon(
            schedule(recipe.rate),
            adam_learning_rate=schedule(recipe.adam_rate),
            weight_decay=recipe.weight_decay,
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_orthogonalised,
        ),
    )


def make_step(
    graph: nnx.GraphDef, transform: optax.GradientTransformation
) -> Callable[[TrainState, jax.typing.ArrayLike], tuple[TrainState, jax.Array]]:
    """The compiled update: (state, windows i32[B, S+1]) -> (state, mean loss in nats); the state is donated."""

    def step(state: TrainState, windows: jax.Array) -> tuple[TrainState, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda params: losses(graph, params, windows).mean())(
            state.params
        )
        updates, memory = transform.update(gradient, state.optimiser, state.params)
        return TrainState(optax.apply_updates(state.params, updates), memory, state.step + 1), loss

    return jax.jit(step, donate_argnums=0)


@dataclass(frozen=True)
class Corpus:
    """Token streams: u16 training tokens, u16 held-out tokens, and held-out bytes per token."""

    training: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float


def load_corpus(root: Path, tokenizer: Tokenizer | None, vocab: int, seed: int) -> tuple[Tokenizer, Corpus]:
    """Collect, split and tokenise the source under `root`; trains a tokenizer where none is given."""
    training, held = data.split(data.collect(root))
    texts = [document.text for document in training]
    tokenizer = tokenizer or tokenizers.train(texts, vocab)
    tokens = data.stream(tokenizer, [*texts, *data.instructions(training)], seed)
    held_tokens = data.stream(tokenizer, [document.text for document in held])
    size = sum(len(document.text.encode()) for document in held)
    return tokenizer, Corpus(tokens, held_tokens, size / max(len(held_tokens), 1))


class Trainer:
    """One run in one folder: `state` is the current TrainState, `run()` trains to the recipe's end."""

    def __init__(self, recipe: Recipe, corpus: Corpus, folder: Path, *, resume: bool = False):
        self.recipe, self.corpus, self.folder = recipe, corpus, folder
        self.graph, params = build(recipe.model, recipe.seed)
        transform = optimiser(recipe)
        self.step = make_step(self.graph, transform)
        self.evaluate = jax.jit(lambda params, windows: losses(self.graph, params, windows).mean())
        self.state: TrainState = TrainState(params, transform.init(params), jnp.zeros((), jnp.int32))
        self.windows = data.Windows(corpus.training, recipe.length, recipe.batch, recipe.seed)
        self.long = (
            data.Windows(corpus.training, recipe.long_length, recipe.long_batch, recipe.seed)
            if recipe.long_steps
            else None
        )
        self.history = folder / "history.jsonl"
        options = ocp.CheckpointManagerOptions(max_to_keep=3, create=True)
        self.checkpoints = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)
        self._begin(resume)

    def _begin(self, resume: bool) -> None:
        latest = self.checkpoints.latest_step()
        if latest is not None and not resume:
            raise ValueError(f"{self.folder} holds a run of {latest} steps; pass --resume or another --out")
        if latest is None:
            self.history.write_text("")
            return
        restored: Any = self.checkpoints.restore(latest, args=ocp.args.StandardRestore(self.state))
        self.state = restored
        kept = [line for line in self.history.read_text().splitlines() if json.loads(line)["step"] <= latest]
        self.history.write_text("".join(f"{line}\n" for line in kept))

    def batch(self, step: int) -> np.ndarray:
        """The windows of update `step` (from 0)."""
        first_long = self.recipe.steps - self.recipe.long_steps
        if step < first_long or self.long is None:
            return self.windows(step)
        return self.long(step - first_long)

    def held_out_bits(self, count: int = 32) -> float:
        """Bits a byte on a fixed sample of `count` held-out windows of the recipe's length: a progress figure."""
        windows = data.Windows(self.corpus.held_out, self.recipe.length, 1, 0)
        sample = np.concatenate([windows(index) for index in range(min(count, windows.per_pass))])
        loss = float(self.evaluate(self.state.params, sample))
        return loss / np.log(2) / self.corpus.bytes_per_token

    def run(self, *, stop: int | None = None, save_every: int = 100) -> None:
        """Train up to `stop` updates (default: the recipe's end), saving and measuring every `save_every`."""
        end = min(stop or self.recipe.steps, self.recipe.steps)
        begin = int(self.state.step)
        with self.history.open("a") as log, tqdm(total=end, initial=begin, mininterval=10) as bar:
            for step in range(begin, end):
                start = time.perf_counter()
                windows = self.batch(step)
                self.state, loss = self.step(self.state, windows)
                record = {
                    "step": step + 1,
                    "loss": float(loss),
                    "tokens": windows[:, 1:].size,
                    "seconds": round(time.perf_counter() - start, 3),
                }
                if (step + 1) % save_every == 0 or step + 1 == end:
                    record["held_out_bits_per_byte"] = self.held_out_bits()
                    self.checkpoints.save(step + 1, args=ocp.args.StandardSave(self.state))
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.update()
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        self.checkpoints.wait_until_finished()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an embedded model on the standard library.")
    parser.add_argument("recipe", choices=["demo", "draft"])
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--steps", type=int, help="end here instead (the decay and the long part move along)")
    parser.add_argument("--stop", type=int, help="pause after this many updates, with a checkpoint")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="other recipe fields")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint of --out")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use instead of training one")
    parser.add_argument("--source", type=Path, default=data.standard_library(), help="train on this folder")
    args = parser.parse_args()
    recipe = {"demo": DEMO, "draft": DRAFT}[args.recipe]
    if args.steps is not None:
        recipe = recipe.ending_at(args.steps)
    recipe = recipe.changed(args.set)
    saved = args.out / "tokenizer.json"
    given = args.tokenizer or (saved if args.resume and saved.exists() else None)
    tokenizer = None if given is None else Tokenizer.from_file(str(given))
    tokenizer, corpus = load_corpus(args.source, tokenizer, recipe.vocab, recipe.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, corpus, args.out, resume=args.resume)
    tokenizer.save(str(saved))
    (args.out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    with (args.out / "commands.txt").open("a") as commands:
        given = shlex.join(sys.argv[1:])
        commands.write(f"python -m tokenloom.adapt.train {given}  # from step {int(trainer.state.step)}\n")
    print(f"{len(corpus.training)} training tokens, {len(corpus.held_out)} held out", flush=True)
    trainer.run(stop=args.stop)


if __name__ == "__main__":
    main()
