"""The circuit breaker: a tier that fails is left alone for a while.

What it is: closed (used), open (left alone), half open (one try). What it knows nothing about: tiers.
Invariants: `max_errors` errors in a row open it, however far apart (a tier that hangs costs each caller its
whole deadline, and callers may be rare), `trip` at once; after `cooldown_ns` exactly one call is let through,
and its outcome decides. Time is the clock's, so a virtual one replays it.
"""

from __future__ import annotations

from nanovllm.core.clock import Clock

SECOND = 1_000_000_000


class CircuitBreaker:
    """One per tier and direction."""

    def __init__(self, clock: Clock, *, max_errors: int = 5, cooldown_ns: int = 30 * SECOND) -> None:
        self._clock, self._max_errors, self._cooldown_ns = clock, max_errors, cooldown_ns
        self._errors = 0  # since the last success
        self._opened_ns: int | None = None
        self._trying = False
        self.reason = ""
        self.num_opened = 0

    @property
    def state(self) -> str:
        """`closed`, `open` or `half_open`."""
        if self._opened_ns is None:
            return "closed"
        return "half_open" if self._clock.now_ns() - self._opened_ns >= self._cooldown_ns else "open"

    def allow(self) -> bool:
        """Whether to call now. In half-open state True once, until that call's outcome is told."""
        state = self.state
        if state == "half_open" and not self._trying:
            self._trying = True
            return True
        return state == "closed"

    def success(self) -> None:
        """The call worked."""
        self._opened_ns, self._trying, self._errors = None, False, 0

    def failure(self, reason: str) -> None:
        """The call failed."""
        self._errors += 1
        if self._trying or self._errors >= self._max_errors:
            self.trip(reason)

    def trip(self, reason: str) -> None:
        """Open now."""
        self.num_opened += self._opened_ns is None
        self._opened_ns, self._trying, self.reason, self._errors = self._clock.now_ns(), False, reason, 0
