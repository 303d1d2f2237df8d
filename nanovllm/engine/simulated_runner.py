"""SimulatedRunner: steps that cost time from a table and touch no tensors.

What it is: the runner under a virtual clock, on which scheduler, blocks and events
run unchanged. What it knows nothing about: models. Its tokens are a pure function of
(seed, position), so a simulated run replays identically. Every time it produces is
`simulated`.
"""

from __future__ import annotations

import numpy as np

from nanovllm.core.clock import VirtualClock
from nanovllm.core.cost_table import CostTable
from nanovllm.engine.exec_batch import ExecBatch, ExecResult


class SimulatedRunner:
    """Advances `clock` by what `costs` says a step takes."""

    def __init__(self, costs: CostTable, clock: VirtualClock, vocab_size: int = 256) -> None:
        self.costs, self.clock, self.vocab_size = costs, clock, vocab_size

    def launch(self, batch: ExecBatch) -> ExecBatch:
        """Time passes here, as in a forward pass."""
        work = zip((batch.context_lens - batch.query_lens).tolist(), batch.query_lens.tolist(), strict=True)
        self.clock.advance(int((self.costs.base_ms + self.costs.step_ms(work)) * 1e6))
        return batch

    def collect(self, handle: object) -> ExecResult:
        """One made-up token per sampling row."""
        assert isinstance(handle, ExecBatch)
        sampling = handle.sampling
        tokens = (sampling.seeds.astype(np.int64) * 31 + sampling.positions * 7) % self.vocab_size
        return ExecResult(tokens, [None] * len(tokens))

    def run(self, batch: ExecBatch) -> ExecResult:
        """`launch` and `collect`."""
        return self.collect(self.launch(batch))

    execute_model = run
