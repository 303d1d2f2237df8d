"""The OpenMP library that torch brought along: its pool of threads for our kernels, and fewer of them for a while.

What it is: one function's address and one context. What it knows nothing about: who computes beside torch.
Invariants: the count of threads is the calling thread's alone, and comes back as it was; torch's own setter would also
change what a thread starts with that uses torch for the first time meanwhile. libgomp's threads wait in a loop for
milliseconds after each of torch's operations that is large enough for them; beside a step in one call they hold its
team up (dev/LOG.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

NAMES = ("libgomp", "libomp", "libiomp")


@cache
def _library() -> ctypes.CDLL | None:
    """The one that torch loaded; None where it has none of its own."""
    root = Path(torch.__file__).parent
    for path in sorted([*root.glob("lib/lib*omp*"), *root.parent.glob("torch.libs/lib*omp*")]):
        if path.name.startswith(NAMES):
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                continue
    return None


def parallel() -> int | None:
    """Address of its GOMP_parallel, so that both share one pool of threads."""
    function = getattr(_library(), "GOMP_parallel", None)
    return ctypes.cast(function, ctypes.c_void_p).value if function else None


@contextmanager
def one_torch_thread(is_wanted: bool = True) -> Iterator[None]:
    """torch's operations inside run in the caller's thread; setting the count takes a fraction of a microsecond."""
    count, limit = torch.get_num_threads(), _limit()
    if is_wanted:
        limit(1)
    try:
        yield
    finally:
        if is_wanted:
            limit(count)


@cache
def _limit() -> Callable[[int], object]:
    """Sets the calling thread's count; torch's setter only where its OpenMP is not found."""
    return getattr(_library(), "omp_set_num_threads", torch.set_num_threads)
