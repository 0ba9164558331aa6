"""What a model needs of one device's memory, from shapes alone: nothing is compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import permutations
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...attention.backends import backends
from ...attention.caches.paged import Pages
from ...attention.caches.policy import Capacity
from ...model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from ...model.layers import Numerics
from ...model.params import flatten
from ...model.stacked import abstract_stacked, period_of
from ...model.state import page_bytes, snapshot_bytes, state_spec
from ...sharding.division import Division
from ...sharding.placement import Placement
from ...sharding.spreading import speeds_of_kind
from ...sharding.tokens import StepTokens, step_tokens
from ...sharding.topology import Topology
from ..buckets import BucketPlan
from ..build import Build, choose_length, choose_numerics, spare_bytes, usual_page_size, with_length
from ..cache_rules import check_model
from ..context_rules import keeps_copies
from ..expert_rules import with_experts
from ..sampling.sampler import CONSTRAINED, Sampler

SLACK = 0.01
"""Share of a device's memory that is left for code, alignment and fragments."""
HEAD = ("lm_head.", "final_norm.", "project_out.")
"""Parameters that only the head's programs read."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device: weights; state (pages and recurrent state); the sampler's state; temporaries of the largest
    program (estimated); what the device offers."""

    weights: int
    state: int
    sampler: int
    temporaries: int
    available: int

    @property
    def needed(self) -> int:
        return self.weights + self.state + self.sampler + self.temporaries

    @property
    def free(self) -> int:
        return self.available - self.needed


ROWS, LANES = 8, 128
"""A TPU stores two dimensions of an array in tiles of so many rows (1, 2 or 4, where there are no more) and lanes."""


def tiled_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of an array as a TPU stores it: the compiler chooses the two dimensions that waste least."""

    def padded(rows: int, lanes: int) -> float:
        tile = ROWS if rows > ROWS // 2 else 1 << (rows - 1).bit_length()
        return -(-rows // tile) * tile / rows * -(-lanes // LANES) * LANES / lanes

    size = prod(shape)
    if len(shape) < 2 or size == 0:
        return size * itemsize
    return round(min(padded(*pair) for pair in permutations(shape, 2)) * size) * itemsize


def placed_bytes(specs: Any) -> int:
    """Bytes that one device holds of ShapeDtypeStructs with their shardings (without one: whole)."""
    return sum(
        tiled_bytes(
            leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape),
            leaf.dtype.itemsize,
        )
        for leaf in jax.tree.leaves(specs)
    )


# Many cases are of one model.
_specs, _page_bytes = lru_cache(maxsize=2)(abstract_stacked), lru_cache(maxsize=4)(page_bytes)


@dataclass(frozen=True)
class Case:
    """A model on a slice, divided one way, with an engine's settings (`build`, its max_model_len given).

    What follows from it is computed once, when first asked for. `place` is abstract, unless compile-only devices were
    given.
    """

    config: ModelConfig
    numerics: Numerics
    topology: Topology
    division: Division
    build: Build
    devices: tuple[Any, ...] | None = None

    @staticmethod
    def of(
        config: ModelConfig, topology: Topology, division: Division, build: Build, dtype: str | None = None
    ) -> Case:
        """With max_model_len within what the checkpoint can do: 8,192 unless given."""
        length = choose_length(config, build.max_model_len or min(8192, config.max_position))
        budget = build.max_num_batched_tokens
        check_model(Pages(), config, length=length, budget=budget, parts=division.seq)
        numerics = choose_numerics(dtype, config.dtype, "tpu")
        return Case(
            with_length(config, length), numerics, topology, division, replace(build, max_model_len=length)
        )

    @property
    def length(self) -> int:
        assert self.build.max_model_len is not None
        return self.build.max_model_len

    @property
    def seats(self) -> int:
        return self.build.max_num_seqs

    @cached_property
    def place(self) -> Placement:
        heads, division, build = self.config.attention_heads, self.division, self.build
        copies = keeps_copies(
            build.decode_context_parallel_size, heads, tensor=division.size, sequence=division.seq,
            page_size=build.page_size, cache=Pages(),
        )  # fmt: skip
        return division.place(heads, self.devices, self.config.expert_counts, copies)

    @cached_property
    def period(self) -> int:
        return period_of(self.config)

    @cached_property
    def _abstract(self) -> tuple[nnx.GraphDef, Any]:
        graphdef, specs = _specs(self.config, with_experts(self.numerics, self.place), self.period)
        return graphdef, self.place.plan.place_params(graphdef, specs, self.place.mesh)

    @property
    def graphdef(self) -> nnx.GraphDef:
        return self._abstract[0]

    @property
    def params(self) -> Any:
        """ShapeDtypeStructs with their shardings."""
        return self._abstract[1]

    @cached_property
    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters by path."""
        return flatten(self.params)

    @property
    def kv_dtype(self) -> jnp.dtype:
        return self.build.kv_dtype(self.numerics.dtype)

    @property
    def page_size(self) -> int:
        return self.build.page_size or usual_page_size(self.length, self.place.page_parts)

    @property
    def width(self) -> int:
        """Pages of a sequence of max_model_len tokens; 0 for a model without pages."""
        return -(-self.length // self.page_size) if self.kv_bytes else 0

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes of a token's keys and values over all layers and devices of a replica."""
        return _page_bytes(self.config, 1, self.kv_dtype)

    def state(self, pages: int) -> tuple:
        """Specs of the state with so many pages, with their shardings."""
        kernels = self.place.backends(backends(self.topology.device.chip))
        copies = 2 * self.seats if snapshot_bytes(self.config, self.numerics.dtype) else 0
        capacity = Capacity(
            pages, self.page_size, self.seats, self.numerics.dtype, kernels, copies, self.kv_dtype, self.width
        )
        specs = state_spec(self.config, capacity, self.period, self.place.cache(Pages()))
        return self.place.plan.place_state(specs, self.place.mesh)

    @cached_property
    def step_tokens(self) -> StepTokens:
        """How devices share the tokens of a step."""
        return step_tokens(
            self.place, self.config, self.params["blocks"], platform="tpu", width=self.numerics.dtype.itemsize,
            length=self.length, form=self.build.sequence_parallel_form, overlap=self.build.overlap_tokens,
            speeds=speeds_of_kind(self.topology.generation.kind),
        )  # fmt: skip

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.config.vocab_size, self.seats, CONSTRAINED)

    @property
    def buckets(self) -> BucketPlan:
        return BucketPlan.make(
            self.seats, max(self.build.max_num_batched_tokens, self.seats + 1), self.division.seq
        )

    @cached_property
    def weight_bytes(self) -> int:
        return placed_bytes(self.params)

    @cached_property
    def sampler_bytes(self) -> int:
        return placed_bytes(jax.eval_shape(self.sampler.init))

    @cached_property
    def _state_bytes(self) -> tuple[int, int]:
        """(bytes of a page, bytes of the state without pages) on one device."""
        two, one = placed_bytes(self.state(2)), placed_bytes(self.state(1))
        return two - one, 2 * one - two

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values on one device, its share of padding included."""
        return self._state_bytes[0] // self.page_size

    @cached_property
    def pages_that_fit(self) -> int:
        """Pages for which there is room, page 0 included; may be negative."""
        page, rest = self._state_bytes
        room = int(self.topology.device.memory * (1 - SLACK))
        room -= self.weight_bytes + self.sampler_bytes + rest + temporaries(self)
        return room // page if page else (1 << 30 if room >= 0 else -1)

    @property
    def sequences_that_fit(self) -> int:
        """How many sequences of max_model_len tokens one replica holds at once; 0: the weights alone are too much."""
        return max(0, self.pages_that_fit - 1) // max(1, self.width)

    @property
    def fits(self) -> bool:
        """Every seat at full length."""
        return self.sequences_that_fit >= self.seats

    @property
    def runs(self) -> bool:
        """Whether the engine of today can be started so: replicas are of one host."""
        return self.topology.hosts == 1 or self.division.data == 1

    @property
    def default_pages(self) -> int:
        """What an engine takes without `num_pages`, where it is less than `pages`."""
        page = self._state_bytes[0]
        return min(self.pages, spare_bytes(self.topology.device.memory, self.weight_bytes) // max(1, page))

    @property
    def pages(self) -> int:
        """A pool for every seat at full length, or what there is room for."""
        return max(2, min(self.seats * self.width + 1, self.pages_that_fit))

    @property
    def memory(self) -> Memory:
        page, rest = self._state_bytes
        return Memory(
            self.weight_bytes, rest + page * self.pages, self.sampler_bytes, temporaries(self),
            self.topology.device.memory,
        )  # fmt: skip

    def arguments(self, head: bool) -> int:
        """Bytes of what a backbone takes on one device, or a head: the parameters that it reads, and its state."""
        tied = self.config.tie_embeddings
        read = {
            path: leaf for path, leaf in self.leaves.items()
            if path.startswith(HEAD) == head or (head and tied and path.startswith("embedding."))
        }  # fmt: skip
        return placed_bytes(read) + (self.sampler_bytes if head else self.memory.state)


def temporaries(case: Case) -> int:
    """An estimate of what the largest program keeps beside its arguments, in bytes of one device.

    The widest layer's activations over the largest chunk, or the logits of every seat as the sampler sees them (f32,
    scores and a copy); and the layer's experts, which the grouped product takes out of the stack before it runs.
    """
    config, size, item = case.config, case.division.size, case.numerics.dtype.itemsize
    tokens = case.buckets.chunks[-1] // case.division.seq + case.seats
    widest = max(_features(block.mixer, block.channel) for block in config.blocks)
    layer = tokens * (4 * config.hidden_size + widest // size) * item
    logits = 3 * case.seats * config.vocab_size * 4
    experts = max(
        (3 * c.experts * config.hidden_size * c.intermediate * item // size for c in _mixtures(config)),
        default=0,
    )
    return max(layer, logits) + experts


def _features(mixer: Any, channel: Any) -> int:
    """Numbers a token that a block makes between its weight products."""
    heads = (2 * mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim if isinstance(mixer, AttentionConfig) else (
        2 * mixer.inner + mixer.conv_dim
    )  # fmt: skip
    if isinstance(channel, MLPConfig):
        return max(heads, 3 * channel.intermediate)
    return max(heads, channel.top_k * 3 * channel.intermediate) if isinstance(channel, MoEConfig) else heads


def _mixtures(config: ModelConfig) -> list[MoEConfig]:
    return [block.channel for block in config.blocks if isinstance(block.channel, MoEConfig)]
