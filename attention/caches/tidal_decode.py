"""TidalDecode (Yang et al. 2024, arXiv 2410.05076): a few layers choose the tokens that the layers behind them read.

The tokens with the highest scores are much the same in consecutive layers of one decode step. Layers before the first
of `choose` read everything; those in `choose` read everything too and keep the `tokens` best by exact score; each
other layer reads only those that the last choosing layer kept, with its own keys and values. Prompts are dense, and
the choice is made anew for every token. A KV head has one list for its G query heads (the largest of their scores; the
paper leaves grouped heads open), and a token always sees itself, as in the paper's kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from ..batch import Batch
from ..chosen import attend, best, gather
from ..ops import AttentionSpec, attention
from ..probes import logits
from ..rotary import Rotate, unrotated
from .paged import PagedKV
from .policy import Abilities, CachePolicy, Capacity, Heads
from .relay import Relay
from .seats import rectangular

Choice = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class TidalDecode(CachePolicy):
    """`tokens` kept by each of the layers `choose`, counted from 0; the paper: 256 by layers 2 and 13 of 32."""

    tokens: int = 256
    choose: tuple[int, ...] = (2, 13)

    def __post_init__(self) -> None:
        if self.tokens < 1 or not self.choose or min(self.choose) < 0:
            raise ValueError(f"{self!r} needs at least 1 token, and a layer that chooses")

    @property
    def abilities(self) -> Abilities:
        return Abilities(may_share_prefix=True, rebuildable=False, quantises=True, layers_alike=False)

    def create(
        self, heads: Heads, layer: int, capacity: Capacity, layers: int | None = None
    ) -> PagedKV | TidalKV:
        pages = PagedKV.of(heads, capacity, layers)
        if layer < min(self.choose):
            return pages
        return TidalKV(pages, self.tokens, "choose" if layer in self.choose else "reuse")


@partial(jax.tree_util.register_dataclass, data_fields=["pages", "choice"], meta_fields=["tokens", "role"])
@dataclass(frozen=True)
class TidalKV(Relay):
    """One layer: its pages. While a step runs, `choice`: places i32[B,Hkv,k] in the rows' texts, and which of them
    exist, bool[B,Hkv,k]."""

    pages: PagedKV
    tokens: int
    role: Literal["choose", "reuse"]
    choice: Choice | None = None

    def layer(self, index: jax.Array) -> TidalKV:
        return replace(self, pages=self.pages.layer(index))

    def put(self, index: jax.Array, new: TidalKV) -> TidalKV:
        return replace(new, pages=self.pages.put(index, new.pages))

    def given(self, choice: Choice | None) -> TidalKV:
        return replace(self, choice=choice)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, spec: AttentionSpec,
        rotate: Rotate = unrotated,
    ) -> tuple[jax.Array, TidalKV]:  # fmt: skip
        """q [T,Hq,D], k and v [T,Hkv,D], raw. One token a rectangular row."""
        q, k = rotate(q, batch.positions), rotate(k, batch.positions)
        B, pages, parts = rectangular(batch, self, spec), self.pages.write(k, v, batch), []
        new = replace(self, pages=pages)
        if B:
            out, choice = new._rows(q[:B], batch, spec)
            new = new.given(choice)
            parts.append(out)
        if batch.shape.R:
            parts.append(pages.prompt(q[B:], batch, spec)[0])
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], new

    def _rows(self, q: jax.Array, batch: Batch, spec: AttentionSpec) -> tuple[jax.Array, Choice]:
        """q [B,Hq,D]: its output, and the choice for the layers behind."""
        B, heads, dim = q.shape
        view = self.pages.view(batch).rows(0, B)
        if self.role == "reuse":
            if self.choice is None:
                raise ValueError(
                    "a layer reads what an earlier one chose, but none did: run the layers in order"
                )
            tokens, exist = self.choice
            seen = exist
            if spec.window is not None:
                seen = exist & (tokens > view.lengths[:, None, None] - 1 - spec.window)
            return attend(q, *gather(view, tokens, dim), seen, spec)[0], self.choice
        out, _ = attention(q[:, None], view, spec, self.pages.backends)
        scores = logits(q[:, None], view, spec)
        scores = scores.reshape(B, view.kv_heads, heads // view.kv_heads, -1)
        return out[:, 0], best(scores, self.tokens, view.lengths - 1)
