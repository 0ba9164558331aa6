"""ModelConfig: the facts of a checkpoint, as data.

A model is a tuple of blocks; a block is a token mixer, a channel mixer and the norms around them. Families
(`model/families/`) translate a checkpoint's `config.json` into these dataclasses and do nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .depth import Depth


@dataclass(frozen=True)
class QuantConfig:
    """How the weights of some linear layers are stored (`model/quantised.py`): 8 bits with a scale an output
    channel, or 4 bits with a scale and a zero point for each `group_size` inputs of a channel.

    activations: "int8" rounds inputs to 8 bits too, with a scale a row; None leaves them.
    """

    format: Literal["int8", "fp8", "int4"] = "int8"
    group_size: int | None = None
    activations: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        if (self.format == "int4") != (self.group_size is not None):
            raise ValueError(
                f"format {self.format!r} with group_size={self.group_size}: int4 has groups (64, say), int8 and fp8 "
                f"have a scale an output channel (group_size=None)"
            )
        if self.group_size is not None and (self.group_size < 2 or self.group_size % 2):
            raise ValueError(f"group_size={self.group_size} must be even: two codes share a byte")
        if self.activations is not None and self.format != "int8":
            raise ValueError(
                f"activations={self.activations!r} need int8 weights, not {self.format}; leave activations=None"
            )


@dataclass(frozen=True)
class NormConfig:
    """A normalisation over the last axis. `offset` is added to the stored weight (Gemma stores weight - 1)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bias: bool = False
    scale: bool = True


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions on the first `dim` features of a head (pairs are (i, i + dim/2)).

    `scaling` is one of None, "linear", "dynamic", "yarn", "llama3", "longrope"; `parameters` holds the
    scaling's own numbers under the names that checkpoints use, as sorted (name, value) pairs.
    `max_position` is the checkpoint's max_position_embeddings. "dynamic" and "longrope" depend on how long
    sequences may become: they use `length` (the engine's max_model_len; None: max_position), so that a
    token's rotation never depends on how its prompt was cut.
    """

    theta: float = 10000.0
    dim: int = 64
    scaling: str | None = None
    parameters: tuple[tuple[str, object], ...] = ()
    max_position: int = 2048
    length: int | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention. `qk_norm_over` says whether queries and keys are normalised per head or whole."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig | None = None
    window: int | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormConfig | None = None
    qk_norm_over: Literal["head", "all"] = "head"


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): `heads` heads of `head_dim`, `groups` of B and C."""

    heads: int
    head_dim: int
    state: int
    groups: int
    conv: int
    chunk: int = 64
    conv_bias: bool = True
    proj_bias: bool = False
    norm_eps: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, float("inf"))

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.inner + 2 * self.groups * self.state


@dataclass(frozen=True)
class MLPConfig:
    """A feed-forward layer; `gated` multiplies act(gate(x)) with up(x). `thresholded`: gates of small magnitude are
    set to zero (CATS, `model/transforms/cats.py`)."""

    intermediate: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    thresholded: bool = False


@dataclass(frozen=True)
class MoEConfig:
    """A dropless mixture of gated MLPs; the router is softmax, then top-k, then (optionally) renormalised."""

    experts: int
    top_k: int
    intermediate: int
    activation: str = "silu"
    normalise: bool = True


@dataclass(frozen=True)
class BlockConfig:
    """One block. `wiring` says where the norms stand:

    - "pre":      x += mix(norm1(x));         x += channel(norm2(x))
    - "post":     x += norm1(mix(x));         x += norm2(channel(x))           (OLMo 2)
    - "sandwich": x += norm2(mix(norm1(x)));  x += norm4(channel(norm3(x)))    (Gemma 2 and 3)
    - "parallel": x += mix(norm1(x)) + channel(norm2(x))                       (GPT-NeoX)
    - "after":    x = norm1(x + mix(x));      x = norm2(x + channel(x))        (OPT-350m)

    A block without a channel mixer (Mamba-2) has only the first half. `norm` None means no norms at all.
    mixer_weights and channel_weights: how the linear layers of either part are stored; None: as numbers.
    """

    mixer: AttentionConfig | Mamba2Config
    channel: MLPConfig | MoEConfig | None
    norm: NormConfig = field(default_factory=NormConfig)
    wiring: Literal["pre", "post", "sandwich", "parallel", "after"] = "pre"
    residual_scale: float = 1.0
    mixer_weights: QuantConfig | None = None
    channel_weights: QuantConfig | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what a decoder computes.

    hidden_size is E, vocab_size V. `embed_size` differs from E where the checkpoint projects in and out
    (OPT-350m). `learned_positions` is (rows, offset) of a position table. `max_position` is the longest
    sequence that the checkpoint was made for, in tokens. embedding_weights and head_weights say how the token table
    (the head's too when they are tied) and the output head are stored; None: as numbers. `depth` says which tokens
    run through which layers; None: all through all.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    blocks: tuple[BlockConfig, ...]
    max_position: int
    final_norm: NormConfig | None = field(default_factory=NormConfig)
    tie_embeddings: bool = False
    head_bias: bool = False
    embed_size: int | None = None
    embed_scale: float = 1.0
    learned_positions: tuple[int, int] | None = None
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    embedding_weights: QuantConfig | None = None
    head_weights: QuantConfig | None = None
    depth: Depth | None = None

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def quantised(self) -> bool:
        """True when any weight is stored in few bits."""
        blocks = [block.mixer_weights or block.channel_weights for block in self.blocks]
        return any((*blocks, self.embedding_weights, self.head_weights))

    @property
    def recurrent(self) -> bool:
        """True when any layer keeps a recurrent (FIXED) state."""
        return any(isinstance(block.mixer, Mamba2Config) for block in self.blocks)

    @property
    def attention_heads(self) -> frozenset[tuple[int, int]]:
        """(query heads, KV heads) of each kind of attention layer."""
        mixers = (block.mixer for block in self.blocks)
        return frozenset((m.heads, m.kv_heads) for m in mixers if isinstance(m, AttentionConfig))

    @property
    def expert_counts(self) -> frozenset[int]:
        """The number of experts of each kind of mixture."""
        channels = (block.channel for block in self.blocks)
        return frozenset(channel.experts for channel in channels if isinstance(channel, MoEConfig))


def llama_config(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    head_dim: int | None = None,
    theta: float = 10000.0,
    max_position: int = 2048,
    eps: float = 1e-5,
    tie: bool = False,
) -> ModelConfig:
    """A plain Llama-architecture config from its usual numbers, for `LLM.from_config` and benchmarks."""
    dim = head_dim or hidden // heads
    attention = AttentionConfig(
        heads, kv_heads, dim, dim**-0.5, RopeConfig(theta, dim, max_position=max_position)
    )
    block = BlockConfig(attention, MLPConfig(intermediate), NormConfig("rms", eps))
    return ModelConfig(
        "llama", vocab, hidden, (block,) * layers, max_position, NormConfig("rms", eps), tie_embeddings=tie
    )
