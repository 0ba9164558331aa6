"""What an engine is, in words and numbers: of one that runs, and of a checkpoint without loading it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ..attention.caches.policy import CachePolicy
from ..model import checkpoint
from ..model.config import ModelConfig
from ..model.state import Capacity, page_bytes, state_bytes, state_spec
from ..model.transforms.quantisation import parameter_count
from .buckets import BucketPlan
from .build import Build, choose_length, choose_numerics, choose_pages, choose_snapshots
from .engine import Engine


def show(name: str, config: ModelConfig, cache: CachePolicy, engines: Sequence[Engine]) -> str:
    """One line about an LLM that runs: sizes are those of each of its replicas."""
    engine = engines[0]
    weights, pages = jax.tree.leaves(engine.programs.params), engine.pages
    size = sum(leaf.nbytes for leaf in weights) / 1e6
    pool = f"{pages.num_pages - 1} pages of {pages.page_size} tokens"
    found = f"off ({pages.off})"
    if pages.sharing:
        hits = sum(one.pages.hit_tokens for one in engines)
        looked = sum(one.pages.lookup_tokens for one in engines)
        found = f"on ({hits} of {looked} prompt tokens hit)"
    without = cache.abilities.turned_off
    kind = f"{cache!r}, without {without}; " if without else ""
    replicas = f"{len(engines)} replicas, each " if len(engines) > 1 else ""
    return (
        f"LLM({name!r}: {replicas}{config.model_type}, {parameter_count(config) / 1e6:.1f}M parameters, {size:.0f} MB "
        f"{weights[0].dtype} on {weights[0].device}; max_model_len {engine.max_model_len}; "
        f"{kind}{pool if engine.programs.width else 'no pages'}; prefix cache {found}; {engine.programs.plan})"
    )


def describe(
    folder: Path,
    *,
    max_model_len: int | None = None,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 512,
) -> dict[str, Any]:
    """What an engine on this checkpoint would be, from its config alone: nothing is loaded or compiled."""
    config = checkpoint.load_config(folder)[1]
    numerics = choose_numerics(None, config.dtype)
    build = Build(max_model_len, max_num_seqs, max_num_batched_tokens)
    length = choose_length(config, max_model_len)
    num_pages, page_size = choose_pages(config, build, length, numerics.dtype)
    leaves = jax.tree.leaves(checkpoint.abstract(config, numerics)[1])
    snapshots = choose_snapshots(config, build, numerics.dtype)
    capacity = Capacity(num_pages, page_size, max_num_seqs, numerics.dtype, snapshots=snapshots)
    plan = BucketPlan.make(max_num_seqs, max(max_num_batched_tokens, max_num_seqs + 1))
    return {
        "family": config.model_type,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "parameters": sum(leaf.size for leaf in leaves),
        "stored_dtype": config.dtype,
        "runs_as": f"{numerics.param_dtype} weights, {numerics.dtype} activations",
        "weight_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "state_bytes": state_bytes(state_spec(config, capacity)),
        "kv_bytes_per_token": page_bytes(config, 1, numerics.dtype),
        "pages": f"{num_pages - 1} of {page_size} tokens"
        if page_bytes(config, 1, numerics.dtype)
        else "none",
        "max_model_len": length,
        "max_num_seqs": max_num_seqs,
        "bucket_plan": str(plan),
    }
