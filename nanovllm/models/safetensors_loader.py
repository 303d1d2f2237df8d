"""Weights from a directory of safetensors files, single or sharded.

What it is: a WeightSource whose headers were checked byte by byte before the
safetensors library maps the file. What it knows nothing about: configs, layers.
Invariant: after construction every tensor's extent lies inside its file, matches
dtype and shape, and overlaps no other. Source: the safetensors format description
(8-byte little-endian header length, JSON header, data).
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import torch

from nanovllm.errors import ModelFileError
from nanovllm.kernels.grouped_weight import GroupedWeight
from nanovllm.models.config_limits import unsupported
from nanovllm.models.json_file import read_json, strict_loads
from nanovllm.models.weights import missing_tensor, sample

MAX_HEADER_BYTES = 100_000_000
MAX_ELEMENTS = 2**40
MAX_RANK = 8
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class _Entry:
    """One tensor's place: its shard, shape and absolute byte range."""

    file: Path
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsSource:
    """WeightSource over `directory`; raises ModelFileError for any malformed file."""

    def __init__(self, directory: Path) -> None:
        self._entries: dict[str, _Entry] = {}
        self._open: dict[Path, Any] = {}
        self._headers = hashlib.sha256()
        for file in _shards(directory):
            entries, header = _read_header(file)
            if repeated := self._entries.keys() & entries.keys():
                raise _bad(file, f"tensor {min(repeated)!r} is in two shards")
            self._entries |= entries
            self._headers.update(header)
            self._headers.update(file.stat().st_size.to_bytes(8, "little"))

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def get(self, name: str) -> torch.Tensor:
        file = self._entry(name).file
        try:
            if file not in self._open:
                self._open[file] = safetensors.safe_open(file, framework="pt", device="cpu")
            return self._open[file].get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise _bad(file, str(error)) from error

    def grouped(self, name: str) -> GroupedWeight | None:
        return None  # nothing is quantised

    def fingerprint(self) -> str:
        digest = self._headers.copy()
        for file in dict.fromkeys(entry.file for entry in self._entries.values()):
            with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for entry in (e for e in self._entries.values() if e.file == file):
                    with memoryview(data) as view, view[entry.start : entry.end] as stored:
                        digest.update(b"".join(sample(stored)))
        return digest.hexdigest()

    def close(self) -> None:
        self._open.clear()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise missing_tensor(name)
        return self._entries[name]


def _bad(file: Path, problem: str) -> ModelFileError:
    return ModelFileError(
        f"{file.name} is not a sound safetensors file: {problem}.", param=str(file), hint="Download it again."
    )


def _shards(directory: Path) -> list[Path]:
    """The files to read: those the index names, or the single one."""
    index = directory / _INDEX
    if not index.exists():
        if (directory / _SINGLE).is_file():
            return [directory / _SINGLE]
        raise ModelFileError(
            f"{directory} holds neither {_SINGLE} nor {_INDEX}.",
            param=str(directory),
            hint="Point to a directory with safetensors weights, or to a .gguf file.",
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise _bad(index, "weight_map is missing or empty")
    return [_shard(directory, name) for name in sorted(set(map(str, names.values())))]


def _shard(directory: Path, name: str) -> Path:
    """A shard beside its index; a name that leads elsewhere is an attack, not a layout."""
    if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
        raise _bad(directory / _INDEX, f"shard name {name[:80]!r} is not a plain .safetensors file name")
    if not (directory / name).is_file():
        raise ModelFileError(f"The shard {name} is missing from {directory}.", param=name, hint="Finish the download.")
    return directory / name


def _read_header(file: Path) -> tuple[dict[str, _Entry], bytes]:
    """Parse and check one file's header; returns its entries and the raw header."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 10 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _bad(file, f"its header claims {length} bytes in a file of {size}")
        header = handle.read(length)
    table = strict_loads(header, file)
    table.pop("__metadata__", None)
    entries = {name: _entry(file, name, spec, 8 + length, size) for name, spec in table.items()}
    ordered = sorted(entries.items(), key=lambda item: item[1].start)
    for (name, entry), (other, following) in pairwise(ordered):
        if following.start < entry.end:
            raise _bad(file, f"tensors {name!r} and {other!r} overlap")
    return entries, header


def _entry(file: Path, name: str, spec: Any, data_start: int, size: int) -> _Entry:
    """Check one tensor's record against the file's size."""
    if not isinstance(spec, dict):
        raise _bad(file, f"the record of {name!r} is not an object")
    dtype, shape, offsets = spec.get("dtype"), spec.get("shape"), spec.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise unsupported(f"tensor type {dtype!r} ({name})", f"Supported are {', '.join(_ITEM_BYTES)}.")
    if not _naturals(shape, MAX_RANK) or math.prod(shape) > MAX_ELEMENTS:
        raise _bad(file, f"tensor {name!r} has shape {str(shape)[:80]}")
    if not _naturals(offsets, 2) or len(offsets) != 2 or offsets[1] > size - data_start:
        raise _bad(file, f"tensor {name!r} has offsets {str(offsets)[:80]}, outside the file")
    start, end = offsets
    if end - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise _bad(file, f"tensor {name!r} has {end - start} bytes, not those of {dtype} {shape}")
    return _Entry(file, tuple(shape), data_start + start, data_start + end)


def _naturals(values: Any, most: int) -> TypeGuard[list[int]]:
    """Whether `values` is a list of at most `most` integers in [0, 2**48]."""
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 2**48 for v in values)
    )
