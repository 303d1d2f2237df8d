"""The GGUF container: metadata and the table of tensors, parsed with every bound checked.

What it is: a reader of an untrusted header, from the format's specification
(ggml/docs/gguf.md). What it knows nothing about: architectures, quantisation
arithmetic. Invariants: nothing is allocated that the file does not pay for with its
own bytes, and every tensor of a parsed header lies within the file, aligned, apart
from the others.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nanovllm.errors import ModelFileError, UnsupportedModelError

MAX_ELEMENTS = 2**40
MAX_ARRAY_ITEMS = 2**24
MAX_NESTING = 3
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
# GGUF value type -> little-endian numpy dtype; strings (8) and arrays (9) are read apart.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"}
_SCALARS |= {_BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_SMALLEST_ITEM = {_STRING: 8, _ARRAY: 12}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's record: `shape` in row-major order, byte range absolute in the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GGUFHeader:
    """Everything before the data: `metadata` by key, tensors by name, and the header's length."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    length: int


def parse_header(data: mmap.mmap) -> GGUFHeader:
    """Parse and check a mapped GGUF file.

    Raises ModelFileError for anything truncated, inconsistent or absurd, and
    UnsupportedModelError for a version, byte order or tensor type not implemented.
    """
    cursor = _Cursor(data)
    tensor_count, key_count = _preamble(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        if key in metadata:
            raise cursor.bad(f"key {key[:80]!r} occurs twice")
        metadata[key] = cursor.value(cursor.unsigned(4))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 65536 or alignment & (alignment - 1):
        raise cursor.bad(f"alignment {alignment!r} is not a power of two")
    records = [_record(cursor) for _ in range(tensor_count)]
    data_start = -(-cursor.position // alignment) * alignment
    return GGUFHeader(metadata, _place(records, data_start, alignment, cursor), data_start)


class _Cursor:
    """A read position in the file that refuses to pass its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position, self.items_left = data, 0, MAX_ARRAY_ITEMS

    def bad(self, problem: str) -> ModelFileError:
        """The error for this file at this place."""
        return ModelFileError(
            f"The GGUF file is damaged near byte {self.position}: {problem}.", hint="Download it again."
        )

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > len(self.data) - self.position:
            raise self.bad(f"it ends {count - (len(self.data) - self.position)} bytes too early")
        self.position += count
        return self.data[self.position - count : self.position]

    def unsigned(self, width: int) -> int:
        """A little-endian unsigned integer of `width` bytes."""
        return int.from_bytes(self.take(width), "little")

    def count(self, smallest_item: int, what: str) -> int:
        """A 64-bit item count that the rest of the file is long enough to hold."""
        count = self.unsigned(8)
        if count * smallest_item > len(self.data) - self.position:
            raise self.bad(f"it claims {count} {what}, more than fit into it")
        return count

    def string(self) -> str:
        """A length-prefixed UTF-8 string."""
        raw = self.take(self.unsigned(8))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.bad("a string is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        """One metadata value of GGUF type `kind`, as a plain Python object."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(depth + 1)
        return self._numbers(kind, 1)[0]

    def _array(self, depth: int) -> list[Any]:
        kind = self.unsigned(4)
        count = self.count(_SMALLEST_ITEM.get(kind, 1), "array items")
        self.items_left -= count
        if depth > MAX_NESTING or self.items_left < 0:
            raise self.bad(f"its arrays are nested deeper than {MAX_NESTING} or longer than {MAX_ARRAY_ITEMS}")
        if kind in _SMALLEST_ITEM:
            return [self.value(kind, depth) for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise self.bad(f"value type {kind} does not exist")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """Magic and version; returns (tensor count, key count)."""
    if cursor.take(4) != b"GGUF":
        raise cursor.bad("it does not start with the letters GGUF")
    version = cursor.unsigned(4)
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        what = "big-endian" if swapped else f"of version {version}"
        raise UnsupportedModelError(
            f"The GGUF file is {what}, which is not implemented.",
            hint=f"Convert it to a little-endian file of version {_VERSIONS[-1]}.",
        )
    return cursor.count(32, "tensors"), cursor.count(13, "keys")


def _record(cursor: _Cursor) -> TensorInfo:
    """One entry of the tensor table; `start` is still relative to the data section."""
    name, rank = cursor.string(), cursor.unsigned(4)
    if not 1 <= rank <= 4:
        raise cursor.bad(f"tensor {name[:80]!r} has {rank} dimensions")
    dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank))
    if math.prod(dims) > MAX_ELEMENTS or 0 in dims:
        raise cursor.bad(f"tensor {name[:80]!r} has dimensions {dims}")
    number, offset = cursor.unsigned(4), cursor.unsigned(8)
    if number not in set(GGMLQuantizationType):
        raise UnsupportedModelError(f"Tensor {name[:80]!r} has the unknown type {number}.", hint="Update or convert.")
    kind = GGMLQuantizationType(number)
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    if dims[0] % per_block:
        raise cursor.bad(f"tensor {name[:80]!r} has rows of {dims[0]}, not whole {kind.name} blocks")
    size = math.prod(dims) // per_block * block_bytes
    return TensorInfo(name, dims[::-1], kind, offset, size)  # GGUF lists the fastest dimension first


def _place(records: list[TensorInfo], data_start: int, alignment: int, cursor: _Cursor) -> dict[str, TensorInfo]:
    """Turn relative offsets into absolute ones, refusing any that are unaligned, outside or overlapping."""
    tensors: dict[str, TensorInfo] = {}
    end = data_start
    for info in sorted(records, key=lambda record: record.start):
        start = data_start + info.start
        if info.name in tensors:
            raise cursor.bad(f"tensor {info.name[:80]!r} occurs twice")
        if start % alignment or start + info.size > len(cursor.data):
            raise cursor.bad(f"tensor {info.name[:80]!r} lies outside the file or unaligned")
        if start < end:
            raise cursor.bad(f"tensor {info.name[:80]!r} overlaps another")
        end = start + info.size
        tensors[info.name] = TensorInfo(info.name, info.shape, info.type, start, info.size)
    return tensors
