"""A smaller model drafts (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).

Its keys and values lie in pages of their own, under the target's page numbers: one table serves both, and a prefix that
the target finds in its cache is found for the draft too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ...attention.batch import Batch, Shape, make_batch
from ...model import checkpoint
from ...model.config import AttentionConfig, ModelConfig
from ...model.stacked import lay_out
from ...model.state import make_state
from ..fingerprint import digest
from ..sampling.keys import Purpose
from ..sampling.sampler import Sampler, SamplerState
from ..tokenizer import Tokenizer
from .draft import Accepted, Draft, DraftShape, Model, Pass, Rows, Target, Verifier
from .matching import SampleMatching
from .rejection import RejectionSampling


@dataclass(frozen=True)
class DraftModel:
    """model: a checkpoint's folder, a hub name or "demo-draft", or a config whose weights are drawn from `seed`; its
    tokenizer must be the target's. tokens: how many it drafts a step, or several numbers of which a controller chooses.

    verify: "rejection" draws drafts as the request draws its tokens and keeps the target's distribution (speculative
    sampling); "matching" drafts the most likely tokens and keeps the very tokens of plain decoding, at a lower
    acceptance for requests that draw.
    """

    model: str | Path | ModelConfig = "demo-draft"
    tokens: int | tuple[int, ...] = 4
    verify: Literal["rejection", "matching"] = "rejection"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.tokens,) if isinstance(self.tokens, int) else self.tokens
        if not counts or min(counts) < 1:
            raise ValueError(f"tokens={self.tokens!r} must be at least 1")
        if self.verify not in ("rejection", "matching"):
            raise ValueError(f"verify={self.verify!r} is not known; choose 'rejection' or 'matching'")

    @property
    def shapes(self) -> tuple[DraftShape, ...]:
        counts = (self.tokens,) if isinstance(self.tokens, int) else self.tokens
        return tuple(DraftShape.line(count) for count in sorted(counts))

    @property
    def draws(self) -> bool:
        return self.verify == "rejection"

    def open(self, target: Target) -> OpenedDraftModel:
        verifier = RejectionSampling() if self.draws else SampleMatching()
        return OpenedDraftModel(*open_model(self.model, self.seed, target), verifier)


def open_model(model: str | Path | ModelConfig, seed: int, target: Target) -> tuple[nnx.GraphDef, Any, tuple]:
    """(graphdef, params, empty pages) of a draft model for this target: a folder or hub name, or a config whose weights
    are drawn from `seed`. ValueError where it does not suit the target."""
    if isinstance(model, ModelConfig):
        folder, config = None, model
    else:
        folder = checkpoint.resolve(model)
        config = checkpoint.load_config(folder)[1]
    _check(config, folder, target)
    numerics = replace(target.numerics, param_dtype=target.numerics.dtype)
    params = (
        checkpoint.random_params(config, numerics, seed)
        if folder is None
        else checkpoint.load(folder, config, numerics)
    )
    graphdef, params, period = lay_out(config, numerics, params)
    # Programs of another draft model are not taken for this one's.
    key = f"draft_{digest([repr(config)])[:16]}"
    state = target.compiler.start(key, lambda: make_state(config, target.capacity, period))
    return graphdef, params, state


def _check(config: ModelConfig, folder: Path | None, target: Target) -> None:
    """ValueError where the draft model cannot stand beside the target."""
    if config.vocab_size != target.config.vocab_size:
        raise ValueError(
            f"the draft model has a vocabulary of {config.vocab_size} tokens, the target one of "
            f"{target.config.vocab_size}; take a draft model with the target's tokenizer"
        )
    if not all(isinstance(block.mixer, AttentionConfig) for block in config.blocks):
        raise ValueError(
            f"the draft model ({config.model_type}) has recurrent layers, which cannot forget rejected tokens; take "
            "one with attention only"
        )
    known = target.tokenizer
    if folder is not None and known is not None and not Tokenizer.load(folder).same_ids(known):
        raise ValueError(
            f"the draft model {folder.name!r} has another tokenizer than the target: the same token ids stand for "
            "other texts; take a draft model of the target's family"
        )
    longest = config.max_position
    if config.learned_positions is not None and longest < target.length:
        raise ValueError(
            f"the draft model has {longest} positions, the target's texts may have {target.length}; lower "
            "max_model_len, or take another draft model"
        )


class OpenedModel:
    """A draft model of any kind of draft. params: its weights; state: its pages."""

    history, follows, taps = False, True, ()

    def __init__(self, graphdef: nnx.GraphDef, params: Any, state: tuple, verifier: Verifier):
        self.graphdef, self.params, self.state, self.verifier = graphdef, params, state, verifier

    def run(self, params: Any, state: tuple, batch: Batch) -> tuple[Any, jax.Array, tuple]:
        model = nnx.merge(self.graphdef, params)
        x, state = model.run(model.embed(batch.tokens, batch), state, batch, range(model.num_layers))
        return model, x, state

    def follow(self, params: Any, state: tuple, batch: Batch) -> tuple:
        return self.run(params, state, batch)[2]

    def commit(
        self, params: Any, state: tuple, rows: Rows, draft: Draft, made: Pass, accepted: Accepted
    ) -> tuple:
        """What was accepted is computed once more, all in one pass: the last token has no K and V here yet, and another
        drafter may have drafted it."""
        tokens = jnp.take_along_axis(draft.token, accepted.path, 1)
        T = tokens.shape[1]
        page_size = state[0].page_size
        batch = line(rows, tokens, rows.lengths - 1 + T, page_size)
        return self.run(params, state, batch)[2]


class OpenedDraftModel(OpenedModel):
    """Drafts one line: drawn where it is judged by rejection sampling, else the most likely tokens."""

    def propose(
        self, params: Any, state: tuple, rows: Rows, shape: DraftShape, sampler: Sampler, seated: SamplerState,
        model: Model,
    ) -> tuple[Draft, tuple, tuple]:  # fmt: skip
        token, tokens, probs = rows.root, [], []
        draws = isinstance(self.verifier, RejectionSampling)
        for step in range(shape.depth):
            batch = line(rows, token[:, None], rows.lengths + step, model.page_size)
            draft, x, state = self.run(params, state, batch)
            logits = draft.head(draft.normalise(x)).astype(jnp.float32)
            positions = rows.lengths + step
            if draws:
                z = sampler.process(seated, logits, rows.seats, positions, rows.live)
                token = sampler.choose(seated, z, rows.seats, positions, rows.live, Purpose.DRAFT)
                probs.append(sampler.probabilities(seated, z, rows.seats))
            else:
                token = jnp.argmax(logits, -1).astype(jnp.int32)
            tokens.append(token)
        count = jnp.full(rows.root.shape, shape.depth, jnp.int32)
        drawn = jnp.stack([*probs, probs[-1]], 1) if probs else None
        return Draft.chain(rows.root, jnp.stack(tokens, 1), count, drawn), state, model.state


def line(rows: Rows, tokens: jax.Array, lengths: jax.Array, page_size: int) -> Batch:
    """The batch of rows that each add tokens i32[B,n] as their last ones, up to lengths i32[B]."""
    B, n = tokens.shape
    return make_batch(
        Shape(B, n, 0, 0), page_size, tokens=tokens.reshape(-1),
        lengths=jnp.where(rows.live, lengths, 0), page_table=rows.page_table,
        query_starts=jnp.zeros((1,), jnp.int32), seats=rows.seats,
    )  # fmt: skip
