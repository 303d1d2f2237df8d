"""LRU: the object that was not used for the longest time goes first.

What it is: a count of accesses as the clock. What it knows nothing about: sizes, costs. Invariant: with the
selection's leaf-only rule this is LRU-leaf, the default of the `kv` kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from nanovllm.state.policies.policy import NEVER, Cached


class LRU:
    """Score: the number of the last access."""

    name = "lru"

    def __init__(self) -> None:
        self._now = 0
        self._last: dict[Hashable, int] = {}

    def on_access(self, obj: Cached, cached_tokens: int, new_tokens: int, hit: bool) -> None:
        """O(1)."""
        self._now += 1
        self._last[obj.key] = self._now

    def score(self, obj: Cached) -> float:
        """The number of its last access."""
        return self._last.get(obj.key, NEVER)

    def on_evict(self, objs: Iterable[Cached]) -> None:
        """Forget them."""
        for obj in objs:
            self.forget(obj)

    def forget(self, obj: Cached) -> None:
        """O(1)."""
        self._last.pop(obj.key, None)
