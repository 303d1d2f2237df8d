"""TTL: what was not used for a given time expires; until then the one that expires next goes first.

What it is: an expiry per object, set anew at each use. What it knows nothing about: sizes, costs. Invariants: an
object is expired from the very nanosecond of its expiry on; whoever serves objects asks `is_expired` first, since an
expired one must not be used even where there is room for it.
"""

from __future__ import annotations

from nanovllm.core.clock import Clock
from nanovllm.state.policies.policy import Cached
from nanovllm.state.policies.scored import Scored

NS = 10**9


class TTL(Scored):
    """Score: the clock's nanosecond of expiry, a whole number."""

    name = "ttl"

    def __init__(self, clock: Clock, ttl_s: float) -> None:
        super().__init__()
        self._clock, self._ttl_ns = clock, round(ttl_s * NS)

    def on_access(self, obj: Cached, cached_tokens: int, new_tokens: int, hit: bool) -> None:
        """One look at the clock."""
        self._scores[obj.key] = self._clock.now_ns() + self._ttl_ns

    def is_expired(self, obj: Cached) -> bool:
        """Whether its time is over; True for one that was never accessed."""
        return self.score(obj) <= self._clock.now_ns()
