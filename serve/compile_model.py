"""An engine's programs written to a folder, for the device at hand or for TPUs that are not here."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from ..attention.backends import backends, named
from ..attention.caches.paged import Pages
from ..attention.caches.policy import Capacity
from ..model.config import ModelConfig
from ..model.state import make_state, snapshot_bytes
from ..sharding.division import Division
from ..sharding.topology import Topology
from .build import Build, build_engine, open_model, open_tokenizer
from .compiled import check_new, start_job, write
from .fingerprint import engine_facts
from .planner import models
from .planner.compiled import PlannedPrograms, PlannedSampler
from .planner.memory import Case


def compile_model(
    model: str | Path | ModelConfig | dict[str, Any], folder: str | Path, *, dtype: str | None = None,
    progress: bool = False, **settings: Any,
) -> Path:  # fmt: skip
    """Write the programs of `LLM(model, dtype=dtype, **settings)` to a new folder, for `LLM(..., compiled=folder)`.

    settings: those of `Build`. ValueError when the folder exists, or where such an engine cannot be.
    """
    check_new(folder)
    build = Build(**settings)
    opened = open_model(model, dtype, build)
    tokenizer = open_tokenizer(None, opened.folder)
    _, engine = build_engine(opened.config, opened.numerics, opened.params, tokenizer, build)
    try:
        return engine.programs.save(folder, progress)
    finally:
        engine.programs.close()


def compile_for(
    model: str | Path | ModelConfig | dict[str, Any], topology: str, folder: str | Path, *, dtype: str | None = None,
    progress: bool = False, **settings: Any,
) -> Path:  # fmt: skip
    """The same for a slice of TPUs that is not here ("v5e:2x4"), compiled by libtpu. The model: as `tokenloom.plan`
    takes it, since no weights are needed. On the TPU the engine must have the manifest's num_pages and max_model_len.

    ValueError as `compile_model`, and where the slice has fewer devices, or no room.
    """
    check_new(folder)
    where, build = Topology.parse(topology), Build(**settings)
    tensor, texts, size = build.tensor_parallel_size, build.sequence_parallel_size, build.devices
    if size > where.devices:
        asked = f"tensor_parallel_size={tensor}"
        asked += f" times sequence_parallel_size={texts} is {size}" if texts > 1 else ""
        raise ValueError(f"{asked}, but {where} has {where.devices} devices; lower it")
    division = Division(1, tensor, build.enable_expert_parallel, texts)
    case = Case.of(models.find(model)[1], where, division, build, dtype)
    if build.num_pages is None and not case.fits:
        raise ValueError(
            f"{case.seats} sequences of {case.length} tokens do not fit on {size} devices of {where}; lower "
            f"max_num_seqs or max_model_len, or name num_pages"
        )
    devices = where.compile_only()[:size]
    there = replace(case, devices=tuple(devices))
    return _write_planned(there, devices, build.num_pages or case.pages, folder, progress)


def _write_planned(case: Case, devices: list[Any], pages: int, folder: str | Path, progress: bool) -> Path:
    """The programs of an engine that is not built, as `build_engine` would have them on these devices."""
    build, config, chip = case.build, case.config, case.topology.device.chip
    one = SingleDeviceSharding(devices[0])
    place = None if len(devices) == 1 else case.place
    kernels = backends(chip) if build.attention_backend is None else named(build.attention_backend, chip)
    copies = 2 * case.seats if snapshot_bytes(config, case.numerics.dtype) else 0
    capacity = Capacity(
        pages, case.page_size, case.seats, case.numerics.dtype, kernels if place is None else place.backends(kernels),
        copies, case.kv_dtype, case.width,
    )  # fmt: skip
    cache = Pages() if place is None else place.cache(Pages())
    empty = partial(make_state, config, capacity, case.period, cache)
    spec, weights = jax.eval_shape(empty), case.params
    homes = jax.tree.map(lambda _: one, spec) if place is None else place.state(spec)
    put = jax.tree.map(lambda _: one, weights) if place is None else place.params(case.graphdef, weights)
    sampler = PlannedSampler(config.vocab_size, case.seats, case.sampler.processors)
    programs = PlannedPrograms(
        case.graphdef, _placed(weights, put), _placed(spec, homes), sampler, case.buckets,
        page_size=case.page_size, width=case.width, period=case.period,
        whole=None if place is None else place.whole, tokens=case.step_tokens,
    )  # fmt: skip
    whole = one if place is None else place.whole
    programs.sampler_state = sampler.start(programs.compiler, whole)
    jobs = {"state": start_job("state", empty, homes), "sampler": start_job("sampler", sampler.init, whole)}
    facts = engine_facts(
        devices, config, case.numerics, build, capacity, length=case.length,
        budget=case.buckets.chunks[-1], place=place, sampler=case.sampler,
        params=programs.params, state=spec,
    )  # fmt: skip
    facts["device"]["processes"] = (
        case.topology.hosts
    )  # libtpu describes hosts of four chips, where there are larger
    return write(folder, facts, jobs | programs._jobs(), progress)


def _placed(specs: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, home: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home), specs, shardings
    )
