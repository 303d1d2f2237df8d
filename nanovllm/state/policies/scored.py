"""What most policies share: a score per object, and a clock that evictions push forward.

What it is: two small bases. What it knows nothing about: how a score is made. Invariants: `score` is a look-up;
the greedy-dual clock never goes back.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from heapq import nlargest

from nanovllm.state.policies.policy import NEVER, Cached


class Scored:
    """Keeps the score that the last access gave; what is gone is forgotten."""

    def __init__(self) -> None:
        self._scores: dict[Hashable, float] = {}

    def score(self, obj: Cached) -> float:
        """As its last access left it; NEVER where there was none."""
        return self._scores.get(obj.key, NEVER)

    def on_evict(self, objs: Iterable[Cached]) -> None:
        """Forget them."""
        for obj in objs:
            self.forget(obj)

    def forget(self, obj: Cached) -> None:
        """O(1)."""
        self._scores.pop(obj.key, None)

    def _highest(self, most: int) -> list[Hashable]:
        """The `most` keys of the highest score, the lowest first."""
        return nlargest(most, self._scores, key=self._scores.__getitem__)[::-1]


class GreedyDual(Scored):
    """Scores start from a clock that is the highest score evicted so far: what is used now is worth more than what was.

    N. Young, "The k-server dual and loose competitiveness for paging", 1994; the clock as in RAGCache: on eviction of
    a set E, clock = max(clock, max of the scores in E).
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0.0

    def on_evict(self, objs: Iterable[Cached]) -> None:
        """Advance the clock, then forget them."""
        for obj in objs:
            self.clock = max(self.clock, self.score(obj))
            self.forget(obj)
