"""What compiled programs depend on, as plain data: two processes with equal facts may share them.

Facts are {section: {name: value}}, made of what JSON has. Nothing here looks at weights, only at their shapes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from ..attention.caches.policy import Capacity
from ..model.config import ModelConfig
from ..model.layers import Numerics
from ..sharding.placement import Placement
from .buckets import BucketPlan

if TYPE_CHECKING:
    from .build import Build

Facts = dict[str, dict[str, Any]]

PACKAGE = Path(__file__).resolve().parent.parent
ROOMS = ("attention", "model", "pallas_kernels", "serve", "sharding")
"""The folders whose code programs are made by."""
CPUINFO = Path("/proc/cpuinfo")
OPTIONS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
)  # fmt: skip
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
HARMLESS = ("--xla_force_host_platform_device_count", "--xla_dump")
"""Beginnings of XLA's flags that change no program; how many devices there are is a fact of its own."""
HOST_ONLY = (
    "seed", "strict", "bounds", "policy", "telemetry", "overlap", "controller", "prefix_cache", "compiled",
    "data_parallel_size", "replica",
)  # fmt: skip
"""Settings of `Build` that no program knows of."""
RESOLVED = (
    "max_model_len",
    "max_num_batched_tokens",
    "num_pages",
    "page_size",
    "kv_cache_dtype",
    "decode_context_parallel_size",
    "pool_bytes",
)
"""Settings that are compared by what they came to."""


def digest(parts: Iterable[str | bytes]) -> str:
    """sha256 of parts, each with its length in front."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.hexdigest()


def shapes_digest(tree: Any) -> str:
    """sha256 of the path, shape and dtype of each array (or its spec) of a tree, and how it is split."""

    def lines() -> Iterator[str]:
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            place = getattr(leaf, "sharding", None)
            split = place.spec if isinstance(place, jax.sharding.NamedSharding) else ""
            yield f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {split}"

    return digest(lines())


def source_digest(plugins: Sequence[Any] = ()) -> str:
    """sha256 of the package's source, and of the classes of `plugins` that are not part of it."""

    def parts() -> Iterator[str | bytes]:
        for room in ROOMS:
            for path in sorted((PACKAGE / room).rglob("*.py")):
                yield str(path.relative_to(PACKAGE))
                yield path.read_bytes()
        for kind in sorted({type(one) for one in plugins if one is not None}, key=str):
            if not kind.__module__.startswith(f"{__name__.partition('.')[0]}."):
                yield _source(kind)

    return digest(parts())


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"the source of {kind.__name__} cannot be read, so nobody could tell later whether compiled programs are "
            f"of this version of it; define it in a module, or use the engine without compiled programs"
        ) from error


def cpu_features() -> list[str]:
    """The instruction sets of this host's CPU, as Linux lists them; elsewhere the architecture's name alone."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return sorted(set(value.split()))
    return [platform.machine()]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _flags(name: str) -> str:
    given = os.environ.get(name, "").split()
    return " ".join(sorted(flag for flag in given if not flag.startswith(HARMLESS)))


def environment(devices: Sequence[Any], plugins: Sequence[Any] = ()) -> Facts:
    """Facts of this process, for programs that run on `devices`."""
    kind, features = devices[0].platform, cpu_features()
    versions = {name: _version(name) for name in ("jax", "jaxlib", "flax")}
    return {
        "package": {"version": _version("tokenloom"), "source": source_digest(plugins)},
        "versions": {
            "python": ".".join(platform.python_version_tuple()[:2]), **versions,
            "libtpu": _version("libtpu") if kind == "tpu" else None,
            # A GPU's programs hang on the driver's stack as well; a TPU's is libtpu.
            "runtime": devices[0].client.platform_version if kind == "gpu" else None,
        },
        "host": {
            "machine": platform.machine(), "cpu_features": features, "cpu_features_sha256": digest(features),
        },
        "device": {
            "platform": kind, "kind": devices[0].device_kind, "count": len(devices),
            "ids": [device.id for device in devices],
            "processes": len({device.process_index for device in devices}),
        },
        "options": {name: jax.config.values[name] for name in OPTIONS} | {name: _flags(name) for name in FLAGS},
    }  # fmt: skip


def engine_facts(
    devices: Sequence[Any], config: ModelConfig, numerics: Numerics, build: Build, capacity: Capacity,
    *, length: int, budget: int, place: Placement | None, sampler: Any, params: Any, state: Any,
) -> Facts:  # fmt: skip
    """Facts of an engine on `devices` (also compile-only ones): the process, the model, what the settings came to, and
    the shapes of what it holds."""
    plan = BucketPlan.make(build.max_num_seqs, budget, build.sequence_parallel_size)
    settings = {
        one.name: _plain(getattr(build, one.name))
        for one in fields(build)
        if one.name not in (*HOST_ONLY, *RESOLVED)
    }
    return environment(devices, (build.cache, build.drafter)) | {
        "model": {
            "type": config.model_type, "layers": config.num_layers, "config": digest([repr(config)]),
            "dtype": str(numerics.param_dtype), "computed": str(numerics.dtype),
        },
        "engine": settings | {
            "max_model_len": length, "max_num_batched_tokens": budget, "num_pages": capacity.num_pages,
            "page_size": capacity.page_size, "table_width": capacity.width, "snapshots": capacity.snapshots,
            "kv_cache_dtype": str(capacity.stored), "sampler": repr(sampler),
            "decode_context_parallel_size": 1 if place is None else place.contexts,
        },
        "buckets": {
            "widths": list(plan.widths), "chunks": list(plan.chunks), "prompt_rows": plan.prompt_rows,
        },
        "mesh": {} if place is None else {str(name): size for name, size in place.mesh.shape.items()},
        "arrays": {"weights": shapes_digest(params), "state": shapes_digest(state)},
    }  # fmt: skip


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def differences(theirs: Facts, ours: Facts) -> list[str]:
    """A line for each fact that differs, the artefact's value first. A CPU must have every feature that the artefact's
    host had; more do no harm, and beside other devices they do not matter."""
    found = []
    for section in sorted({*theirs, *ours}, key=list({**ours, **theirs}).index):
        left, right = theirs.get(section, {}), ours.get(section, {})
        if section == "host":
            found += _host(left, right, ours["device"]["platform"])
        # Where settings differ, shapes do, and say nothing more.
        if section == "host" or (section == "arrays" and found):
            continue
        for name in dict.fromkeys((*left, *right)):
            if (has := left.get(name)) != (is_here := right.get(name)):
                found.append(
                    f"{section}.{name}: the artefact has {_shown(has)}, this process {_shown(is_here)}"
                )
    return found


def _host(left: dict[str, Any], right: dict[str, Any], kind: str) -> list[str]:
    if kind != "cpu":
        return []
    if left.get("machine") != right["machine"]:
        return [f"host.machine: the artefact has {left.get('machine')}, this process {right['machine']}"]
    missing = sorted({*left.get("cpu_features", ())} - {*right["cpu_features"]})
    if not missing:
        return []
    return [f"host.cpu_features: the artefact's CPU has {', '.join(missing)}, this one does not"]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"
