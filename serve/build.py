"""From settings to an engine: numerics, sizes of the page pool, programs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..attention.backends import backends, named
from ..attention.caches.paged import QUANTISED, Pages
from ..attention.caches.policy import CachePolicy
from ..attention.forms import FORMS, Form
from ..attention.ops import Backend
from ..model import checkpoint
from ..model.config import AttentionConfig, ModelConfig
from ..model.layers import Numerics
from ..model.matmul import try_forms
from ..model.stacked import lay_out
from ..model.state import Capacity, make_state, page_bytes, snapshot_bytes
from ..pallas_kernels.attention.tuned import tiles_folder
from ..pallas_kernels.chips import Chip
from ..sharding.placement import Placement, put
from ..sharding.tokens import check_overlap, step_tokens
from .bounds import Bounds
from .buckets import BucketPlan
from .cache_rules import check_model, check_settings, hold, no_prefix_cache
from .compiled import Artefact, Compiler, specs
from .context_rules import check_context_parallel, keeps_copies
from .depth_rules import check_depth
from .drafters.controller import Controller
from .drafters.draft import Drafter, Target
from .drafters.speculation import Speculation, check_drafter
from .engine import Engine
from .expert_rules import check_expert_parallel, with_experts
from .fingerprint import engine_facts
from .pages import PageAllocator
from .policies.policy import Policy
from .programs import Programs
from .sampling.sampler import CONSTRAINED, DEFAULT, Sampler
from .snapshots import Snapshots
from .telemetry.engine import MeasuredEngine
from .telemetry.recorder import Telemetry
from .tokenizer import Tokenizer

KV_DTYPES = {
    "float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "int8": "int8", "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
# Without a figure from the device: the KV pool takes at most this much unless num_pages says otherwise.
DEFAULT_POOL_BYTES = 2 << 30
# Prefix cache of models without pages: tokens a block, and blocks to remember.
RECURRENT_BLOCK, REMEMBERED_BLOCKS = 64, 1 << 16


@dataclass(frozen=True)
class Build:
    """The settings of an engine; None means chosen from the model and the device. pool_bytes: what the KV pool of a
    device may take, where several processes have agreed on it. replica: which of `data_parallel_size` it is."""

    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 512
    num_pages: int | None = None
    page_size: int | None = None
    seed: int = 0
    strict: bool = False
    bounds: Bounds = Bounds()
    prefix_cache: bool | None = None
    policy: Policy | None = None
    telemetry: Telemetry | None = None
    compiled: str | Path | None = None
    overlap: bool | None = None
    attention_backend: str | None = None
    kv_cache_dtype: str | None = None
    tensor_parallel_size: int = 1
    sequence_parallel_size: int = 1
    sequence_parallel_form: Form | None = None
    decode_context_parallel_size: int | None = None
    enable_expert_parallel: bool = False
    overlap_tokens: int | None = None
    cache: CachePolicy = Pages()
    drafter: Drafter | None = None
    controller: Controller | None = None
    pool_bytes: int | None = None
    data_parallel_size: int = 1
    replica: int = 0

    def __post_init__(self) -> None:
        sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_pages", "page_size")
        split = ("tensor_parallel_size", "sequence_parallel_size", "data_parallel_size")
        for name in (*sizes, *split, "decode_context_parallel_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if self.kv_cache_dtype is not None and self.kv_cache_dtype not in KV_DTYPES:
            known = ", ".join(KV_DTYPES)
            raise ValueError(
                f"kv_cache_dtype {self.kv_cache_dtype!r} is not known; choose one of {known}, or None"
            )
        if self.compiled is not None:
            Artefact.of(self.compiled)  # a folder that is none is refused before weights are read
        quantised = KV_DTYPES.get(self.kv_cache_dtype or "") in QUANTISED
        check_settings(
            self.cache, quantised=self.kv_cache_dtype if quantised else None, page_size=self.page_size,
            devices=self.tensor_parallel_size, parts=self.sequence_parallel_size,
        )  # fmt: skip
        check_context_parallel(
            self.decode_context_parallel_size, tensor=self.tensor_parallel_size, sequence=self.sequence_parallel_size,
            page_size=self.page_size,
        )  # fmt: skip
        check_expert_parallel(self.enable_expert_parallel, self.tensor_parallel_size)
        check_overlap(self.overlap_tokens, self.tensor_parallel_size, self.sequence_parallel_size)
        form = self.sequence_parallel_form
        if form is not None and (form not in FORMS or self.sequence_parallel_size == 1):
            raise ValueError(
                f"sequence_parallel_form={form!r} with sequence_parallel_size={self.sequence_parallel_size}: choose "
                f"one of {', '.join(FORMS)}, or None, with at least 2 devices"
            )

    def kv_dtype(self, computed: jnp.dtype) -> jnp.dtype:
        """How keys and values are stored, where activations are `computed` in."""
        return computed if self.kv_cache_dtype is None else jnp.dtype(KV_DTYPES[self.kv_cache_dtype])

    def backends(self, place: Placement | None = None) -> tuple[Backend, ...]:
        """Attention back ends for the default device or those of `place`, in the order in which they are tried."""
        chip = Chip.of(self.device)
        named_one = self.attention_backend
        found = backends(chip, tiles_folder()) if named_one is None else named(named_one, chip)
        return found if place is None else place.backends(found)

    def placement(self, config: ModelConfig) -> Placement | None:
        """Where the model lives; None: on the default device. ValueError where it does not split."""
        tensor, sequence = self.tensor_parallel_size, self.sequence_parallel_size
        experts = config.expert_counts if self.enable_expert_parallel else None
        if self.devices == 1:
            return None
        first, heads = self.replica * self.devices, config.attention_heads
        copies = keeps_copies(
            self.decode_context_parallel_size, heads, tensor=tensor, sequence=sequence, page_size=self.page_size,
            cache=self.cache,
        )  # fmt: skip
        return Placement.here(tensor, sequence, heads, experts, first, copies)

    @property
    def devices(self) -> int:
        """Over how many devices the model is split."""
        return self.tensor_parallel_size * self.sequence_parallel_size

    @property
    def device(self) -> Any:
        """The first of its devices in this process."""
        return jax.local_devices()[self.replica * self.devices]

    def whole(self, place: Placement | None) -> jax.sharding.Sharding | None:
        """Where all lies that is not split; None: on the default device."""
        if place is not None:
            return place.whole
        return jax.sharding.SingleDeviceSharding(self.device) if self.replica else None

    def shardings(self, config: ModelConfig, numerics: Numerics) -> Any:
        """The sharding of each parameter of the checkpoint; None: the default device."""
        place = self.placement(config)
        return None if place is None else place.params(*checkpoint.abstract(config, numerics))


@dataclass(frozen=True)
class Opened:
    """A model's weights on their devices; no folder: drawn at random."""

    name: str
    folder: Path | None
    config: ModelConfig
    numerics: Numerics
    params: Any


def open_model(model: str | Path | ModelConfig | dict[str, Any], dtype: str | None, build: Build) -> Opened:
    """Load a checkpoint, or draw the weights of a config from `build.seed`."""
    if isinstance(model, ModelConfig | dict):
        config = model if isinstance(model, ModelConfig) else checkpoint.read_config(model)
        numerics = choose_numerics(dtype, config.dtype)
        drawn = checkpoint.random_params(config, numerics, build.seed)
        params = put(drawn, build.shardings(config, numerics))
        return Opened(f"{config.model_type} (random)", None, config, numerics, params)
    folder = checkpoint.resolve(model)
    config = checkpoint.load_config(folder)[1]
    numerics = choose_numerics(dtype, config.dtype)
    params = checkpoint.load(folder, config, numerics, build.shardings(config, numerics))
    return Opened(str(model), folder, config, numerics, params)


def open_tokenizer(given: Tokenizer | str | Path | None, folder: Path | None) -> Tokenizer | None:
    """The tokenizer that was given, or the checkpoint's own."""
    if isinstance(given, Tokenizer):
        return given
    source = folder if given is None else checkpoint.resolve(given)
    return None if source is None else Tokenizer.load(source)


def choose_numerics(dtype: str | None, stored: str, platform: str | None = None) -> Numerics:
    """Parameter and compute dtypes for a target platform ("cpu", "tpu", "gpu"; None: the default device's).

    The CPU computes in float32 whatever is stored (its bfloat16 matmuls are an order of magnitude slower).
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}, or None")
    platform = platform or jax.devices()[0].platform
    if platform == "cpu":
        return Numerics(jnp.dtype(dtype or "float32"), jnp.dtype("float32"), platform="cpu")
    chosen = jnp.dtype(dtype or stored)
    return Numerics(chosen, chosen, platform=platform)


def with_length(config: ModelConfig, length: int) -> ModelConfig:
    """Tell the rope scalings that depend on it how long sequences may become."""

    def block(one):
        mixer = one.mixer
        if not isinstance(mixer, AttentionConfig) or mixer.rope is None:
            return one
        return replace(one, mixer=replace(mixer, rope=replace(mixer.rope, length=length)))

    return replace(config, blocks=tuple(block(one) for one in config.blocks))


def choose_length(config: ModelConfig, asked: int | None, cache: CachePolicy = Pages()) -> int:
    """max_model_len: what was asked, within what the checkpoint can do with this cache."""
    longest = config.max_position
    for block in config.blocks:
        rope = block.mixer.rope if isinstance(block.mixer, AttentionConfig) else None
        if rope is not None and rope.scaling == "dynamic":
            longest = max(longest, int(config.max_position * float(dict(rope.parameters)["factor"])))  # type: ignore[arg-type]
    if asked is not None and cache.longest(asked) > longest:
        spans = "" if cache.longest(asked) == asked else f" (of which {cache!r} needs {cache.longest(asked)})"
        raise ValueError(
            f"max_model_len={asked}{spans} exceeds the {longest} positions that this checkpoint was made for; lower "
            f"it, or use a checkpoint (or a rope scaling in its config.json) made for longer texts"
        )
    return asked or config.max_position


def choose_pages(config: ModelConfig, build: Build, length: int, dtype: jnp.dtype) -> tuple[int, int]:
    """(num_pages, page_size): room for every seat at full length, unless that is too much memory.

    A model without pages gets numbers without memory behind them: the prefix cache counts its text in blocks.
    """
    place = build.placement(config)
    parts, shards = (1, 1) if place is None else (place.page_parts, place.kv_shards)
    size = build.page_size or build.cache.page_size or usual_page_size(length, parts)
    bytes_a_page = page_bytes(config, size, dtype, build.cache)
    if bytes_a_page == 0:
        block = build.page_size or RECURRENT_BLOCK
        return build.max_num_seqs * -(-length // block) + 1 + REMEMBERED_BLOCKS, block
    wanted = build.max_num_seqs * -(-length // size) + 1
    if build.num_pages is not None:
        if build.num_pages < 2:
            raise ValueError(f"num_pages={build.num_pages} must be at least 2: page 0 is never used")
        return build.num_pages, size
    room = build.pool_bytes or pool_bytes(build.device)
    return max(2, min(wanted, room * shards // bytes_a_page)), size


def usual_page_size(length: int, parts: int = 1) -> int:
    """Tokens a page for sequences of up to `length` tokens. A page that `parts` devices share is short enough for
    texts of full length, from 512 tokens a device on, to be shared within 1/32."""
    return min(128, max(16, length)) if parts == 1 else parts * min(128, max(16, length // (32 * parts)))


def choose_snapshots(config: ModelConfig, build: Build, dtype: jnp.dtype) -> int:
    """How many copies of a sequence's recurrent state the prefix cache may keep: two a seat, in at most a quarter
    of what the KV pool may take."""
    size = snapshot_bytes(config, dtype)
    if size == 0 or build.prefix_cache is False or not build.cache.abilities.may_share_prefix:
        return 0
    return min(2 * build.max_num_seqs, (build.pool_bytes or pool_bytes(build.device)) // (4 * size))


def pool_bytes(device: Any = None) -> int:
    """Bytes that the KV pool may take on a device of this process; None: its first."""
    device = jax.local_devices()[0] if device is None else device
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return DEFAULT_POOL_BYTES
    return spare_bytes(stats["bytes_limit"], stats["bytes_in_use"])


def spare_bytes(limit: int, used: int) -> int:
    """What an engine gives its pool on a device with `limit` bytes, `used` of them: a tenth and 1 GiB stay free."""
    return max(DEFAULT_POOL_BYTES // 8, int(0.9 * limit) - used - (1 << 30))


def use_compilation_cache() -> None:
    """Keep compiled programs on disk unless the user configured JAX's cache already."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "tokenloom" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def allocator(
    config: ModelConfig, build: Build, cache: CachePolicy, capacity: Capacity, length: int
) -> PageAllocator:
    """Who owns which page, and whether contents are shared; ValueError where that was asked for and cannot be."""
    size, snapshots = capacity.page_size, capacity.snapshots
    off = check_depth(config, cache, build.drafter, build.prefix_cache) or no_prefix_cache(
        cache, build.prefix_cache, length=length, page_size=size, recurrent=config.recurrent, snapshots=snapshots,
    )  # fmt: skip
    copies = Snapshots(snapshots, size) if snapshots and off is None else None
    return PageAllocator(capacity.num_pages, size, off=off, snapshots=copies, hold=hold(cache.abilities))


def build_engine(
    config: ModelConfig, numerics: Numerics, params: Any, tokenizer: Tokenizer | None, build: Build,
    make_programs: Callable[..., Programs] = Programs,
) -> tuple[ModelConfig, Engine]:  # fmt: skip
    """An engine with its programs not yet compiled, and the config it runs."""
    use_compilation_cache()
    cache = build.cache
    length = choose_length(config, build.max_model_len, cache)
    config = with_length(config, cache.longest(length))
    budget = max(build.max_num_batched_tokens, build.max_num_seqs + 1)
    stored = build.kv_dtype(numerics.dtype)
    check_model(cache, config, length=length, budget=budget, parts=build.sequence_parallel_size)
    num_pages, page_size = choose_pages(config, build, length, stored)
    slack = 0 if build.drafter is None else max(shape.slots for shape in build.drafter.shapes)
    width = -(-(length + slack) // page_size) if page_bytes(config, page_size, stored, cache) else 0
    place = build.placement(config)
    cache = cache if place is None else place.cache(cache)
    tokens = step_tokens(
        place, config, params["blocks"], platform=numerics.platform, width=numerics.dtype.itemsize, length=length,
        form=build.sequence_parallel_form, overlap=build.overlap_tokens,
    )  # fmt: skip
    graphdef, params, period = lay_out(
        config, with_experts(numerics, place), params, alike=cache.abilities.layers_alike
    )
    if place is not None:
        params = jax.device_put(params, place.params(graphdef, jax.eval_shape(lambda: params)))
    capacity = Capacity(
        num_pages, page_size, build.max_num_seqs, numerics.dtype, build.backends(place),
        choose_snapshots(config, build, numerics.dtype), stored, width,
    )  # fmt: skip
    empty = partial(make_state, config, capacity, period, cache)
    spec = jax.eval_shape(empty)
    sampler = Sampler(config.vocab_size, build.max_num_seqs, DEFAULT if tokenizer is None else CONSTRAINED)
    devices = [build.device] if place is None else place.devices
    facts = partial(
        engine_facts, devices, config, numerics, build, capacity, length=length, budget=budget, place=place,
        sampler=sampler, params=specs(params), state=spec,
    )  # fmt: skip
    compiler = Compiler(devices, facts, build.compiled, build.strict)
    if numerics.platform == "cpu" and compiler.artefact is None:
        try_forms(params)
    state = compiler.start("state", empty, None if place is None else place.state(spec))
    pages = allocator(config, build, cache, capacity, length)
    speculation = None
    if build.drafter is not None:
        check_drafter(build.drafter, cache, config, devices=build.devices)
        speculation = Speculation(
            build.drafter, Target(config, numerics, tokenizer, capacity, length, compiler), build.controller
        )
        sampler = speculation.sampler(sampler, length + slack)
    programs = make_programs(
        graphdef, params, state, sampler,
        BucketPlan.make(build.max_num_seqs, budget, build.sequence_parallel_size),
        compiler=compiler,
        page_size=page_size, width=width, period=period, strict=build.strict,
        whole=build.whole(place), speculation=speculation, tokens=tokens,
    )  # fmt: skip
    eos = config.eos_token_ids if tokenizer is None else tokenizer.eos_token_ids
    make = Engine if build.telemetry is None else partial(MeasuredEngine, telemetry=build.telemetry)
    engine = make(
        programs, pages, max_model_len=length, vocab_size=config.vocab_size, budget=budget,
        tokenizer=tokenizer, eos_ids=eos, bounds=build.bounds, policy=build.policy,
        overlap=build.overlap is not False,
    )  # fmt: skip
    return config, engine
