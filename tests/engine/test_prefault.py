"""The pool's pages, taken while the weights are loaded: no byte changes, and nothing is left of it afterwards."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time

import pytest
import torch

from nanovllm.engine import prefault
from nanovllm.engine.prefault import PIECE_BYTES, prefaulting


def own_pages(size: int) -> torch.Tensor:
    """`size` bytes of untouched pages: an allocator may hand out, and zero, memory that was in use before."""
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def resident_bytes(tensor: torch.Tensor) -> int:
    """What of a tensor's memory the system has given so far."""
    flags = (ctypes.c_ubyte * (tensor.nbytes // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), flags) == 0
    return sum(flag & 1 for flag in flags) * mmap.PAGESIZE


def test_pages_are_taken_and_no_byte_changes() -> None:
    pool = own_pages(4 * PIECE_BYTES)
    pool[5] = 7
    assert resident_bytes(pool) < PIECE_BYTES
    with prefaulting(pool):
        deadline = time.monotonic() + 30
        while resident_bytes(pool) < pool.nbytes and time.monotonic() < deadline:
            pool[2 * PIECE_BYTES] = 9  # as somebody who uses it already
            time.sleep(0.01)
    assert resident_bytes(pool) == pool.nbytes
    assert pool[5] == 7 and pool[2 * PIECE_BYTES] == 9 and int(pool.sum(dtype=torch.int64)) == 16


def test_it_ends_with_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "PIECE_BYTES", 1 << 16)
    with pytest.raises(ValueError, match="no such weight"), prefaulting(torch.zeros(1 << 24, dtype=torch.uint8)):
        raise ValueError("no such weight")
    assert not [thread for thread in threading.enumerate() if thread.name == "prefault"]


@pytest.mark.parametrize("size", [0, 1, 4095, 5000])
def test_a_pool_smaller_than_a_page_is_left_alone(size: int) -> None:
    with prefaulting(torch.zeros(size, dtype=torch.uint8)):
        pass


def test_a_system_without_the_call_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "POPULATE_WRITE", 9999)
    pool = torch.zeros(1 << 24, dtype=torch.uint8)
    with prefaulting(pool):
        pool[0] = 1
    assert int(pool.sum()) == 1
