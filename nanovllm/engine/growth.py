"""GrowthForecast: the room that admitted sequences will need to grow.

What it is: a guess of output lengths, learned from sequences that ended, and the peak
of blocks that follows from it; admission keeps that much free. Reserving every
`max_tokens` would leave most of the pool idle; reserving nothing lets each freed block
re-admit the sequence that has just been preempted. The peak is taken over the moments
at which a sequence is expected to end, as in the Past-Future scheduler (Gong et al.,
ASPLOS 2025). What it knows nothing about: free blocks, queues. Invariant: a wrong
forecast costs a preemption or a wait, never correctness.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nanovllm.engine.sequence import Sequence

LEARNING_RATE = 1 / 8
RAISE = 1.25  # a preemption shows that the forecast was too low
MIN_BLOCKS = 2  # whoever outlived the forecast is expected to grow by this much


@dataclass
class GrowthForecast:
    """Expected output of a sequence, tokens; starts low, because waiting costs more than a few preemptions."""

    block_size: int
    mean_output: float = 24.0

    def ended(self, seq: Sequence) -> None:
        """Learn from a complete output."""
        self.mean_output += LEARNING_RATE * (seq.num_completion_tokens - self.mean_output)

    def preempted(self, seq: Sequence) -> None:
        """Expect more, though never more than `seq` may generate."""
        most = seq.max_total_tokens - seq.num_prompt_tokens
        self.mean_output = max(self.mean_output, min(self.mean_output * RAISE, most))

    def growth_blocks(self, seqs: Iterable[Sequence]) -> int:
        """Blocks that `seqs` are expected to need at their peak beyond those of their known tokens."""
        seqs = list(seqs)
        longest_first = sorted(((self._remaining(seq), seq.num_tokens) for seq in seqs), reverse=True)
        tokens = peak = 0
        for alive, (remaining, num_tokens) in enumerate(longest_first, start=1):
            tokens += num_tokens
            peak = max(peak, tokens + alive * remaining + alive * (self.block_size - 1) // 2)  # half a block is slack
        return -(-peak // self.block_size) - sum(seq.num_blocks for seq in seqs)

    def _remaining(self, seq: Sequence) -> int:
        expected = max(int(self.mean_output) - seq.num_completion_tokens, MIN_BLOCKS * self.block_size)
        return 0 if seq.prefill_only else min(expected, seq.max_remaining_tokens)
