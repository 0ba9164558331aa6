"""The decoder: blocks of (token mixer, channel mixer), runnable in spans of layers.

    x = decoder.embed(batch.tokens, batch)
    x, state = decoder.run(x, state, batch, range(decoder.num_layers))
    logits = decoder.head(decoder.normalise(x))

`state` is a tuple with one entry a layer; each is what that layer's token mixer remembers (`attention/caches`).
A step may come in parts, a tuple of batches with as many x: layer by layer they run one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..attention.batch import Batch
from ..attention.caches.relay import pass_on
from .channels.mlp import MLP
from .channels.moe import MoE
from .config import AttentionConfig, BlockConfig, MLPConfig, ModelConfig, MoEConfig
from .layers import Embedding, Linear, Norm, Numerics
from .mixers.attention import Attention
from .mixers.mamba2 import Mamba2

X = Any
"""Activations [T,E], or a tuple of those of a step's parts."""
Step = Batch | tuple[Batch, ...]


def _channel(config: MLPConfig | MoEConfig | None, hidden: int, **kinds) -> MLP | MoE | None:
    if config is None:
        return None
    return MLP(config, hidden, **kinds) if isinstance(config, MLPConfig) else MoE(config, hidden, **kinds)


class Block(nnx.Module):
    """One token mixer, one channel mixer (or none), and the norms around them (`BlockConfig.wiring`)."""

    def __init__(self, config: BlockConfig, hidden: int, *, numerics: Numerics, rngs: nnx.Rngs):
        self.config = config
        kinds: dict[str, Any] = dict(numerics=numerics, rngs=rngs)
        stored = replace(numerics, weights=config.mixer_weights)
        if isinstance(config.mixer, AttentionConfig):
            self.mixer = Attention(config.mixer, hidden, numerics=stored, rngs=rngs)
        else:
            self.mixer = Mamba2(config.mixer, hidden, numerics=stored, rngs=rngs)
        stored = replace(numerics, weights=config.channel_weights)
        self.channel = _channel(config.channel, hidden, numerics=stored, rngs=rngs)
        norms = {"sandwich": 4}.get(config.wiring, 2) if self.channel is not None else 1
        self.norms = nnx.List([Norm(hidden, config.norm, **kinds) for _ in range(norms)])

    @property
    def normed_first(self) -> bool:
        """Whether norms stand in front of the mixer and the channel mixer."""
        return self.config.wiring in ("pre", "sandwich", "parallel")

    @property
    def channel_norm(self) -> Norm:
        """The norm that belongs to the channel mixer (of two: the one in front of it)."""
        return self.norms[-2 if self.config.wiring == "sandwich" else -1]

    def mixed(self, x: jax.Array, batch: Batch, state):
        """x after the token mixer and its residual."""
        wiring, scale, norms = self.config.wiring, self.config.residual_scale, self.norms
        with jax.named_scope("mixer"):
            y, state = self.mixer(batch.together(norms[0](x) if self.normed_first else x), batch, state)
        y = batch.apart(y)
        if wiring == "post":
            y = norms[0](y)
        elif wiring == "sandwich":
            y = norms[1](y)
        x = x + (y if scale == 1.0 else scale * y)
        return (norms[0](x) if wiring == "after" else x), state

    def _channelled(self, h: jax.Array, batch: Batch) -> jax.Array:
        """The channel mixer's result, as tokens lie between mixers."""
        assert self.channel is not None
        return batch.apart(self.channel(h if self.channel.takes_apart(batch) else batch.together(h), batch))

    def _fed(self, x: jax.Array, batch: Batch) -> jax.Array:
        """x after the channel mixer and its residual."""
        wiring, scale, norms = self.config.wiring, self.config.residual_scale, self.norms
        with jax.named_scope("channel"):
            y = self._channelled(self.channel_norm(x) if self.normed_first else x, batch)
        if wiring in ("post", "sandwich"):
            y = norms[-1](y)
        x = x + (y if scale == 1.0 else scale * y)
        return norms[1](x) if wiring == "after" else x

    def __call__(self, x: jax.Array, batch: Batch, state):
        if self.config.wiring == "parallel":
            assert self.channel is not None
            with jax.named_scope("mixer"):
                y, state = self.mixer(batch.together(self.norms[0](x)), batch, state)
            y = batch.apart(y + self.channel(batch.together(self.norms[1](x)), batch))
            return x + self.config.residual_scale * y, state
        x, state = self.mixed(x, batch, state)
        return (x if self.channel is None else self._fed(x, batch)), state


class Decoder(nnx.Module):
    """A decoder-only language model, whatever its family. Construct under `nnx.eval_shape` for specs only."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        numerics: Numerics = Numerics(),
        rngs: nnx.Rngs,
        period: int | None = None,
    ):
        self.config, self.numerics = config, numerics
        # Stacked: `blocks` holds one block for each place in the period, its weights with a leading axis.
        self.period = period
        E, V = config.hidden_size, config.vocab_size
        size = config.embed_size or E
        kinds: dict[str, Any] = dict(numerics=numerics, rngs=rngs)
        stored = replace(numerics, weights=config.embedding_weights)
        self.embedding = Embedding(V, size, axes=("vocab", "embed"), numerics=stored, rngs=rngs)
        learned = config.learned_positions
        self.positions = Embedding(learned[0], E, axes=(None, "embed"), **kinds) if learned else None
        self.project_in = Linear(size, E, (None, None), **kinds) if size != E else None
        self.project_out = Linear(E, size, (None, None), **kinds) if size != E else None
        self.blocks = nnx.List([Block(block, E, **kinds) for block in config.blocks[:period]])
        self.final_norm = None if config.final_norm is None else Norm(E, config.final_norm, **kinds)
        tie, bias = config.tie_embeddings, config.head_bias
        stored = replace(numerics, weights=config.head_weights)
        make: dict[str, Any] = dict(bias=bias, numerics=stored, rngs=rngs)
        self.lm_head = None if tie else Linear(size, V, ("vocab", "embed"), **make)

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def embed(self, tokens: jax.Array, batch: Batch) -> jax.Array:
        """Token ids i32[T] -> x [T,E], positions added where they are learned."""
        config = self.config
        x = self.embedding(tokens)
        if config.embed_scale != 1.0:
            x = x * jnp.asarray(config.embed_scale, x.dtype)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None and config.learned_positions is not None:
            x = x + self.positions(batch.positions + config.learned_positions[1])
        return x

    def run(self, x: X, state: tuple, batch: Step, layers: Iterable[int]) -> tuple[X, tuple]:
        """Run the blocks named by `layers`, in that order; the others' state is left alone.

        run(0..k) then run(k..L) equals run(0..L).
        """
        if self.period is not None:
            return self._run_stacked(x, state, batch, list(layers), self.period)
        entries = list(state)
        for index in layers:
            with jax.named_scope(f"layer{index}"):
                x, entries[index] = self._through(self.blocks[index], index, x, batch, entries[index])
            pass_on(entries, index)
        return x, tuple(entries)

    def _run_stacked(
        self, x: X, state: tuple, batch: Step, layers: list[int], period: int
    ) -> tuple[X, tuple]:
        """One scan over periods. The state rides in the carry (as scan inputs and outputs it would be copied);
        spans that do not run whole periods in order slice their layers' weights instead."""
        graphs, weights = zip(*[nnx.split(block) for block in self.blocks])

        def layer(place: int, repeat, values, x, entry):
            block = nnx.merge(graphs[place], values)
            x, new = self._through(block, repeat * period + place, x, batch, entry.layer(repeat))
            return x, entry.put(repeat, new)

        entries = list(state)
        if layers != list(range(layers[0], layers[-1] + 1)) or layers[0] % period or len(layers) % period:
            for index in layers:
                place, repeat = index % period, index // period
                values = jax.tree.map(lambda a, at=repeat: a[at], weights[place])
                x, entries[place] = layer(place, jnp.int32(repeat), values, x, entries[place])
                pass_on(entries, place)
            return x, tuple(entries)

        def body(carry, xs):
            x, entries = carry
            repeat, values = xs
            entries = list(entries)
            for place in range(period):
                with jax.named_scope(f"place{place}"):
                    x, entries[place] = layer(place, repeat, values[place], x, entries[place])
                pass_on(entries, place)
            return (x, tuple(entries)), None

        first, count = layers[0] // period, len(layers) // period
        span = jax.tree.map(lambda a: a[first : first + count], weights)
        repeats = jnp.arange(first, first + count, dtype=jnp.int32)
        (x, entries), _ = jax.lax.scan(body, (x, tuple(entries)), (repeats, span))
        return x, entries

    def _through(self, block: Block, index: int | jax.Array, x: X, batch: Step, entry) -> tuple[X, Any]:
        """One block, for the tokens that run through layer `index`; the others keep their x."""
        if isinstance(batch, tuple):
            parts = []
            for here, part in zip(x, batch):
                here, entry = self._through(block, index, here, part, entry)
                parts.append(here)
            return tuple(parts), entry
        depth, prompts = self.config.depth, batch.prompt_lengths
        if depth is None or prompts is None:
            return block(x, batch, entry)
        active = depth.active(index, self.num_layers, batch.positions, prompts[batch.rows]) & batch.valid

        def run(x, entry):
            y, new = block(x, batch, entry)
            return jnp.where(active[:, None], y, x), new

        return jax.lax.cond(active.any(), run, lambda x, entry: (x, entry), x, entry)

    def normalise(self, x: jax.Array) -> jax.Array:
        """The final norm, row by row: x [..., E] -> [..., E]."""
        return x if self.final_norm is None else self.final_norm(x)

    def head(self, x: jax.Array) -> jax.Array:
        """Normalised x [N,E] -> logits f32[N,V]."""
        if self.project_out is not None:
            x = self.project_out(x)
        logits = self.embedding.attend(x) if self.lm_head is None else self.lm_head(x)
        logits = logits.astype(jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
