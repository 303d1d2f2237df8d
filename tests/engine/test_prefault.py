"""The pool's pages, taken while the weights are loaded: no byte changes, and nothing is left of it afterwards."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from nanovllm.engine import prefault
from nanovllm.engine.prefault import PIECE_BYTES, prefaulting

PAGES = 1 << 14  # at the ends, which others may share


def resident_bytes(tensor: torch.Tensor) -> int:
    """What of a tensor's memory the system has given so far."""
    middle, found, size = tensor.data_ptr() + tensor.nbytes // 2, False, 0  # numpy sets its first page apart
    with open("/proc/self/smaps", encoding="ascii") as lines:
        for line in lines:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                start, end = (int(part, 16) for part in head.split("-"))
                found = start <= middle < end
            elif found and head == "Rss:":
                size = int(line.split()[1]) * 1024
    return size


def test_pages_are_taken_and_no_byte_changes() -> None:
    pool = torch.from_numpy(np.zeros(4 * PIECE_BYTES, np.uint8))
    pool[5] = 7
    before = resident_bytes(pool)
    with prefaulting(pool):
        deadline = time.monotonic() + 30
        while resident_bytes(pool) < 4 * PIECE_BYTES - PAGES and time.monotonic() < deadline:
            pool[2 * PIECE_BYTES] = 9  # as somebody who uses it already
            time.sleep(0.01)
    assert before < PIECE_BYTES < 4 * PIECE_BYTES - PAGES <= resident_bytes(pool)
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
