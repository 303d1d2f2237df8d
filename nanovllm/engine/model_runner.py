"""ModelRunner: a batch of plain arrays in, tokens out.

What it is: the model, its kernels and the KV pool on one device. What it knows
nothing about: Sequence, scheduling, text. `launch` starts a step and `collect` waits
for it; `run` is both, and `execute_model` is the course's other name for it.
Invariant: a launched step reads and writes only the blocks its batch names.
"""

from __future__ import annotations

import numpy as np
import torch

from nanovllm.engine.device_tier import DeviceTier
from nanovllm.engine.exec_batch import ExecBatch, ExecResult
from nanovllm.engine.sampler import Sampler
from nanovllm.kernels.interface import StepLayout
from nanovllm.kernels.openmp import one_torch_thread
from nanovllm.models.decoder import DecoderModel


class ModelRunner:
    """Executes steps with real tensors."""

    def __init__(self, model: DecoderModel, tier: DeviceTier, device: torch.device) -> None:
        self.model, self.tier, self.device = model, tier, device
        self.sampler = Sampler(None if model.whole is None else model.whole.choice)

    def launch(self, batch: ExecBatch) -> tuple[torch.Tensor, ExecBatch]:
        """Forward pass; on a CPU it is complete when this returns."""
        return self.forward(batch), batch

    def collect(self, handle: object) -> ExecResult:
        """Sample from the logits of a launched step."""
        assert isinstance(handle, tuple)
        logits, batch = handle
        with one_torch_thread(self.model.whole is not None):
            return self.sampler.sample(logits, batch.sampling)

    def run(self, batch: ExecBatch) -> ExecResult:
        """`launch` and `collect`."""
        return self.collect(self.launch(batch))

    execute_model = run

    @torch.inference_mode()
    def forward(self, batch: ExecBatch) -> torch.Tensor:
        """Logits [M, vocab] of the last token of each sampling row; KV of all N tokens is in the pool after it."""
        layout = self.layout(batch)
        plan = self.model.kernels.plan(layout, self.tier.pool, self.model.geometry)
        last = (np.cumsum(batch.query_lens) - 1)[batch.samples]
        whole = self.model.whole
        with one_torch_thread(whole is not None and whole.takes(plan)):
            return self.model.forward(self._tensor(batch.token_ids), layout.positions, plan, self._tensor(last))

    def layout(self, batch: ExecBatch) -> StepLayout:
        """Where the step's tokens lie: position p of a sequence is slot p % block_size of its block p // block_size."""
        block_size = self.tier.pool.shape[4]
        rows = np.repeat(np.arange(len(batch.query_lens)), batch.query_lens)
        return StepLayout(
            positions=self._tensor(batch.positions),
            query_lens=batch.query_lens,
            context_lens=batch.context_lens,
            block_tables=self._tensor(batch.block_tables),
            slot_blocks=self._tensor(batch.block_tables[rows, batch.positions // block_size]),
            slot_offsets=self._tensor(batch.positions % block_size),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
