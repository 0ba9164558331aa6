"""Engines and references that test modules share, built once a process."""

import random
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenloom import LLM, SamplingParams
from tokenloom.attention.batch import rectangle
from tokenloom.attention.caches.recurrent import Stateless
from tokenloom.attention.caches.uncached import Uncached
from tokenloom.model import checkpoint
from tokenloom.model.config import AttentionConfig
from tokenloom.serve.build import choose_numerics
from tokenloom.tests.shapes import ALL, LENGTH, VOCAB

ROOMY = dict(max_num_seqs=4, max_num_batched_tokens=64, page_size=16)
# Other widths, other chunks, other pages, and too few of them: requests are preempted.
TIGHT = dict(max_num_seqs=3, max_num_batched_tokens=40, page_size=8, num_pages=30)
NEAR_TIE = 2e-4
TOLERANCE = 2e-5


@cache
def engine(shape: str, tight: bool = False) -> LLM:
    return LLM.from_config(ALL[shape](), 0, strict=True, progress=False, **(TIGHT if tight else ROOMY))


@cache
def _whole(shape: str):
    """The plain model on one padded text: tokens i32[LENGTH] -> log-probabilities f32[LENGTH, V]."""
    config, numerics = ALL[shape](), choose_numerics(None, "float32")
    graphdef, given = checkpoint.abstract(config, numerics)[0], checkpoint.random_params(config, numerics, 0)
    states = tuple(
        Uncached() if isinstance(block.mixer, AttentionConfig) else Stateless() for block in config.blocks
    )

    @jax.jit
    def run(params, tokens):
        model = nnx.merge(graphdef, params)
        batch = rectangle(tokens[None])
        x, _ = model.run(model.embed(batch.tokens, batch), states, batch, range(model.num_layers))
        return jax.nn.log_softmax(model.head(model.normalise(x)), axis=-1)

    return lambda tokens: np.asarray(run(given, jnp.asarray(tokens)))


def whole(shape: str, tokens: list[int]) -> np.ndarray:
    """Log-probabilities [len(tokens), V] of the plain, uncached model."""
    padded = np.zeros(LENGTH, np.int32)
    padded[: len(tokens)] = tokens
    return _whole(shape)(padded)[: len(tokens)]


def prompts(count: int, seed: int, longest: int = 120) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def greedy(tokens: int = 24, **more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=2, **more)


def check_against_whole(shape: str, output) -> None:
    """Every generated token is the plain model's choice, with the plain model's log-probability."""
    completion = output.outputs[0]
    ids = [*output.prompt_token_ids, *completion.token_ids]
    expected = whole(shape, ids)
    for place, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        row = expected[len(output.prompt_token_ids) + place - 1]
        assert abs(entry[token].logprob - row[token]) <= TOLERANCE
        assert row.max() - row[token] <= NEAR_TIE


def same_tokens(a, b, ties: int = 0) -> None:
    """Two outputs of the same request hold the same tokens; where they part, the candidates were near-tied.

    Needs logprobs=2 (greedy): the two candidates' log-probabilities are in the first difference's entry.
    """
    x, y = a.outputs[0], b.outputs[0]
    if list(x.token_ids) == list(y.token_ids):
        return
    at = next(i for i, (s, t) in enumerate(zip(x.token_ids, y.token_ids)) if s != t)
    entry = x.logprobs[at]
    best = sorted((p.logprob for p in entry.values()), reverse=True)
    assert best[0] - best[1] <= NEAR_TIE, f"parted at {at}: {entry} {y.logprobs[at]}"


def mixed(draw: random.Random) -> SamplingParams:
    """Parameters of every kind, seeded."""
    params = SamplingParams(
        temperature=draw.choice([0.0, 0.7, 1.3]), top_k=draw.choice([0, 5, 40]),
        top_p=draw.choice([1.0, 0.8]), min_p=draw.choice([0.0, 0.05]),
        repetition_penalty=draw.choice([1.0, 1.2]), presence_penalty=draw.choice([0.0, 0.5]),
        frequency_penalty=draw.choice([0.0, 0.3]), seed=draw.getrandbits(64), max_tokens=draw.randint(1, 30),
        logit_bias=draw.choice([None, {3: 4.0, 7: -50.0}]), n=draw.choice([1, 1, 2]),
        allowed_token_ids=draw.choice([None, list(range(0, VOCAB, 3))]), ignore_eos=True,
        stop_token_ids=draw.choice([None, [1, 2, 3, 4, 5]]), min_tokens=draw.choice([0, 1]),
        reflection_amplitude=draw.choice([0.0, 3.0]), reflection_period=10, reflection_token_ids=range(6, 12),
        thinking_end_token_ids=range(12, 20),
    )  # fmt: skip
    steered = dict(top_k=0, top_p=1.0, min_p=0.0, mirostat_mode=draw.choice([1, 2]), mirostat_tau=4.0)
    return draw.choice([params, params, replace(params, **steered)])


class Nothing:
    """A controller that drafts nothing: plain decoding with the programs of an engine that speculates."""

    def choose(self, rows):
        return None

    def observe(self, shape, emitted):
        """A step from before may still be read."""


@contextmanager
def undrafted(llm: LLM):
    """Plain decoding for a while."""
    speculation = llm.engine.programs.speculation
    before, speculation.controller = speculation.controller, Nothing()
    yield
    speculation.controller = before
