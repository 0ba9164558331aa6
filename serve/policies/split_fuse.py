"""Dynamic SplitFuse (DeepSpeed-FastGen: Holmes et al. 2024, arXiv 2401.08671, section 3)."""

from __future__ import annotations

from .policy import FirstCome


class SplitFuse(FirstCome):
    """Every pass has exactly `forward_tokens` tokens while there are so many to compute.

    Throughput is a concave function of a pass's tokens, so passes of one size are best: generation first, then
    prompts in order of arrival, the last one cut to fill the pass; its remainder leads the prompts of the next
    pass. A prompt starts when all of it fits in the pages. Where the paper's implementation recovers from a
    standstill, the scheduler preempts. A pass stays short when the pool, the seats or the prompt rows are
    used up, or where a recurrent model's only prompt ends a chunk at a block.

    Args:
        forward_tokens: tokens of a pass; it should lie just inside the flat region of the throughput curve.
            None: the engine's max_num_batched_tokens.
    """

    def __init__(self, forward_tokens: int | None = None):
        if forward_tokens is not None and forward_tokens < 1:
            raise ValueError(f"forward_tokens={forward_tokens} must be at least 1, or None")
        super().__init__()
        self.forward_tokens = forward_tokens

    def budget(self, limit: int) -> int:
        if self.forward_tokens is not None and self.forward_tokens > limit:
            raise ValueError(
                f"SplitFuse(forward_tokens={self.forward_tokens}) exceeds max_num_batched_tokens={limit}, the "
                f"largest step that was compiled; lower the former or raise the latter"
            )
        return self.forward_tokens or limit
