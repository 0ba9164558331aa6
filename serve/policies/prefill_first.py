"""Prefill first: the classic baseline of continuous batching (Orca, Yu et al. 2022, as in vLLM before version 1)."""

from __future__ import annotations

from .policy import FirstCome


class PrefillFirst(FirstCome):
    """Prompts are computed as soon as there are seats and pages, and every decode waits meanwhile.

    The first token comes early, and running streams stall: what chunked prefill beside decodes is measured
    against. A prompt longer than the budget takes several steps, still without decodes.
    """

    prefill_first = True
