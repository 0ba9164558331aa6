"""How prompt tokens meet keys that lie on several devices: four forms, and which is the quickest for a shape.

    "whole"       every device computes all tokens of the step and meets them with its own keys: no transfer but of
                  results; the tokens' own layers are computed N times
    "gather"      tokens are spread; all queries are gathered, and each device meets them with its own keys
    "ring"        tokens are spread; the step's keys and values travel round the ring, and only what was stored before
                  is met by queries that travel
    "token_ring"  tokens are spread; queries travel one way and results the other, stored keys stay

Seconds of a layer, with C prompt tokens over N devices, c = C/N, P tokens stored before, Hq query and Hkv KV heads of
D numbers of w bytes, F operations, M memory and L link bytes a second, and t seconds for a transfer to start. It takes
keys = 2*c*Hkv*D*w / L, queries = c*Hq*D*w / L, results = c*Hq*4*(D+1) / L (N/4 times that, where they cross a ring of
links); scores cost fresh = 4*Hq*D*C*(C/2) / (N*F) and before = 4*Hq*D*C*P / (N*F), the layer's own products
on n tokens own(n) = max(2*parameters*n / F, parameters*w / M):

    travel(x)   (N-1) * max(t + max(queries, results), x/N) + x/N + t + results
    whole       own(C) + fresh + before + t + 2*(N-1)*results
    gather      own(c) + t + (N-1)*keys + 2*t + (N-1)*(queries + results) + fresh + before
    ring        own(c) + (N-1) * max(t + keys, fresh/N) + fresh/N, and travel(before) where P > 0
    token_ring  own(c) + t + (N-1)*keys + travel(fresh + before)

Where tokens are spread, the step's new keys and values reach the pages of all: on the ring as they pass, else by an
all-gather of (N-1)*2*c*Hkv*D*w bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Form = Literal["whole", "gather", "ring", "token_ring"]
FORMS: tuple[Form, ...] = ("whole", "gather", "ring", "token_ring")


@dataclass(frozen=True)
class Spread:
    """The tokens of a batch are spread over so many devices, and meet keys in this form."""

    devices: int
    form: Form


@dataclass(frozen=True)
class Speeds:
    """A device: operations, memory and link bytes (each way) a second, and the seconds that a transfer takes to start.

    torus: devices are linked in a ring, so what goes h places ahead crosses h links; else each is linked to each."""

    flops: float = 197e12
    memory: float = 819e9
    link: float = 45e9
    start: float = 2e-6
    torus: bool = True


@dataclass(frozen=True)
class Load:
    """One layer's part of a step over N devices: `tokens` C, `stored` P, and of one device the query heads, KV heads
    and `parameters` of the layer; `width`: bytes of a number."""

    devices: int
    tokens: int
    stored: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    parameters: int

    def of(self, tokens: int, stored: int) -> Load:
        """The same layer in another step."""
        return replace(self, tokens=tokens, stored=stored)

    def seconds(self, form: Form, speeds: Speeds) -> float:
        """What the layer takes in this form, by the formulas above."""
        N, C, start = self.devices, self.tokens, speeds.start
        pairs = 4 * self.heads * self.head_dim * C / (N * speeds.flops)
        fresh, before = pairs * C / 2, pairs * self.stored
        keys = 2 * C / N * self.kv_heads * self.head_dim * self.width / speeds.link
        queries = C / N * self.heads * self.head_dim * self.width / speeds.link
        results = C / N * self.heads * 4 * (self.head_dim + 1) / speeds.link

        def own(tokens: float) -> float:
            read = self.parameters * self.width / speeds.memory
            return max(2 * self.parameters * tokens / speeds.flops, read)

        def travel(compute: float) -> float:
            across = results * (max(1.0, N / 4) if speeds.torus else 1.0)
            return (N - 1) * max(start + max(queries, across), compute / N) + compute / N + start + results

        if form == "whole":
            return own(C) + fresh + before + start + 2 * (N - 1) * results
        if form == "ring":
            hops = (N - 1) * max(start + keys, fresh / N) + fresh / N
            return own(C / N) + hops + (travel(before) if self.stored else 0.0)
        stores = own(C / N) + start + (N - 1) * keys
        if form == "token_ring":
            return stores + travel(fresh + before)
        return stores + 2 * start + (N - 1) * (queries + results) + fresh + before


def choose(load: Load, speeds: Speeds = Speeds()) -> Form:
    """The form that takes the least time; of equal ones the first of `FORMS`."""
    return min(FORMS, key=lambda form: load.seconds(form, speeds))
