"""Floors of a program: the least time that memory, arithmetic and links allow, from the model's own numbers.

A roofline (Williams, Waterman and Patterson 2009) with one more roof. Bytes: each parameter that the program multiplies
with, once, as the device holds it (of a mixture the experts that the tokens can reach); the live keys and values, and
recurrent state; a table of embeddings only by the rows that are looked up. Activations stay on the chip.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...model.config import AttentionConfig, MoEConfig
from ..telemetry.counters import Counters, Widths
from .memory import HEAD, Case, placed_bytes


@dataclass(frozen=True)
class Work:
    """What one run of a program costs one device, and the floors in seconds.

    bytes of memory read and written, FLOPs, bytes sent over links. binds: the highest of the three floors.
    """

    program: str
    bytes: float
    flops: float
    sent: float
    bandwidth_s: float = field(kw_only=True)
    compute_s: float = field(kw_only=True)
    interconnect_s: float = field(kw_only=True)

    @property
    def binds(self) -> str:
        floors = {
            "bandwidth": self.bandwidth_s, "compute": self.compute_s, "interconnect": self.interconnect_s,
        }  # fmt: skip
        return max(floors, key=lambda name: floors[name])

    @property
    def seconds(self) -> float:
        """The floor when transfers are all exposed: the slower of memory and arithmetic, and then the links."""
        return max(self.bandwidth_s, self.compute_s) + self.interconnect_s


def work(case: Case, program: str, bytes_: float, flops: float, sent: float) -> Work:
    """The floors of these costs on the case's device."""
    device = case.topology.device
    return Work(
        program, bytes_, flops, sent, bandwidth_s=bytes_ / device.bandwidth, compute_s=flops / device.flops,
        interconnect_s=sent / device.interconnect,
    )  # fmt: skip


def backbone_work(
    case: Case, program: str, decodes: list[int], chunks: list[tuple[int, int]], sent: float | None = None
) -> Work:
    """A backbone over decoding rows of these lengths and (tokens before, tokens) of prompt rows; `sent` from the
    compiled program (None: as `predicted_sent`)."""
    tokens = len(decodes) + sum(count for _, count in chunks)
    numbers, flops = Counters(case.config, Widths(0.0, 0, 1)).count(decodes, chunks, 0)
    states = Counters(case.config, Widths(0.0, 0, 0)).count(decodes, chunks, 0)[0]
    kv = (numbers - states) * case.kv_bytes / max(1, _kv_numbers(case)) / case.place.kv_shards
    total = _block_weights(case, tokens) + kv + states
    return work(
        case,
        program,
        total,
        flops / (case.division.devices if chunks else case.division.size),
        predicted_sent(case, tokens) if sent is None else sent,
    )


def head_work(case: Case, program: str, rows: int, sent: float = 0.0) -> Work:
    """A head over so many rows: its matrix, and f32 logits written and read."""
    config = case.config
    paths = (*HEAD, "embedding.") if config.tie_embeddings else HEAD
    weights = placed_bytes({path: leaf for path, leaf in case.leaves.items() if path.startswith(paths)})
    flops = Counters(config, Widths(0.0, 0, 0)).count([], [], rows)[1]
    size = case.division.size
    return work(case, program, weights + 8 * rows * config.vocab_size / size, flops / size, sent)


def predicted_sent(case: Case, tokens: int) -> float:
    """Bytes that a device sends for a backbone over `tokens`, were each sum over devices one ring all-reduce: of the
    embedding, of each token mixer, and of each channel mixer (of a mixture once for each expert of a token).
    Where texts are split, prompt tokens are on one group of devices each and their keys and values visit the others;
    decoding rows are on all, and their partial results are summed. Devices that share the pages of a KV head gather
    its queries, and scatter what they found."""
    size, seq, item = case.division.size, case.division.seq, case.numerics.dtype.itemsize
    rows = 1.0
    for block in case.config.blocks:
        rows += isinstance(block.mixer, AttentionConfig)
        if block.channel is not None:
            cut = isinstance(block.channel, MoEConfig) and not case.division.experts
            rows += block.channel.top_k if cut and isinstance(block.channel, MoEConfig) else 1
    prompt = tokens > case.seats
    here = tokens / seq if prompt else tokens
    sums = 2 * (size - 1) / size * rows * here * case.config.hidden_size * item
    mixers = [block.mixer for block in case.config.blocks if isinstance(block.mixer, AttentionConfig)]
    if (contexts := case.place.contexts) > 1:
        a_head = sum(mixer.heads * (mixer.head_dim * (item + 4) + 4 * contexts) for mixer in mixers)
        return sums + (contexts - 1) * tokens * a_head / size
    if prompt:
        return sums + (seq - 1) * here * _kv_numbers(case) * seq / case.place.kv_shards * item
    results = sum(mixer.heads * (mixer.head_dim + 2) for mixer in mixers) / size * 4
    return sums + 2 * (seq - 1) / seq * here * results


def _block_weights(case: Case, tokens: int) -> float:
    """Bytes of the blocks' weights that a device reads for so many tokens."""
    total = 0.0
    for path, leaf in case.leaves.items():
        if not path.startswith("blocks."):
            continue
        channel = case.config.blocks[int(path.split(".")[1])].channel
        share = 1.0
        if isinstance(channel, MoEConfig) and ".channel." in path and ".router." not in path:
            share = min(1.0, tokens * channel.top_k / channel.experts)
        total += share * placed_bytes(leaf)
    return total


def _kv_numbers(case: Case) -> int:
    """Numbers of a token's keys and values over all layers."""
    mixers = (block.mixer for block in case.config.blocks)
    return sum(2 * m.kv_heads * m.head_dim for m in mixers if isinstance(m, AttentionConfig))
