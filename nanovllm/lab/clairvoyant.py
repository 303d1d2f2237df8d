"""The clairvoyant reference: it knows the whole trace, and keeps the blocks that come back soonest.

What it is: L. Belady's MIN ("A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal
5(2), 1966) over prefix chains, with the right not to take a block in. What it knows nothing about: milliseconds.

Why it is a bound: a block never comes back sooner than its parent, since who uses it uses the parent too. So what
comes back last among all blocks here is always a leaf, and keeping what comes back soonest never breaks a chain.
All blocks being of one size, no cache of this capacity finds more blocks. It may well save fewer milliseconds than
another: it counts blocks, not what they cost.

Invariant: the blocks of the request being served stay (the replay holds them); without that it throws away what it is
about to need and loses to LRU.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import inf

from nanovllm.lab.cache_trace import CacheTrace
from nanovllm.state.policies.policy import Cached
from nanovllm.state.policies.scored import Scored


class Clairvoyant(Scored):
    """Score: minus the number of the request that uses the block next. One instance per replay of `trace`."""

    name = "clairvoyant"

    def __init__(self, trace: CacheTrace) -> None:
        super().__init__()
        self._now = -1
        self._uses: dict[Hashable, list[int]] = {}  # by block, the requests to come, the last one first
        for number in range(len(trace.prompts) - 1, -1, -1):
            for block in trace.prompts[number].blocks:
                self._uses.setdefault(block.key, []).append(number)

    def next_request(self) -> None:
        """The replay goes on to the next request of the trace."""
        self._now += 1

    def on_access(self, obj: Cached, cached_tokens: int, new_tokens: int, hit: bool) -> None:
        """O(1) amortised."""
        self._scores[obj.key] = -self.next_use(obj)

    def next_use(self, obj: Cached) -> float:
        """The number of the next request that uses it, after the present one; infinite where none does."""
        uses = self._uses[obj.key]
        while uses and uses[-1] <= self._now:
            uses.pop()
        return uses[-1] if uses else inf

    def admits(self, obj: Cached, victim: Cached) -> bool:
        """Whether `obj` comes back sooner than what would have to go for it."""
        return self.next_use(obj) < -self.score(victim)
