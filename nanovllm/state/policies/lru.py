"""LRU: the object that was not used for the longest time goes first.

What it is: a count of accesses as the clock. What it knows nothing about: sizes, costs, seconds. Invariant: with the
selection's leaf-only rule this is LRU-leaf, the default of the `kv` kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanovllm.state.policies.policy import Cached
from nanovllm.state.policies.scored import Scored


class LRU(Scored):
    """Score: the number of the last access."""

    name = "lru"

    def __init__(self) -> None:
        super().__init__()
        self._now = 0

    def on_access(self, obj: Cached, cached_tokens: int, new_tokens: int, hit: bool) -> None:
        """O(1)."""
        self._now += 1
        self._scores[obj.key] = self._now

    def memory(self, most: int) -> list[tuple[Any, ...]]:
        """The order alone."""
        return [(key,) for key in self._highest(most)]

    def recall(self, obj: Cached, values: Sequence[float]) -> None:
        """Used now, in the order of the calls."""
        self._now += 1
        self._scores[obj.key] = self._now
