"""A quantised weight: whole numbers in groups of 32 that share a scale and an offset.

What it is: plain arrays, as a file has them or as they are made from a weight, and how two of them are stacked. What
it knows nothing about: file formats, products. Invariant: `code * scale + offset`, in float32, is the weight that is
stood for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

GROUP = 32
PAIR_BYTES = 8  # a group's scale and offset


@dataclass(frozen=True)
class GroupedWeight:
    """codes [out, in] below 2 ** bits; scales, offsets [out, in / GROUP] float32; bits 4 or 8."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32]
    bits: int

    @classmethod
    def quantised(cls, weight: torch.Tensor) -> GroupedWeight:
        """8 bits for `weight` [out, in], `in` a multiple of GROUP: 256 values, evenly from a group's least to its most.

        A weight is off by half its group's scale at most, and by float32's rounding.
        """
        groups = weight.float().unflatten(1, (-1, GROUP))
        least, most = groups.aminmax(dim=2)
        scales = (most - least) / 255
        steps = (groups - least[..., None]) / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        codes = steps.round_().clamp_(0, 255).to(torch.uint8).flatten(1)
        return cls(codes.numpy(), scales.numpy(), least.numpy(), 8)

    @classmethod
    def stacked(cls, parts: Sequence[GroupedWeight | None]) -> GroupedWeight | None:
        """Along their outputs; None where one of them is not grouped. Codes of 4 bits are codes of 8, too."""
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return cls(
            np.concatenate([part.codes for part in known]),
            np.concatenate([part.scales for part in known]),
            np.concatenate([part.offsets for part in known]),
            max(part.bits for part in known),
        )

    def reordered(self, rows: NDArray[np.int64]) -> GroupedWeight:
        """The same weight with its outputs in another order."""
        return GroupedWeight(self.codes[rows], self.scales[rows], self.offsets[rows], self.bits)

    @property
    def bytes_per_weight(self) -> float:
        """What a weight takes, its share of scale and offset included."""
        return self.bits / 8 + PAIR_BYTES / GROUP

    def restored(self) -> torch.Tensor:
        """The weight itself, float32 [out, in]."""
        scales, offsets = np.repeat(self.scales, GROUP, axis=1), np.repeat(self.offsets, GROUP, axis=1)
        return torch.from_numpy(self.codes.astype(np.float32) * scales + offsets)

    def stored(self) -> torch.Tensor:
        """The codes as grouped.c reads them: uint8 [out, in * bits / 8]; 4 bits: two groups, one above the other."""
        if self.bits == 8:
            return torch.from_numpy(np.ascontiguousarray(self.codes))
        pairs = self.codes.reshape(len(self.codes), -1, 2, GROUP)
        return torch.from_numpy((pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(self.codes), -1))
