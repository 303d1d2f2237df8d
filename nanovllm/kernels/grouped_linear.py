"""A linear that computes few rows from grouped weights, and more from the panels beside them.

What it is: the choice between two products by the number of rows. What it knows nothing about: models.
Invariants: up to `FEW` rows are computed from the codes, in bfloat16's build only: float32 has one product for any
number of rows, so that a row's result is the same bits whatever stands beside it.
"""

from __future__ import annotations

import ctypes

import torch

from nanovllm.kernels.c_library import GroupedArgs
from nanovllm.kernels.grouped_weight import GroupedWeight
from nanovllm.kernels.interface import Linear
from nanovllm.kernels.large_pages import LargePages

FEW, MAX_IN, INPUTS, OUTPUTS = 2, 32768, 64, 16  # as in grouped.c


def can_group(weight: GroupedWeight) -> bool:
    """Whether grouped.c takes a weight of this shape."""
    outputs, inputs = weight.codes.shape
    return inputs % INPUTS == 0 and inputs <= MAX_IN and outputs % OUTPUTS == 0


class GroupedLinear:
    """x [N, in] -> [N, out]; `many` is the same linear for more than `FEW` rows."""

    def __init__(
        self,
        weight: GroupedWeight,
        bias: torch.Tensor | None,
        many: Linear,
        library: ctypes.CDLL,
        parallel: int | None,
        pages: LargePages,
        dtype: torch.dtype,
    ) -> None:
        self.many, self._library, self._parallel = many, library, parallel
        self._outputs, self._inputs = weight.codes.shape
        arrays = (weight.stored(), torch.from_numpy(weight.scales), torch.from_numpy(weight.offsets))
        self._arrays = (*map(pages.copy, arrays), bias)
        self._addresses = [None if array is None else array.data_ptr() for array in self._arrays]
        self._bits, self.dtype = weight.bits, dtype

    def args(self, x: int | None = None, y: int | None = None, rows: int = 0) -> GroupedArgs:
        """The call's argument for `rows` rows at address `x`, with the result at `y`."""
        shape = (rows, self._inputs, self._outputs, self._bits)
        return GroupedArgs(*self._addresses, x, y, *shape, self.dtype == torch.float32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > FEW:
            return self.many(x)
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self._outputs, dtype=self.dtype)
        if not len(x):  # a step in which no row samples
            return y
        args = self.args(x.data_ptr(), y.data_ptr(), x.shape[0])
        self._library.grouped_linear(ctypes.byref(args), self._parallel, torch.get_num_threads())
        return y
