"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): blocks without a channel mixer, and no positions at all."""

from __future__ import annotations

import numpy as np

from ..config import BlockConfig, Mamba2Config, ModelConfig, NormConfig
from . import common
from .common import Weights

IGNORED: tuple[str, ...] = ()

PREFIXES = ("backbone.",)
LONGEST = (
    262144  # nothing in the model counts positions; the longest texts that published models were tried on
)


def config(raw: dict) -> ModelConfig:
    heads, dim = common.need(raw, "num_heads"), common.need(raw, "head_dim")
    inner = int(common.number(raw, "expand", 2) * common.need(raw, "hidden_size"))
    if inner != heads * dim:
        raise ValueError(
            f"expand * hidden_size = {inner}, but num_heads * head_dim = {heads * dim}; correct the config"
        )
    if common.activation(raw) not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act = {raw['hidden_act']!r} is not supported by Mamba-2's mixer: only silu is"
        )
    eps = common.number(raw, "layer_norm_epsilon", 1e-5)
    mixer = Mamba2Config(
        heads=heads,
        head_dim=dim,
        state=common.need(raw, "state_size"),
        groups=common.need(raw, "n_groups"),
        conv=common.need(raw, "conv_kernel"),
        conv_bias=bool(raw.get("use_conv_bias", True)),
        proj_bias=bool(raw.get("use_bias", False)),
        norm_eps=eps,
        time_step_limit=_limits(raw.get("time_step_limit")),
    )
    norm = NormConfig("rms", eps)
    blocks = (BlockConfig(mixer, None, norm),) * common.need(raw, "num_hidden_layers")
    return common.decoder(raw, blocks, norm, tie=False, max_position=LONGEST)


def _limits(given: object) -> tuple[float, float]:
    """Bounds of the time step; infinity is written as a number, or as {"__float__": "Infinity"}."""
    if given is None:
        return 0.0, float("inf")
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise ValueError(
            f"time_step_limit = {given!r} must be two numbers, the least and the largest time step"
        )
    low, high = (float(item["__float__"] if isinstance(item, dict) else item) for item in given)
    return low, high


def weights(config: ModelConfig) -> Weights:
    found: Weights = {
        "embedding.weight": common.source(PREFIXES, "embeddings.weight"),
        "final_norm.weight": common.source(PREFIXES, "norm_f.weight"),
    }
    if not config.tie_embeddings:
        found["lm_head.weight"] = common.source(("lm_head.weight",), "")

    def middle(view: np.ndarray) -> np.ndarray:
        return view[:, 0]  # stored [channels, 1, width]

    for index, block in enumerate(config.blocks):
        mixer, theirs = block.mixer, f"layers.{index}"
        assert isinstance(mixer, Mamba2Config)
        names = {name: name for name in ("A_log", "D", "dt_bias", "norm.weight")}
        names |= {f"{name}.weight": f"{name}.weight" for name in ("in_proj", "out_proj")}
        if mixer.proj_bias:
            names |= {f"{name}.bias": f"{name}.bias" for name in ("in_proj", "out_proj")}
        if mixer.conv_bias:
            names["conv.bias"] = "conv1d.bias"
        for ours, stored in names.items():
            found[f"blocks.{index}.mixer.{ours}"] = common.source(PREFIXES, f"{theirs}.mixer.{stored}")
        filters = common.source(PREFIXES, f"{theirs}.mixer.conv1d.weight", middle)
        found[f"blocks.{index}.mixer.conv.weight"] = filters
        found[f"blocks.{index}.norms.0.weight"] = common.source(PREFIXES, f"{theirs}.norm.weight")
    return found
