"""A linear over a weight in panels: panels.c, for any number of rows.

What it is: the layout, and the call. What it knows nothing about: models. Invariants: the weight is a copy; a row's
result is the same bits whatever stands beside it, wherever it stands, with any number of threads.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from nanovllm.kernels.c_library import PanelArgs
from nanovllm.kernels.large_pages import LargePages

WORD_BYTES = 4


def can_panel(weight: torch.Tensor, library: ctypes.CDLL) -> bool:
    """Whether this build multiplies elements of the weight's type, and its inputs are whole words."""
    return library.panel_width() > 0 and weight.shape[1] * weight.itemsize % WORD_BYTES == 0


class PanelLinear:
    """x [N, in] -> [N, out]. `weight` [out, in]; results of its type, or of `dtype`."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        library: ctypes.CDLL,
        parallel: int | None,
        pages: LargePages,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._library, self._parallel = library, parallel
        self._outputs, self._inputs = weight.shape
        self._panels, self._bias = pages.copy(in_panels(weight, library.panel_width())), bias
        self.dtype = dtype or weight.dtype

    def args(self, x: int | None = None, y: int | None = None, rows: int = 0) -> PanelArgs:
        """The call's argument for `rows` rows at address `x`, with the result at `y`."""
        bias = None if self._bias is None else self._bias.data_ptr()
        shape = (rows, self._inputs, self._outputs)
        return PanelArgs(self._panels.data_ptr(), bias, x, y, *shape, self.dtype == torch.float32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self._outputs, dtype=self.dtype)
        args = self.args(x.data_ptr(), y.data_ptr(), x.shape[0])
        self._library.panel_linear(ctypes.byref(args), self._parallel, torch.get_num_threads())
        return y


def in_panels(weight: torch.Tensor, width: int) -> torch.Tensor:
    """[out / width, in / elements of a word, width, elements of a word]; zeros behind the last output."""
    outputs, inputs = weight.shape
    per_word = WORD_BYTES // weight.itemsize
    padded = F.pad(weight, (0, 0, 0, -outputs % width))
    return padded.view(-1, width, inputs // per_word, per_word).transpose(1, 2)
