"""Batch: the one layout that every mixer, cache and kernel sees.

A batch has four static numbers (B, q, R, C): first B rows of q tokens each (q = 1 in decode), then C prompt
tokens shared by at most R prompt rows. x is [T, E] with T = B*q + C. decode = (B,1,0,0), prefill = (0,0,R,C),
mixed = (B,1,R,C), verify = (B,N,0,0): one program family.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .forms import Spread
from .weave import Weave

NULL_PAGE = 0


@dataclass(frozen=True, order=True)
class Shape:
    """The static numbers of a batch: B rows of q tokens, then R prompt rows sharing C tokens."""

    B: int
    q: int
    R: int
    C: int

    @property
    def T(self) -> int:
        return self.B * self.q + self.C

    @property
    def rows(self) -> int:
        return self.B + self.R

    @property
    def kind(self) -> str:
        if self.R == 0:
            return "decode" if self.q == 1 else "verify"
        return "mixed" if self.B else "prefill"

    def __str__(self) -> str:
        return f"{self.kind}(B={self.B}, q={self.q}, R={self.R}, C={self.C})"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens", "positions", "pages", "slots", "rows", "valid", "page_table", "lengths", "starts",
        "query_starts", "seats", "ends", "ancestors",
        "prompt_lengths",
    ],
    meta_fields=["shape", "spread", "weave"],
)  # fmt: skip
@dataclass(frozen=True)
class Batch:
    """Arrays of one step. Rows are the B rectangular rows, then the R prompt rows; sizes are in tokens.

    tokens        i32[T]      token ids
    positions     i32[T]      absolute position of each token in its sequence
    pages, slots  i32[T]      where each token's K and V go; padding goes to the null page
    rows          i32[T]      the row that each token belongs to
    valid         bool[T]     False for padding tokens
    page_table    i32[B+R,P]  the pages of each row, in order; unused entries are the null page
    lengths       i32[B+R]    tokens of each row after this step; 0 for an idle row
    starts        i32[B+R]    tokens of each row before this step (0: the row begins here)
    query_starts  i32[R+1]    where each prompt row begins in the prompt part, in 0..C
    seats         i32[B+R]    the slot that holds each row's fixed-size state; idle rows use the padding seat
    ends          bool[B+R]   True where a row's last token is followed by sampling: a prompt is complete with it
    ancestors     bool[B,q,q] where the rectangular rows are draft trees: which slots each slot sees (itself and its
                              ancestors); slots lie one behind the other, positions follow depth. None: chains
    prompt_lengths i32[B+R]   tokens of each row's prompt; what follows was generated. None: all tokens are prompts
    spread        Spread      tokens are spread over devices, in the order of `attention.spread`; None: in plain order
    weave         Weave       between mixers, each of the devices that share the weights has some tokens; None: all
    """

    shape: Shape
    tokens: jax.Array
    positions: jax.Array
    pages: jax.Array
    slots: jax.Array
    rows: jax.Array
    valid: jax.Array
    page_table: jax.Array
    lengths: jax.Array
    starts: jax.Array
    query_starts: jax.Array
    seats: jax.Array
    ends: jax.Array
    ancestors: jax.Array | None = None
    prompt_lengths: jax.Array | None = None
    spread: Spread | None = None
    weave: Weave | None = None

    def together(self, x: jax.Array) -> jax.Array:
        """Activations [T,E] as a mixer takes them: where devices share the weights, whole on each."""
        return x if self.weave is None else self.weave.gather(x)

    def apart(self, x: jax.Array) -> jax.Array:
        """Activations [T,E] as they lie between mixers."""
        return x if self.weave is None else self.weave.scatter(x)

    @property
    def last_tokens(self) -> jax.Array:
        """i32[B+R]: index in [T] of each row's last token; idle rows give some row in range."""
        B, q = self.shape.B, self.shape.q
        rect = jnp.arange(B, dtype=jnp.int32) * q + q - 1
        prompt = B * q + jnp.maximum(self.query_starts[1:] - 1, 0)
        return jnp.concatenate([rect, prompt]) if self.shape.R else rect


def make_batch(
    shape: Shape,
    page_size: int,
    *,
    tokens: jax.Array,
    lengths: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    seats: jax.Array,
    ends: jax.Array | None = None,
    depths: jax.Array | None = None,
    ancestors: jax.Array | None = None,
) -> Batch:
    """Complete a batch from what cannot be derived: token ids, row lengths, pages, prompt starts and seats.

    Rectangular rows with length 0 are idle. The prompt rows' tokens lie back to back from `query_starts`;
    tokens from query_starts[R] on are padding. `ends` None: every row's text is complete. Draft trees bring depths
    i32[B,q] and ancestors bool[B,q,q]. What would lie behind a row's table goes to the null page.
    """
    B, q, R, C = shape.B, shape.q, shape.R, shape.C
    counts = jnp.where(lengths[:B] > 0, q, 0)
    rows = jnp.repeat(jnp.arange(B, dtype=jnp.int32), q)
    valid = lengths[rows] > 0 if B else jnp.zeros((0,), bool)
    offset = jnp.tile(jnp.arange(q, dtype=jnp.int32), B)
    if R:
        counts = jnp.concatenate([counts, query_starts[1:] - query_starts[:-1]])
        index = jnp.arange(C, dtype=jnp.int32)
        row = (index[:, None] >= query_starts[None, 1:R]).sum(-1, dtype=jnp.int32)
        rows = jnp.concatenate([rows, B + row])
        valid = jnp.concatenate([valid, index < query_starts[R]])
        offset = jnp.concatenate([offset, index - query_starts[row]])
    starts = lengths - counts
    places = jnp.where(valid, starts[rows] + offset, 0)
    width = page_table.shape[1]
    page = page_table[rows, jnp.minimum(places // page_size, width - 1)] if width else jnp.zeros_like(rows)
    positions = places
    if depths is not None:
        positions = positions.at[: B * q].set(
            jnp.where(valid[: B * q], starts[rows[: B * q]] + depths.reshape(-1), 0)
        )
    return Batch(
        shape=shape,
        tokens=tokens,
        positions=positions,
        pages=jnp.where(valid & (places < width * page_size), page, NULL_PAGE),
        slots=places % page_size,
        rows=rows,
        valid=valid,
        page_table=page_table,
        lengths=lengths,
        starts=starts,
        query_starts=query_starts,
        seats=seats,
        ends=lengths > 0 if ends is None else ends,
        ancestors=ancestors,
    )


def rectangle(tokens: jax.Array) -> Batch:
    """A batch of B fresh rows of q tokens with nothing remembered: training and scoring whole texts.

    tokens i32[B, q]; use it with caches of kind NONE (`attention.caches.Uncached`).
    """
    B, q = tokens.shape
    return make_batch(
        Shape(B, q, 0, 0),
        1,
        tokens=tokens.reshape(-1),
        lengths=jnp.full((B,), q, jnp.int32),
        page_table=jnp.zeros((B, 0), jnp.int32),
        query_starts=jnp.zeros((1,), jnp.int32),
        seats=jnp.arange(B, dtype=jnp.int32),
    )


def descriptor_size(shape: Shape, width: int) -> int:
    """Length of the packed i32 descriptor of a step: one host-to-device copy a dispatch."""
    return shape.rows * (3 + width) + shape.R + 1 + shape.C


def pack(
    shape: Shape,
    width: int,
    *,
    lengths: np.ndarray,
    seats: np.ndarray,
    samples: np.ndarray,
    page_table: np.ndarray,
    query_starts: np.ndarray,
    prompt_tokens: np.ndarray,
) -> np.ndarray:
    """The host's half of `unpack`. `samples` i32[B+R] is 1 where a row's last token is followed by sampling;
    it stands behind lengths and seats, so that the first 3*(B+R) numbers are what the head needs."""
    assert page_table.shape == (shape.rows, width) and prompt_tokens.shape == (shape.C,)
    parts = [lengths, seats, samples, page_table.reshape(-1), query_starts, prompt_tokens]
    return np.concatenate(parts).astype(np.int32, copy=False)


def unpack(
    shape: Shape,
    width: int,
    page_size: int,
    packed: jax.Array,
    last_token: jax.Array,
    length: jax.Array | None = None,
) -> Batch:
    """The batch of a step from its packed descriptor; rectangular tokens come from `last_token[seats]`, and so do
    their rows' lengths from `length`, where it is given (the descriptor then says only which rows are idle)."""
    rows = shape.rows
    lengths, seats, samples = packed[:rows], packed[rows : 2 * rows], packed[2 * rows : 3 * rows]
    at = (3 + width) * rows
    page_table = packed[3 * rows : at].reshape(rows, width)
    query_starts = packed[at : at + shape.R + 1]
    prompt = packed[at + shape.R + 1 :]
    B = shape.B
    if length is not None:
        lengths = lengths.at[:B].set(jnp.where(lengths[:B] > 0, length[seats[:B]], 0))
    tokens = jnp.concatenate([last_token[seats[:B]], prompt])
    return make_batch(
        shape,
        page_size,
        tokens=tokens,
        lengths=lengths,
        page_table=page_table,
        query_starts=query_starts,
        seats=seats,
        ends=samples > 0,
    )
