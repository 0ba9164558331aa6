"""What a step moves and computes, counted from the ModelConfig and the step's real lengths.

FLOPs (a multiply-add is two): every weight product for the tokens that are real, the head for the rows that
sample or are scored, scores and weighted sums of attention over the keys that each query sees (the window
included), and the recurrence in its step form. Of a mixture the router and the k experts of each token.

Bytes: every weight matrix once, except the embedding table (of an untied model only the rows that are looked up)
and experts that no token can reach (a step of T tokens reaches at most T*k); the live keys and values of each row
once, within the window; the keys and values written; recurrent state read and written; activations as the inputs
and outputs of every weight product, and the logits.

Not counted: norms, biases, rotations, softmax and the sampler's arithmetic; padding; what caches save or kernels
read again.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...model.config import AttentionConfig, BlockConfig, ModelConfig, MoEConfig

Product = tuple[int, int]


@dataclass(frozen=True)
class Widths:
    """Bytes of a number: weights as stored (mean over all), activations, keys and values."""

    weight: float
    activation: int
    cache: int


class Counters:
    """Counts for one model. Sums over layers are made once; a step costs a few multiplications."""

    def __init__(self, config: ModelConfig, widths: Widths):
        self.widths, E, size = widths, config.hidden_size, config.embed_size or config.hidden_size
        products = [product for block in config.blocks for product in _products(block, E)]
        if size != E:
            products.append((size, E))
        self._token = sum(a * b for a, b in products)  # weights that every token meets, experts aside
        self._moved = sum(a + b for a, b in products)
        mixtures = [b.channel for b in config.blocks if isinstance(b.channel, MoEConfig)]
        self._experts = [(c.experts, c.top_k, 3 * E * c.intermediate) for c in mixtures]
        self._token_experts = sum(top_k * size for _, top_k, size in self._experts)
        self._moved += sum(c.top_k * 3 * (E + c.intermediate) for c in mixtures)
        head = [(size, config.vocab_size)] + ([(E, size)] if size != E else [])
        self._head, self._head_moved = sum(a * b for a, b in head), sum(a + b for a, b in head)
        positions = E if config.learned_positions else 0
        self._looked_up = positions + (0 if config.tie_embeddings else size)
        self._attention: dict[int | None, tuple[int, int]] = {}  # window -> (query, key and value) features
        for block in config.blocks:
            mixer = block.mixer
            if isinstance(mixer, AttentionConfig):
                q, kv = self._attention.get(mixer.window, (0, 0))
                more = mixer.heads * mixer.head_dim, 2 * mixer.kv_heads * mixer.head_dim
                self._attention[mixer.window] = q + more[0], kv + more[1]
        self._written = sum(kv for _, kv in self._attention.values())
        recurrent = [b.mixer for b in config.blocks if not isinstance(b.mixer, AttentionConfig)]
        states = sum(m.heads * m.head_dim * m.state for m in recurrent)
        self._recurrence = 5 * states + sum(2 * m.conv * m.conv_dim for m in recurrent)
        taps = sum((m.conv - 1) * m.conv_dim for m in recurrent)
        self._state_bytes = 2 * (4 * states + widths.activation * taps)

    def weights(self, tokens: int) -> int:
        """Weights that a step of so many tokens reads, the head's included."""
        reached = (min(experts, tokens * top_k) * size for experts, top_k, size in self._experts)
        return self._token + self._head + sum(reached) + self._looked_up * tokens

    def count(self, decodes: list[int], chunks: list[tuple[int, int]], heads: int) -> tuple[int, int]:
        """(bytes, FLOPs) of a step.

        decodes: the length of each decoding row, its new token included. chunks: (tokens before, tokens) of each
        prompt row. heads: rows that sample or are scored.
        """
        tokens = len(decodes) + sum(count for _, count in chunks)
        flops = 2 * ((self._token + self._token_experts) * tokens + self._head * heads)
        flops += self._recurrence * tokens
        kv = self._written * tokens
        for window, (query, both) in self._attention.items():
            pairs, live = _visible(decodes, chunks, window)
            flops += 4 * query * pairs
            kv += both * live
        activations = self._moved * tokens + self._head_moved * heads
        widths = self.widths
        total = self.weights(tokens) * widths.weight + kv * widths.cache + activations * widths.activation
        return round(total) + self._state_bytes * (len(decodes) + len(chunks)), flops


def _visible(decodes: list[int], chunks: list[tuple[int, int]], window: int | None) -> tuple[int, int]:
    """(query-key pairs, keys that any query of their row sees) of the rows of a step."""
    if window is None:
        pairs = live = sum(decodes)
    else:
        pairs = live = sum(min(length, window) for length in decodes)
    for start, count in chunks:
        end = start + count
        if window is None or end <= window:
            pairs += (start + 1 + end) * count // 2
            live += end
        else:
            ramp = max(0, window - start)  # queries that see everything before them still
            pairs += (start + 1 + start + ramp) * ramp // 2 + window * (count - ramp)
            live += min(end, count + window - 1)
    return pairs, live


def _products(block: BlockConfig, hidden: int) -> list[Product]:
    """(inputs, outputs) of the weight products that every token goes through: experts aside."""
    mixer, channel = block.mixer, block.channel
    if isinstance(mixer, AttentionConfig):
        query, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        found = [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden)]
    else:
        found = [(hidden, mixer.inner + mixer.conv_dim + mixer.heads), (mixer.inner, hidden)]
    if isinstance(channel, MoEConfig):
        found.append((hidden, channel.experts))
    elif channel is not None:
        found += [(hidden, channel.intermediate)] * (2 if channel.gated else 1)
        found.append((channel.intermediate, hidden))
    return found
