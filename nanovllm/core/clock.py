"""Clocks: where every timestamp of the system comes from, in integer nanoseconds.

What it is: the one seam through which time enters. What it knows nothing about:
wall time; a jump of the wall clock has no effect. Invariant: time never goes back.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Anything that tells monotonic nanoseconds."""

    def now_ns(self) -> int:
        """Nanoseconds since an arbitrary start."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_ns(self) -> int:
        """Nanoseconds of `time.monotonic_ns`."""
        return time.monotonic_ns()


class VirtualClock:
    """A clock that moves only when told to: simulated runs and timing tests are deterministic under it."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        """The virtual time, nanoseconds."""
        return self._now_ns

    def advance(self, duration_ns: int) -> None:
        """Let `duration_ns` pass. Raises ValueError on a negative duration."""
        if duration_ns < 0:
            raise ValueError("time does not go back")
        self._now_ns += duration_ns
