"""A linear on a processor that multiplies matrices (AMX): few rows as everywhere, more by oneDNN, which uses the unit.

What it is: the choice between two products by the number of rows. What it knows nothing about: models. Few rows wait
for the weight to be read, whatever multiplies them, and a step of them is one call of ours; so the weight is kept
twice. Where one begins to be faster than the other is not measured: no such processor was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.interface import Linear

FEW_ROWS = 16  # a step of up to so many tokens is our own


@dataclass(frozen=True)
class MatrixUnitLinear:
    """x [N, in] -> [N, out], by `few` up to `FEW_ROWS` rows, by `many` beyond."""

    few: Linear
    many: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (self.few if len(x) <= FEW_ROWS else self.many)(x)
