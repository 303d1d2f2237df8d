"""One step's attention as kernels.c takes it.

What it is: plain data. What it knows nothing about: how it was made, layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.c_library import StepArgs
from nanovllm.kernels.interface import AttentionGeometry
from nanovllm.kernels.paged import PrefillChunk


@dataclass(frozen=True)
class CompiledPlan:
    """One step for kernels.c. `args` points into `arrays`."""

    pool: torch.Tensor
    geometry: AttentionGeometry
    args: StepArgs
    arrays: tuple[torch.Tensor, ...]
    chunks: list[PrefillChunk]  # what attends in torch
