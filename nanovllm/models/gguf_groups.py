"""The simple quantised types of GGUF as whole numbers in groups, without restoring them.

What it is: blocks of 32 weights taken apart. What it knows nothing about: files, names. Source: the block layouts of
ggml-common.h. Invariant: what `GroupedWeight` stands for equals `gguf.quants.dequantize`, up to float32's rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Q
from numpy.typing import NDArray

from nanovllm.kernels.grouped_weight import GROUP, GroupedWeight

HALF = 2  # bytes of a scale
_BLOCK_BYTES = {Q.Q4_0: HALF + 16, Q.Q4_1: 2 * HALF + 16, Q.Q8_0: HALF + GROUP}


def grouped_rows(rows: NDArray[np.uint8], kind: Q) -> GroupedWeight | None:
    """A weight of `rows` [out, bytes]; None for types whose groups are of another kind, and for damaged scales."""
    if kind not in _BLOCK_BYTES:
        return None
    blocks = rows.reshape(len(rows), -1, _BLOCK_BYTES[kind])
    scales = _halves(blocks[..., :HALF])
    if kind == Q.Q8_0:
        codes = blocks[..., HALF:] ^ 0x80  # signed, moved up by 128
        return _weight(codes, scales, -128 * scales, 8)
    offsets = -8 * scales if kind == Q.Q4_0 else _halves(blocks[..., HALF : 2 * HALF])
    packed = blocks[..., -GROUP // 2 :]
    codes = np.concatenate((packed & 15, packed >> 4), axis=-1)
    return _weight(codes, scales, offsets, 4)


def _halves(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(stored).view(np.float16)[..., 0].astype(np.float32)


def _weight(
    codes: NDArray[Any], scales: NDArray[np.float32], offsets: NDArray[np.float32], bits: int
) -> GroupedWeight | None:
    if not (np.isfinite(scales).all() and np.isfinite(offsets).all()):
        return None
    return GroupedWeight(codes.reshape(len(codes), -1).astype(np.uint8), scales, offsets, bits)
