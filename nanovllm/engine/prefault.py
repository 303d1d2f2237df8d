"""Prefault: the KV pool's pages taken from the system while the weights are loaded, not by the first requests.

A page costs time when it is first written: 0.14 s a GiB of large pages where the memory is at hand, 2.6 s in a virtual
machine whose host takes back what lies unused (dev/LOG.md); the first prompts would pay for it. Loading weights
is one thread's work, so the other core is free for it.
What it knows nothing about: blocks. Invariants: no byte changes; the thread has ended when the context has; a system
without the call (Linux before 5.14, others) goes on without it.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PREFAULT_BYTES = 1 << 30  # of a larger pool the rest is taken as it is used: whoever never uses it keeps the memory
PIECE_BYTES = 8 << 20  # between two of them the thread may be told to end, and others may map memory
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which Python's mmap has no name for


@contextmanager
def prefaulting(pool: torch.Tensor) -> Iterator[None]:
    """Take the front of `pool` from the system, as much as there is time for inside."""
    if pool.device.type != "cpu":
        yield
        return
    is_over = threading.Event()
    thread = threading.Thread(target=_populate, args=(pool, is_over), name="prefault", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _populate(pool: torch.Tensor, is_over: threading.Event) -> None:
    first = -(-pool.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = pool.data_ptr() + min(pool.nbytes, PREFAULT_BYTES)
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    for start in range(first, end, PIECE_BYTES):
        size = min(PIECE_BYTES, end - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if madvise is None or is_over.is_set():
            return
        if madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), POPULATE_WRITE) != 0:
            return
