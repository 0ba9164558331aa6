"""What families share: where a weight comes from, and how both generations of config keys are read.

A family is a module named by the checkpoint's `model_type` that exports three things (`families.Family`):

- `config(raw) -> ModelConfig`: the facts of a `config.json` (a dict)
- `weights(config) -> Weights`: for each of our parameters, by its dotted path in the decoder
  ("blocks.0.mixer.q.weight"), where the checkpoint keeps it
- `IGNORED`: regular expressions of stored names that the decoder never needs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig
from ..layers import ACTIVATIONS


@dataclass(frozen=True)
class Source:
    """One stored tensor, whole or in `part`.

    `part` gets a read-only view of the file and must return a view (a slice, a transpose, a reshape that needs
    no copy), so that nothing is read before it is needed.
    """

    name: str
    part: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Stack:
    """Several stored tensors stacked along a new leading axis (experts)."""

    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Either:
    """Layouts that differ between writers of the same family: the first whose tensors are all there counts."""

    options: tuple[Source | Stack, ...]


Weights = dict[str, Source | Stack | Either]


def source(
    prefixes: Sequence[str], name: str, part: Callable[[np.ndarray], np.ndarray] | None = None
) -> Source | Either:
    """The tensor `name` under one of `prefixes`: a Source, or Either of them in that order."""
    options = tuple(Source(prefix + name, part) for prefix in prefixes)
    return options[0] if len(options) == 1 else Either(options)


def rows(name: str, start: int, stop: int) -> Source:
    """Rows start..stop of a stored tensor that fuses several."""
    return Source(name, lambda view: view[start:stop])


def need(raw: dict, name: str) -> int:
    """A whole number that a config cannot do without."""
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(
            f"config.json of model_type {raw.get('model_type')!r} gives {name} = {value!r}, but a whole number is "
            "needed; complete the file from the checkpoint's publisher"
        )
    return value


def number(raw: dict, name: str, default: float) -> float:
    """A number that may be missing or null."""
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, (int, float)):
        raise ValueError(f"config.json gives {name} = {value!r}, but a number is needed")
    return float(value)


def optional(raw: dict, name: str, default: float | None) -> float | None:
    """A number that null switches off; `default` where the key is missing."""
    return default if name not in raw else None if raw[name] is None else number(raw, name, 0.0)


def refuse(raw: dict, name: str, why: str) -> None:
    """A switch that we do not implement must be off."""
    if raw.get(name):
        raise ValueError(f"config.json sets {name} = {raw[name]!r}, which is not supported: {why}")


def heads(raw: dict, default_dim: int | None = None) -> tuple[int, int, int]:
    """(query heads, KV heads, head dim), with the defaults of configs that leave the latter two out."""
    query = need(raw, "num_attention_heads")
    kv = query if raw.get("num_key_value_heads") is None else need(raw, "num_key_value_heads")
    dim = default_dim or need(raw, "hidden_size") // query
    dim = dim if raw.get("head_dim") is None else need(raw, "head_dim")
    if query % kv:
        raise ValueError(
            f"num_attention_heads = {query} is not a multiple of num_key_value_heads = {kv}; correct the config"
        )
    return query, kv, dim


def activation(raw: dict, key: str = "hidden_act", default: str = "silu") -> str:
    """The name of the feed-forward's activation, refused when we do not have it."""
    name = raw.get(key) or default
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {key} = {name!r} is not known; known: {', '.join(ACTIVATIONS)}")
    return name


def dtype(raw: dict) -> str:
    """The dtype that the checkpoint was saved in: `dtype`, or `torch_dtype` in older files."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    return str(name).removeprefix("torch.")


def token_ids(value: object) -> tuple[int, ...]:
    """`eos_token_id` is a number, a list of them, or null."""
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    ids = tuple(item for item in values if isinstance(item, int))
    if len(ids) < len(values):
        raise ValueError(f"a token id is a whole number or a list of them; got {value!r}")
    return ids


ROPE_RENAMED = {"default": None, "su": "longrope"}


def rope(
    raw: dict,
    head_dim: int,
    *,
    layer_type: str | None = None,
    theta: float = 10000.0,
    max_position: int = 2048,
    partial: float = 1.0,
    renamed: Mapping[str, str] | None = None,
) -> RopeConfig:
    """Rotary positions from either generation of keys; `theta`, `max_position` and `partial` are defaults.

    `renamed` maps a family's own names of scalings to ours.

    New files keep all in `rope_parameters`, flat or one dict a layer type (then `layer_type` picks one); older
    files have `rope_theta`, `partial_rotary_factor` and `rope_scaling` (with `type` or `rope_type`).
    """
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if layer_type is not None and isinstance(given.get(layer_type), dict):
        given = given[layer_type]
    facts = {name: value for name, value in given.items() if value is not None}
    limit = int(number(raw, "max_position_embeddings", max_position))
    base = number(facts, "rope_theta", number(raw, "rope_theta", theta))
    share = number(facts, "partial_rotary_factor", number(raw, "partial_rotary_factor", partial))
    kind = facts.get("rope_type") or facts.get("type") or "default"
    scaling = {**ROPE_RENAMED, **(renamed or {})}.get(kind, kind)
    dim = int(head_dim * share)
    if scaling is None:
        return RopeConfig(base, dim, max_position=limit)
    left_out = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}
    if raw.get("original_max_position_embeddings") is not None:
        facts["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    if scaling == "dynamic":
        left_out.add("original_max_position_embeddings")  # its base grows from max_position_embeddings
    kept = {n: tuple(v) if isinstance(v, list) else v for n, v in facts.items() if n not in left_out}
    return RopeConfig(base, dim, scaling, tuple(sorted(kept.items())), limit)


def sliding_layers(raw: dict, default: Callable[[int], bool]) -> tuple[bool, ...]:
    """For each layer, whether it has a sliding window: `layer_types` where given, else `default(index)`."""
    layers, given = need(raw, "num_hidden_layers"), raw.get("layer_types")
    if given is None:
        return tuple(default(index) for index in range(layers))
    known = ("sliding_attention", "full_attention")
    if len(given) != layers or any(kind not in known for kind in given):
        raise ValueError(f"layer_types = {given} must name one of {known} for each of {layers} layers")
    return tuple(kind == "sliding_attention" for kind in given)


def upper_windows(raw: dict) -> tuple[int | None, ...]:
    """The window of each layer where `use_sliding_window` gives one to layers from `max_window_layers` on."""
    size = window(raw, 4096) if raw.get("use_sliding_window") else None
    first = int(number(raw, "max_window_layers", 28))
    return tuple(size if sliding else None for sliding in sliding_layers(raw, lambda index: index >= first))


def window(raw: dict, default: int | None = None) -> int | None:
    """`sliding_window` in tokens, or None where the key is null."""
    value = raw.get("sliding_window", default)
    return None if value is None else need({**raw, "sliding_window": value}, "sliding_window")


def mlp(raw: dict, act: str, *, bias: bool = False) -> MLPConfig:
    """The gated feed-forward that nearly all families have."""
    return MLPConfig(need(raw, "intermediate_size"), act, gated=True, bias=bias)


def decoder(
    raw: dict, blocks: tuple, norm: NormConfig, *, tie: bool = False, max_position: int = 2048, **more
) -> ModelConfig:
    """The rest of a ModelConfig; `tie` and `max_position` are the defaults of the family."""
    tied = raw.get("tie_word_embeddings")
    return ModelConfig(
        model_type=str(raw.get("model_type")),
        vocab_size=need(raw, "vocab_size"),
        hidden_size=need(raw, "hidden_size"),
        blocks=blocks,
        max_position=int(number(raw, "max_position_embeddings", max_position)),
        final_norm=norm,
        tie_embeddings=tie if tied is None else bool(tied),
        bos_token_id=next(iter(token_ids(raw.get("bos_token_id"))), None),
        eos_token_ids=token_ids(raw.get("eos_token_id")),
        dtype=dtype(raw),
        **more,
    )


PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
SANDWICH_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def llama_weights(
    config: ModelConfig,
    *,
    prefixes: Sequence[str] = ("model.",),
    heads: Sequence[str] = ("lm_head.weight",),
    norms: Sequence[str] = PRE_NORMS,
) -> Weights:
    """The layout that Llama set and most families kept; what exists follows from the config.

    `prefixes` are the spellings of the decoder's prefix, `heads` those of the output head, `norms` the names of
    a block's norms in the order of its wiring.
    """
    found: Weights = {
        "embedding.weight": source(prefixes, "embed_tokens.weight"),
        "final_norm.weight": source(prefixes, "norm.weight"),
    }
    if not config.tie_embeddings:
        found["lm_head.weight"] = source(heads, "")
    for index, block in enumerate(config.blocks):
        ours, theirs = f"blocks.{index}", f"layers.{index}"
        for place, name in enumerate(norms):
            found[f"{ours}.norms.{place}.weight"] = source(prefixes, f"{theirs}.{name}.weight")
        if isinstance(block.mixer, AttentionConfig):
            found |= attention_weights(block.mixer, prefixes, f"{ours}.mixer", f"{theirs}.self_attn")
        if isinstance(block.channel, MLPConfig):
            for name in ("gate", "up", "down"):
                for kind in ("weight", "bias") if block.channel.bias else ("weight",):
                    stored = f"{theirs}.mlp.{name}_proj.{kind}"
                    found[f"{ours}.channel.{name}.{kind}"] = source(prefixes, stored)
    return found


def attention_weights(config: AttentionConfig, prefixes: Sequence[str], ours: str, theirs: str) -> Weights:
    """The separate projections q, k, v and o, their biases, and query-key norms where the config has them."""
    found: Weights = {}
    for name in "qkvo":
        bias = config.out_bias if name == "o" else config.qkv_bias
        for kind in ("weight", "bias") if bias else ("weight",):
            found[f"{ours}.{name}.{kind}"] = source(prefixes, f"{theirs}.{name}_proj.{kind}")
    for name in "qk" if config.qk_norm is not None else "":
        found[f"{ours}.{name}_norm.weight"] = source(prefixes, f"{theirs}.{name}_norm.weight")
    return found
