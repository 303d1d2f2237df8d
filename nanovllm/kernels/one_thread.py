"""torch in one thread for a while: what its idle threads would take from a step that has threads of its own.

What it is: a context. What it knows nothing about: who computes beside torch. Invariants: the count of threads is the
calling thread's and comes back as it was. libgomp's threads wait in a loop for milliseconds after each of torch's
operations that is large enough for them; beside a step in one call they hold its team up (dev/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_torch_thread(is_wanted: bool = True) -> Iterator[None]:
    """Operations inside run in the caller's thread; setting the count takes a fraction of a microsecond."""
    count = torch.get_num_threads()
    if is_wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if is_wanted:
            torch.set_num_threads(count)
