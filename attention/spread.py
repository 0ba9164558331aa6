"""Prompt tokens spread over devices, in an order that gives each the same share of causal work.

Zigzag (Llama 3's context parallelism, arXiv 2407.21783, section 3.3.2; zhuzilin/ring-flash-attention): the prompt part
is cut into 2N pieces, and device r has pieces r and 2N-1-r, an early one and a late one. Decode rows are dealt in equal
parts. A batch is put into this order once, before the first layer, and its result back behind the last.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .batch import Batch, Shape
from .flat import Marks
from .forms import Spread


def spreads(shape: Shape, devices: int) -> bool:
    """Whether the tokens of such a batch come out even: C in 2N pieces, the rows in N parts."""
    return shape.R > 0 and shape.C % (2 * devices) == 0 and (shape.B * shape.q) % devices == 0


def pieces(device: Any, devices: int) -> tuple[Any, Any]:
    """Which of the 2N pieces of the prompt part a device (int or i32[]) has, in order."""
    return device, 2 * devices - 1 - device


def order(shape: Shape, devices: int) -> np.ndarray:
    """i32[T]: the token of the plain order at each place; device by device, rows first, then both pieces."""
    rows, piece = shape.B * shape.q // devices, shape.C // (2 * devices)
    start = shape.B * shape.q
    found = []
    for device in range(devices):
        found.append(np.arange(device * rows, (device + 1) * rows))
        found += [start + np.arange(at * piece, (at + 1) * piece) for at in pieces(device, devices)]
    return np.concatenate(found).astype(np.int32)


def spread(batch: Batch, over: Spread) -> Batch:
    """The batch with its tokens in `order`."""
    places = order(batch.shape, over.devices)
    names = ("tokens", "positions", "pages", "slots", "rows", "valid")
    return replace(batch, spread=over, **{name: getattr(batch, name)[places] for name in names})


def plain(x: jax.Array, shape: Shape, devices: int) -> jax.Array:
    """x [T,...] in `order` -> in the plain order."""
    return x[np.argsort(order(shape, devices))]


def prompt_part(batch: Batch, values: jax.Array) -> jax.Array:
    """Of values [T] of a spread batch the prompt tokens', [N, C/N] device by device."""
    assert batch.spread is not None
    devices = batch.spread.devices
    return values.reshape(devices, -1)[:, batch.shape.B * batch.shape.q // devices :]


def prompt_marks(batch: Batch) -> Marks:
    """Marks [N, C/N] of the prompt tokens of a spread batch."""
    rows = prompt_part(batch, batch.rows)
    positions = jnp.where(prompt_part(batch, batch.valid), prompt_part(batch, batch.positions), -1)
    return Marks(rows, positions, batch.lengths[rows])
