"""A linear whose weight oneDNN packed once, called with few distinct numbers of rows.

What it is: oneDNN compiles a product anew for each number of rows and keeps it: about
half a MiB and some milliseconds each (dev/LOG.md). So the rows of a step are
computed in pieces of `ROW_COUNTS` sizes, the last one padded with rows of zeros. What it
knows nothing about: models, steps.

Invariants: each size of `ROW_COUNTS` is one compiled product per shape of weight, and no
other is ever made; a row's result depends on its own row only. One row is computed as two,
because oneDNN's product of a single row adds in another order: measured, the float32
result of a row is then the same to the last bit whatever stands beside it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import torch
import torch.nn.functional as F

EVERY = 16  # up to here every count from two on: decode of few sequences, where padding would cost most
COARSE = 64  # up to here multiples of four and eight; beyond, powers of two
LARGEST = 1024
ROW_COUNTS = (*range(2, EVERY + 1), *range(20, 32, 4), *range(32, COARSE + 1, 8), 128, 256, 512, LARGEST)


class PackedLinear:
    """x [N, in] -> [N, out]. `weight` [out, in] is copied into oneDNN's layout; the caller may drop its own."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if rows <= EVERY and rows != 1:
            return self.product(x)
        outs = [self.product(piece) for piece in pieces(x)]
        return (outs[0] if len(outs) == 1 else torch.cat(outs))[:rows]

    def rows(self, count: int) -> int:
        """How many rows it computes for `count`."""
        return sum(sizes(count))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The compiled product, for a number of rows out of `ROW_COUNTS`."""
        return self._product(x, self._weight, self._bias, "none", [], "")


def pieces(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of `x` in order, in pieces with a number of rows out of `ROW_COUNTS`; zeros fill up the last."""
    start = 0
    for size in sizes(len(x)):
        piece = x[start : start + size]
        yield piece if len(piece) == size else F.pad(piece, (0, 0, 0, size - len(piece)))
        start += size


def sizes(rows: int) -> list[int]:
    """Numbers out of `ROW_COUNTS`, the larger first, that together hold `rows`."""
    out = []
    while rows > COARSE:
        out.append(min(1 << rows.bit_length() - 1, LARGEST))
        rows -= out[-1]
    return [*out, ROW_COUNTS[bisect_left(ROW_COUNTS, rows)]] if rows > 0 else out
