"""Small models that the law suites share: one of each kind of block."""

from dataclasses import replace

from tokenloom.model.config import (
    AttentionConfig,
    BlockConfig,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    llama_config,
)

VOCAB = 300
LENGTH = 192


def llama() -> ModelConfig:
    return llama_config(
        layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocab=VOCAB, max_position=LENGTH
    )


def windowed() -> ModelConfig:
    """Alternating windows and full layers, soft caps, sandwich norms, a tied head: Gemma 2's facts."""
    full = AttentionConfig(4, 1, 16, 0.2, RopeConfig(10000.0, 16), softcap=20.0)
    mlp, norm = MLPConfig(96, "gelu_pytorch_tanh"), NormConfig("rms", 1e-6, 1.0)
    blocks = tuple(
        BlockConfig(replace(full, window=window), mlp, norm, "sandwich") for window in (24, None, 24, None)
    )
    return ModelConfig(
        "gemma2",
        VOCAB,
        48,
        blocks,
        LENGTH,
        norm,
        tie_embeddings=True,
        embed_scale=48**0.5,
        logit_softcap=10.0,
    )


def experts() -> ModelConfig:
    config = llama()
    block = replace(config.blocks[0], channel=MoEConfig(6, 2, 64))
    return replace(config, model_type="mixtral", blocks=(block,) * 2)


def recurrent() -> ModelConfig:
    mixer = Mamba2Config(heads=4, head_dim=16, state=16, groups=2, conv=4)
    return ModelConfig("mamba2", VOCAB, 32, (BlockConfig(mixer, None),) * 2, LENGTH, tie_embeddings=True)


def hybrid() -> ModelConfig:
    """Recurrent and attention layers in one model: both kinds of state in one batch."""
    attention, mamba = llama(), recurrent()
    blocks = (replace(mamba.blocks[0], channel=MLPConfig(64)), attention.blocks[0])
    return replace(attention, model_type="hybrid", blocks=blocks)


ALL = {shape.__name__: shape for shape in (llama, windowed, experts, recurrent, hybrid)}
