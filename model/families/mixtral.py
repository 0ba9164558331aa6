"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral with 8 experts in place of the feed-forward."""

from __future__ import annotations

from ..config import AttentionConfig, BlockConfig, ModelConfig, MoEConfig, NormConfig
from . import common
from .common import Either, Source, Stack, Weights

IGNORED: tuple[str, ...] = ()

ROOMS = ("block_sparse_moe", "mlp")


def config(raw: dict) -> ModelConfig:
    query, kv, dim = common.heads(raw)
    rope = common.rope(raw, dim, theta=1e6, max_position=131072)
    attention = AttentionConfig(query, kv, dim, dim**-0.5, rope, window=common.window(raw))
    channel = MoEConfig(
        experts=common.need(raw, "num_local_experts"),
        top_k=common.need(raw, "num_experts_per_tok"),
        intermediate=common.need(raw, "intermediate_size"),
        activation=common.activation(raw),
    )
    norm = NormConfig("rms", common.number(raw, "rms_norm_eps", 1e-5))
    blocks = (BlockConfig(attention, channel, norm),) * common.need(raw, "num_hidden_layers")
    return common.decoder(raw, blocks, norm, tie=False, max_position=131072)


def weights(config: ModelConfig) -> Weights:
    return common.llama_weights(config) | expert_weights(config, ROOMS, ("w1", "w3", "w2"))


def expert_weights(config: ModelConfig, rooms: tuple[str, ...], names: tuple[str, str, str]) -> Weights:
    """The routers and experts of a decoder's sparse layers, stored under any of `rooms`.

    The experts' gate, up and down (`names`) are tensors of their own, or all fused into two, as some writers
    of transformers 5 do: experts.gate_up_proj [X, 2*I, E] and experts.down_proj [X, E, I].
    """
    found: Weights = {}
    for index, block in enumerate(config.blocks):
        if not isinstance(block.channel, MoEConfig):
            continue
        ours, size = f"blocks.{index}.channel", block.channel.intermediate
        prefixes = tuple(f"model.layers.{index}.{room}." for room in rooms)
        found[f"{ours}.router.weight"] = common.source(prefixes, "gate.weight")
        fused = {
            "gate": ("experts.gate_up_proj", lambda view, size=size: view[:, :size]),
            "up": ("experts.gate_up_proj", lambda view, size=size: view[:, size:]),
            "down": ("experts.down_proj", None),
        }
        for name, stored in zip(fused, names):
            apart = tuple(_stack(prefix, stored, block.channel.experts) for prefix in prefixes)
            together = tuple(Source(prefix + fused[name][0], fused[name][1]) for prefix in prefixes)
            found[f"{ours}.{name}"] = Either((*apart, *together))
    return found


def _stack(prefix: str, stored: str, experts: int) -> Stack:
    return Stack(tuple(Source(f"{prefix}experts.{expert}.{stored}.weight") for expert in range(experts)))
