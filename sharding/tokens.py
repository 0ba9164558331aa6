"""How devices share the tokens of a step: all have all of them, or each has some, where texts or weights are split."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from ..attention.batch import Batch, Shape
from ..attention.forms import Form, Speeds
from ..attention.weave import Weave
from .placement import Placement
from .spreading import Spreading
from .weaving import FEWEST, Weaving


class StepTokens(Protocol):
    """A step's way through the layers: `split` into parts, each with its x `placed`, and `joined` behind them."""

    def split(self, batch: Batch) -> tuple[Batch, ...]:
        """The parts in which a step runs, one behind the other in every layer."""
        ...

    def placed(self, x: jax.Array, part: Batch) -> jax.Array:
        """x [T,E] of a part, where its tokens lie."""
        ...

    def joined(self, xs: tuple[jax.Array, ...], shape: Shape) -> jax.Array:
        """The parts' x -> x [T,E] in the plain order."""
        ...

    def options(self, shape: Shape) -> dict[str, str | bool]:
        """What the compiler is told for a step of this shape."""
        ...


class Alike:
    """Every device has all tokens."""

    def split(self, batch: Batch) -> tuple[Batch, ...]:
        return (batch,)

    def placed(self, x: jax.Array, part: Batch) -> jax.Array:
        del part
        return x

    def joined(self, xs: tuple[jax.Array, ...], shape: Shape) -> jax.Array:
        del shape
        return xs[0]

    def options(self, shape: Shape) -> dict[str, str | bool]:
        del shape
        return {}


def check_overlap(overlap: int | None, tensor: int, sequence: int) -> None:
    """ValueError unless steps can run in halves where that is asked for; sizes: over how many devices weights and texts
    are split."""
    if overlap is not None and (isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 0):
        raise ValueError(
            f"overlap_tokens={overlap!r} must be a whole number: the fewest tokens of a step that runs in two halves, "
            f"0 for none, or None"
        )
    if overlap and (tensor == 1 or sequence > 1):
        raise ValueError(
            f"overlap_tokens={overlap} with tensor_parallel_size={tensor} and sequence_parallel_size={sequence}: it is "
            f"for models that several devices share by tensor_parallel_size alone; leave it None"
        )


def step_tokens(
    place: Placement | None, config: Any, blocks: Any, *, platform: str, width: int, length: int,
    form: Form | None = None, speeds: Speeds | None = None, overlap: int | None = None,
) -> StepTokens:  # fmt: skip
    """For a model (`ModelConfig`) that lives at `place`. blocks: the parameters of all layers; width: bytes of a
    number; length: max_model_len; form: how spread prompts meet keys, None: by cost; speeds: of a device, None: of the
    mesh's; overlap: tokens from which on a tensor-parallel step runs in two halves, 0: never, None: 1,024 on TPU and
    GPU."""
    if place is None or place.mesh.size == 1:
        return Alike()
    if place.sequence > 1:
        return Spreading.of(place, config, blocks, width=width, length=length, form=form, speeds=speeds)
    if overlap and config.recurrent:
        raise ValueError(
            f"overlap_tokens={overlap} runs a step in two halves, but the recurrent layers of {config.model_type} go "
            f"through it once; leave it None"
        )
    fewest = overlap if overlap is not None else (0 if platform == "cpu" else FEWEST)
    if fewest == 0 or config.recurrent:
        return Alike()
    return Weaving(Weave(place.apart, place.whole), place.mesh.size, platform, fewest)
