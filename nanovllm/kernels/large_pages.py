"""Memory in large pages for what a step reads much of, weights and KV: it looks up fewer addresses.

What it is: zeros, and copies of tensors laid one behind another. What it knows nothing about: what they mean.
Invariants: zeros begin with a page and a copy with a cache line, and both live as long as somebody holds them; where
the system has no large pages they lie in ordinary ones. Measured: products of few rows take two thirds of the time
(dev/LOG.md).
"""

from __future__ import annotations

import contextlib
import mmap

import torch

CHUNK_BYTES, LINE_BYTES = 32 << 20, 64


class LargePages:
    """Chunks of memory, filled from front to back."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in such memory, contiguous."""
        size = -(-tensor.nbytes // LINE_BYTES) * LINE_BYTES
        if not size:
            return tensor.clone()
        if size > len(self._free):
            self._free = large_pages(max(size, CHUNK_BYTES))
        place, self._free = self._free[: tensor.nbytes], self._free[size:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def large_pages(size: int) -> torch.Tensor:
    """`size` bytes of zeros, which cost memory once they are written; private to this process, from a page's start on.

    Raises MemoryError.
    """
    try:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size:,} bytes: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
