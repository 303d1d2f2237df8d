"""A team of threads (team.c) as an object that is closed with its last user.

What it is: its address. What it knows nothing about: what it works on. Invariants: it serves one call at a time, as an
engine makes them. It is not closed at exit, when an engine's thread may be in a call: its threads end with the process;
nor in a forked child, which has none of them.
"""

from __future__ import annotations

import ctypes
import os
import weakref


class Team:
    """`threads` of them, the caller's own among them."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self.library, self.threads = library, threads
        self.address = library.team_open(threads - 1)
        if self.address is None:
            raise MemoryError("no memory for threads")
        weakref.finalize(self, _close, library, self.address, os.getpid()).atexit = False


def _close(library: ctypes.CDLL, address: int, opened_in: int) -> None:
    if os.getpid() == opened_in:
        library.team_close(address)
