"""What caches cost in quality, and in bytes: the embedded model reads held-out text through each of them.

    python benchmarks/caches.py [--windows 8] [--context 2048] [--only h2o ...]

Windows of `context` tokens of held-out files (`adapt.data.split`, which the model was not trained on) are fed through
the decode path, token by token, as a generation would be, so every cache does what it does in a generation: nothing
is computed as a prompt. The tokens of each window's second half are scored, so each sees at least half a context.
Bytes a token: what a text of `context` tokens takes in the cache over its tokens (float32 activations; the pages in
which H2O computes prompts are free by then).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import table
from flax import nnx
from tokenizers import Tokenizer
from tokenloom.adapt import data
from tokenloom.attention.batch import Shape, make_batch
from tokenloom.attention.caches.double_sparsity import DoubleSparsity
from tokenloom.attention.caches.gear import GEAR, Int4KV
from tokenloom.attention.caches.h2o import H2O
from tokenloom.attention.caches.paged import Pages
from tokenloom.attention.caches.policy import CachePolicy, Capacity
from tokenloom.attention.caches.streaming import StreamingLLM
from tokenloom.model import checkpoint
from tokenloom.model.config import ModelConfig
from tokenloom.model.observe import channel_products
from tokenloom.model.state import make_state, state_bytes, state_spec

FOLDER = Path(__file__).resolve().parent.parent / "model" / "demo"
CALIBRATION, CALIBRATION_TOKENS = 32, 512


def policies(context: int, head_dim: int, products: list) -> dict[str, CachePolicy]:
    """What the table compares: a fifth of the context, a sixteenth of tokens and channels, 4 bits."""
    fifth, sixteenth = context // 5, context // 16
    sparse = DoubleSparsity(sixteenth, max(1, head_dim // 16))
    quarter = DoubleSparsity(sixteenth, head_dim // 4)
    return {
        "full": Pages(),
        "streaming 20 %": StreamingLLM(4, fifth - 4),
        "window 20 %, no sinks": StreamingLLM(0, fifth),
        "h2o 20 %": H2O(fifth // 2, fifth - fifth // 2),
        "double sparsity 1/16, 1/16 channels, calibrated": sparse.calibrated(products),
        "double sparsity 1/16, 1/4 channels, calibrated": quarter.calibrated(products),
        "double sparsity 1/16, 1/4 channels, middle": quarter,
        "int4": Int4KV(),
        "int2": Int4KV(bits=2),
        "gear 4 bit": GEAR(),
        "gear 2 bit": GEAR(bits=2),
    }


def blocks(texts: list[str], tokenizer: Tokenizer, count: int, length: int) -> np.ndarray:
    """i32[count,length]: the beginnings of as many texts as are long enough, each behind an end-of-text token."""
    found = []
    for text in texts:
        ids = data.stream(tokenizer, [text])[:length].astype(np.int32)
        if len(ids) == length:
            found.append(ids)
    if len(found) < count:
        raise ValueError(f"{len(found)} texts have {length} tokens, {count} were asked for; lower --windows")
    return np.stack(found[:count])


class Reader:
    """Texts [B,T+1] through one cache, a token of each a step."""

    def __init__(
        self, graph: nnx.GraphDef, config: ModelConfig, cache: CachePolicy, rows: int, length: int,
        kv_dtype: Any = None,
    ):  # fmt: skip
        self.kv_dtype = kv_dtype
        self.rows, self.length, self.config, self.cache = rows, length, config, cache
        self.size = cache.page_size or 128
        self.width = -(-length // self.size)
        pages = np.arange(1, rows * self.width + 1, dtype=np.int32).reshape(rows, self.width)
        self.run = jax.jit(partial(self._run, graph, pages))

    def capacity(self, seats: int) -> Capacity:
        return Capacity(1 + seats * self.width, self.size, seats, width=self.width, kv_dtype=self.kv_dtype)

    def _run(self, graph: nnx.GraphDef, pages: np.ndarray, params: Any, tokens: jax.Array) -> jax.Array:
        """params, i32[B,T+1] -> nats f32[T,B] of the successors."""
        model = nnx.merge(graph, params)
        state = make_state(self.config, self.capacity(self.rows), None, self.cache)
        seats = jnp.arange(self.rows, dtype=jnp.int32)

        def step(state, given):
            place, now, target = given
            batch = make_batch(
                Shape(self.rows, 1, 0, 0), self.size, tokens=now, lengths=jnp.full(self.rows, place + 1),
                page_table=jnp.asarray(pages), query_starts=jnp.zeros(1, jnp.int32), seats=seats,
            )  # fmt: skip
            batch = replace(
                batch, prompt_lengths=jnp.ones(self.rows, jnp.int32)
            )  # all but the first is generated
            x, state = model.run(model.embed(now, batch), state, batch, range(model.num_layers))
            scores = jax.nn.log_softmax(model.head(model.normalise(x)), -1)
            return state, -jnp.take_along_axis(scores, target[:, None], -1)[:, 0]

        places = jnp.arange(self.length, dtype=jnp.int32)
        return jax.lax.scan(step, state, (places, tokens[:, :-1].T, tokens[:, 1:].T))[1]

    def bytes_a_token(self) -> float:
        """Of one sequence of `length` tokens."""
        many, one = (state_bytes(state_spec(self.config, self.capacity(n), None, self.cache)) for n in (2, 1))
        held = many - one
        if self.cache.abilities.pages == "prompt":
            plain = (state_bytes(state_spec(self.config, self.capacity(n))) for n in (2, 1))
            held -= next(plain) - next(plain)
        return held / self.length


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument(
        "--only", nargs="*", help="rows of the table whose names begin so, beside the full cache"
    )
    arguments = parser.parse_args()
    config = checkpoint.load_config(FOLDER)[1]
    graph, params = checkpoint.abstract(config)[0], checkpoint.load(FOLDER, config)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    training, held = data.split(data.collect(data.standard_library()))
    context, half = arguments.context, arguments.context // 2
    tokens = blocks([one.text for one in held], tokenizer, arguments.windows, context + 1)
    size = sum(len(tokenizer.decode(row[half + 1 :].tolist()).encode()) for row in tokens)
    seen = blocks([one.text for one in training], tokenizer, CALIBRATION, CALIBRATION_TOKENS)
    products = channel_products(graph, params, config, np.split(seen, 8))
    mixer: Any = config.blocks[0].mixer
    rows = [(f"{len(tokens)} windows of {context}, second halves", "bits a byte", "over full", "KV bytes a token",
             "of full", "s")]  # fmt: skip
    full = full_bytes = 0.0
    for name, cache in policies(context, mixer.head_dim, products).items():
        if name != "full" and arguments.only and not name.startswith(tuple(arguments.only)):
            continue
        start, reader = time.perf_counter(), Reader(graph, config, cache, len(tokens), context)
        nats = np.asarray(reader.run(params, jnp.asarray(tokens)), np.float64)[half:].sum()
        bits, held_bytes = nats / np.log(2) / size, reader.bytes_a_token()
        if name == "full":
            full, full_bytes = bits, held_bytes
        rows.append((name, f"{bits:.4f}", f"{bits / full - 1:+.2%}", f"{held_bytes:.0f}",
                     f"{held_bytes / full_bytes:.3f}", f"{time.perf_counter() - start:.0f}"))  # fmt: skip
        print(*rows[-1], sep="  ", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
